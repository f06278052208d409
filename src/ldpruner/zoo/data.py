"""Pictures from a folder, as one tensor: MNIST-style idx.gz files, or an image folder with one sub-folder per class."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldpruner.errors import DataError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Grey pictures `(n, 1, 32, 32)` as uint8, and their class numbers `(n,)`."""

    images: Tensor
    labels: Tensor


def load_pictures(folder: Path, split: str) -> Pictures:
    """Read the `train` or `test` pictures of `folder`, 32x32 and grey (28x28 ones get a border of 2).

    Takes either `{train,t10k}-images-idx3-ubyte.gz` with its labels, or `{train,test}/<class>/*.png`. Raises `DataError`.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    idx = folder / f"{prefix}-images-idx3-ubyte.gz"
    if idx.exists():
        return Pictures(
            images=_to_32(_read_idx(idx).unsqueeze(1)), labels=_read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").long()
        )
    if (folder / split).is_dir():
        return _read_image_folder(folder / split)
    raise DataError(f"{folder}: no {split} pictures. Give a folder with {idx.name} and its labels, or with {split}/<class>/*.png.")


def _read_idx(path: Path) -> Tensor:
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    dimensions = raw[3]
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())


def _read_image_folder(folder: Path) -> Pictures:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    pairs = [
        (file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir()) if file.suffix.lower() in _SUFFIXES
    ]
    if not pairs:
        raise DataError(f"{folder}: no pictures. Expected <class>/*.png.")
    arrays = [np.asarray(Image.open(file).convert("L").resize((32, 32))) for file, _ in pairs]
    return Pictures(images=torch.from_numpy(np.stack(arrays)).unsqueeze(1), labels=torch.tensor([label for _, label in pairs]))


def _to_32(images: Tensor) -> Tensor:
    border = (32 - images.shape[-1]) // 2
    return F.pad(images, (border,) * 4)
