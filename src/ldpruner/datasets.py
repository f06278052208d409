"""Data that a user brings: pictures with or without captions, and recordings, from a folder or from a zip of one.

The forms are those of Hugging Face's `imagefolder` and `audiofolder`: files at any depth, and a `metadata.jsonl` with a
`file_name` and a `text` for each where there are captions.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldpruner.errors import DataError
from ldpruner.sound import Wave, read_wav, resampled

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"


def signed(pictures: Tensor) -> Tensor:
    """uint8 pictures scaled to [-1, 1], as judges, and the autoencoders of diffusers, take them."""
    return pictures.float() / 127.5 - 1


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture, of the shape of `(h, w)`, resized by Lanczos; the picture itself where it has that size."""
    return image if image.size == size[::-1] else ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)


def resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 pictures `(n, c, h, w)` at another height and width, each as `fitted` makes it."""
    if tuple(pictures.shape[2:]) == size:
        return pictures
    arrays = pictures.permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]
    return torch.stack([_as_tensor(fitted(image, size)) for image in images])


def _as_tensor(image: Image.Image) -> Tensor:
    """A grey or coloured picture as uint8 `(c, h, w)`."""
    array = np.asarray(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).copy()).permute(2, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The files below a folder, or in a zip of one."""

    path: Path
    names: tuple[str, ...]  # sorted
    read: Callable[[str], bytes]

    @classmethod
    def open(cls, path: Path) -> Folder:
        """List what is there. Raises `DataError` where `path` is neither a folder nor a zip file."""
        path = path.expanduser()
        if path.is_dir():
            names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            return cls(path=path, names=tuple(names), read=lambda name: (path / name).read_bytes())
        try:
            archive = ZipFile(path)
        except (OSError, BadZipFile) as error:
            raise DataError(f"{path}: is neither a folder nor a zip file ({error}).") from error
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        top = _top_folder(names)
        return cls(path=path, names=tuple(name.removeprefix(top) for name in names), read=lambda name: archive.read(top + name))

    def of(self, *suffixes: str) -> list[str]:
        """The files with one of these endings."""
        return [name for name in self.names if name.lower().endswith(suffixes)]

    def metadata(self) -> list[dict[str, Any]]:
        """The entries of `metadata.jsonl`, none where there is no such file. Raises `DataError` where it is damaged."""
        known = set(self.names)
        if METADATA not in known:
            return []
        try:
            entries = [json.loads(line) for line in self._bytes(METADATA).decode().splitlines() if line.strip()]
            absent = [entry["file_name"] for entry in entries if entry["file_name"] not in known]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: {METADATA} cannot be read ({type(error).__name__}: {error}).") from error
        if absent:
            raise DataError(f"{self.path}: {METADATA} names {absent[0]}, which is not there.")
        return entries

    def picture(self, name: str, *, channels: int, size: tuple[int, int]) -> Tensor:
        """One picture as uint8 `(channels, h, w)`: its middle, of the shape of `(h, w)`, resized. Raises `DataError`."""
        try:
            image = Image.open(io.BytesIO(self._bytes(name))).convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: {name} is no picture that can be read ({error}).") from error
        return _as_tensor(fitted(image, size))

    def wave(self, name: str, sample_rate: int) -> Wave:
        """One recording at a sample rate in Hz. Raises `DataError`."""
        return resampled(*read_wav(self._bytes(name), f"{self.path}: {name}"), sample_rate)

    def _bytes(self, name: str) -> bytes:
        try:
            return self.read(name)
        except (OSError, BadZipFile, zlib.error) as error:
            raise DataError(f"{self.path}: {name} cannot be read ({error}).") from error


def _top_folder(names: Sequence[str]) -> str:
    """The folder that all of them lie in, with its slash, where `metadata.jsonl` lies right in it; else nothing."""
    tops = {name.split("/", 1)[0] for name in names}
    top = f"{tops.pop()}/" if len(tops) == 1 else ""
    return top if f"{top}{METADATA}" in names else ""


def in_parts(names: Sequence[str], read: Callable[[str], Tensor], size: int) -> Iterator[Tensor]:
    """What `read` gives for every name, stacked in parts of `size`."""
    for first in range(0, len(names), size):
        yield torch.stack([read(name) for name in names[first : first + size]])
