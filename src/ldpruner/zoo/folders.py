"""What the zoo trains on: emoji with captions and styles, and spoken digits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldpruner.datasets import Folder
from ldpruner.errors import DataError
from ldpruner.sound import Wave

_DIGIT = re.compile(r"(?:.*/)?(\d)_([^_/]+)_(\d+)\.wav")


@dataclass(frozen=True, kw_only=True)
class CaptionedPictures:
    """Colour pictures `(n, 3, 64, 64)` as uint8, with a text, a style and a split for each."""

    images: Tensor
    texts: tuple[str, ...]
    styles: tuple[str, ...]
    splits: tuple[str, ...]

    @property
    def captions(self) -> list[str]:
        """What each picture is prompted by: `red apple, google style`."""
        return [f"{text}, {style} style" for text, style in zip(self.texts, self.styles, strict=True)]

    def of(self, split: str) -> CaptionedPictures:
        """The pictures of one split, `train` or `test`."""
        return self.take([row for row, name in enumerate(self.splits) if name == split])

    def take(self, rows: list[int]) -> CaptionedPictures:
        """These rows, in this order."""
        return CaptionedPictures(
            images=self.images[rows],
            texts=tuple(self.texts[row] for row in rows),
            styles=tuple(self.styles[row] for row in rows),
            splits=tuple(self.splits[row] for row in rows),
        )


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """Mono waves in [-1, 1], with the digit that is spoken in each and the number of the take."""

    waves: tuple[Wave, ...]
    digits: Tensor
    takes: Tensor


def load_captioned(path: Path) -> CaptionedPictures:
    """Read an image folder, or a zip of one, whose `metadata.jsonl` has `text`, `style` and `split`. Raises `DataError`."""
    folder = Folder.open(path)
    entries = folder.metadata()
    wanted = ("file_name", "text", "style", "split")
    lacking = [key for key in wanted if not entries or any(key not in entry for entry in entries)]
    if lacking:
        raise DataError(f"{path}: metadata.jsonl lacks {lacking[0]}. Every line must have {', '.join(wanted)}.")
    images = torch.stack([folder.picture(entry["file_name"], channels=3, size=(64, 64)) for entry in entries])
    texts, styles, splits = (tuple(str(entry[key]) for entry in entries) for key in wanted[1:])
    return CaptionedPictures(images=images, texts=texts, styles=styles, splits=splits)


def load_recordings(path: Path, sample_rate: int) -> Recordings:
    """Read every `{digit}_{speaker}_{take}.wav` below a folder, or in a zip, at a sample rate in Hz. Raises `DataError`."""
    folder = Folder.open(path)
    found = sorted((match[2], int(match[1]), int(match[3]), name) for name in folder.names if (match := _DIGIT.fullmatch(name)))
    if not found:
        raise DataError(f"{path}: no recordings. Expected files named {{digit}}_{{speaker}}_{{take}}.wav.")
    return Recordings(
        waves=tuple(folder.wave(name, sample_rate) for *_, name in found),
        digits=torch.tensor([digit for _, digit, _, _ in found]),
        takes=torch.tensor([take for _, _, take, _ in found]),
    )
