"""Data that a user brings: pictures with or without captions, and recordings, from a folder or from a zip of one.

The forms are those of Hugging Face's `imagefolder` and `audiofolder`: files at any depth, and a `metadata.jsonl` with a
`file_name` and a `text` for each where there are captions.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldpruner.errors import DataError
from ldpruner.sound import Wave, read_wav, resampled

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The files below a folder, or in a zip of one."""

    path: Path
    names: tuple[str, ...]  # sorted
    read: Callable[[str], bytes]

    @classmethod
    def open(cls, path: Path) -> Folder:
        """List what is there. Raises `DataError` where `path` is neither a folder nor a zip file."""
        if path.is_dir():
            names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            return cls(path=path, names=tuple(names), read=lambda name: (path / name).read_bytes())
        try:
            archive = ZipFile(path)
        except (OSError, BadZipFile) as error:
            raise DataError(f"{path}: is neither a folder nor a zip file ({error}).") from error
        return cls(path=path, names=tuple(sorted(archive.namelist())), read=archive.read)

    def of(self, *suffixes: str) -> list[str]:
        """The files with one of these endings."""
        return [name for name in self.names if name.lower().endswith(suffixes)]

    def metadata(self) -> list[dict[str, Any]]:
        """The entries of `metadata.jsonl`, none where there is no such file. Raises `DataError` where it is damaged."""
        if METADATA not in self.names:
            return []
        try:
            entries = [json.loads(line) for line in self.read(METADATA).decode().splitlines() if line.strip()]
            absent = [entry["file_name"] for entry in entries if entry["file_name"] not in set(self.names)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: {METADATA} cannot be read ({type(error).__name__}: {error}).") from error
        if absent:
            raise DataError(f"{self.path}: {METADATA} names {absent[0]}, which is not there.")
        return entries

    def picture(self, name: str, *, channels: int, size: tuple[int, int]) -> Tensor:
        """One picture as uint8 `(channels, h, w)`, resized to `(h, w)` where it is not of that size. Raises `DataError`."""
        try:
            image = Image.open(io.BytesIO(self.read(name))).convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: {name} is no picture that can be read ({error}).") from error
        if image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.LANCZOS)
        array = np.asarray(image)
        return torch.from_numpy(array.reshape(*array.shape[:2], channels).copy()).permute(2, 0, 1)

    def wave(self, name: str, sample_rate: int) -> Wave:
        """One recording at a sample rate in Hz. Raises `DataError`."""
        return resampled(*read_wav(self.read(name), f"{self.path}: {name}"), sample_rate)


def in_parts(names: Sequence[str], read: Callable[[str], Tensor], size: int) -> Iterator[Tensor]:
    """What `read` gives for every name, stacked in parts of `size`."""
    for first in range(0, len(names), size):
        yield torch.stack([read(name) for name in names[first : first + size]])
