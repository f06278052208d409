"""Judges: small networks that ship beside a zoo pipeline and look at its samples, where Inception and CLIP know nothing.

A judge's folder holds `config.json` (its kind and its class names), `judge.safetensors`, and `reference.safetensors`: what
the judge sees in real data, so that samples can be measured where the data is not at hand.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldpruner.errors import DataError, suggest
from ldpruner.files import write_json

REFERENCE = "reference.safetensors"

Seen = dict[str, Tensor]  # what a network makes of a batch, by name; rows are samples


class Judge(nn.Module):
    """What every judge can do. `classes` are the names that `probabilities` has a column for."""

    classes: tuple[str, ...]
    channels: int

    def observe(self, pictures: Tensor) -> Seen:
        """`features` `(n, d)` and class `probabilities` `(n, classes)` of pictures `(n, c, h, w)` in [-1, 1]; maybe more."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The arguments that build this judge again."""
        raise NotImplementedError


class PictureClassifier(Judge):
    """Class logits of pictures `(n, channels, h, w)` in [-1, 1]; its features are the 128 numbers before them."""

    feature_width = 128

    def __init__(self, *, classes: Sequence[str], channels: int = 1) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.channels = channels
        widths = [(channels, 24, 2), (24, 48, 1), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 128, 2)]
        self.trunk = nn.Sequential(*(_stage(*width) for width in widths))
        self.head = nn.Linear(self.feature_width, len(self.classes))

    def features(self, pictures: Tensor) -> Tensor:
        """What the classifier sees, `(n, 128)`, pooled over the grid."""
        pooled: Tensor = self.trunk(pictures).mean((2, 3))
        return pooled

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(pictures))
        return logits

    def observe(self, pictures: Tensor) -> Seen:
        features = self.features(pictures)
        return {"features": features, "probabilities": self.head(features).softmax(1)}

    def config(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "channels": self.channels}


class CaptionJudge(Judge):
    """A caption-image dual encoder (as CLIP, arXiv 2103.00020), and a head that tells the drawing styles apart by their manner.

    Captions are bags of words: the text side is the mean of word vectors and two layers. Words it has not learnt count for
    nothing. `embeddings` of a picture and of its caption point the same way.
    """

    feature_width = 128

    def __init__(self, *, classes: Sequence[str], words: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.channels = 3
        self.words = {word: number + 1 for number, word in enumerate(words)}  # 0 is padding
        widths = [(3, 32, 2), (32, 48, 1), (48, 64, 2), (64, 96, 1), (96, 96, 2), (96, 128, 1), (128, 128, 2)]
        self.trunk = nn.Sequential(*(_stage(*width) for width in widths))
        self.style = nn.Sequential(
            nn.BatchNorm1d(MANNER, eps=1e-4),  # so that a colour that hardly occurs counts for little
            nn.Dropout(0.2),
            nn.Linear(MANNER, 96),
            nn.ReLU(),
            nn.Dropout(0.4),
            nn.Linear(96, len(self.classes)),
        )
        self.picture_side = nn.Sequential(nn.Linear(self.feature_width * 4, 192), nn.ReLU(), nn.Linear(192, 96))
        self.vectors = nn.Embedding(len(words) + 1, 96, padding_idx=0)
        self.caption_side = nn.Sequential(nn.Linear(96, 192), nn.ReLU(), nn.Linear(192, 96))
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def observe(self, pictures: Tensor) -> Seen:
        grid = self.trunk(pictures)
        return {
            "features": grid.mean((2, 3)),
            "probabilities": self.style(manner(pictures)).softmax(1),
            "embeddings": self._embeddings(grid),
        }

    def embedded(self, pictures: Tensor) -> Tensor:
        """Embeddings of pictures, `(n, 96)`, of length 1."""
        return self._embeddings(self.trunk(pictures))

    def _embeddings(self, grid: Tensor) -> Tensor:
        quarters = F.adaptive_avg_pool2d(grid, 2).flatten(1)  # where things are, roughly, of (n, 128, 4, 4)
        return F.normalize(self.picture_side(quarters), dim=1)

    def describe(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, `(n, 96)`, of length 1."""
        return self.describe_rows(self.rows(captions))

    def describe_rows(self, rows: Tensor) -> Tensor:
        """Embeddings of captions given as word numbers `(n, words)`, padded with 0."""
        counts = (rows > 0).sum(1, keepdim=True).clamp(min=1)
        bag = self.vectors(rows).sum(1) / counts
        return F.normalize(bag + self.caption_side(bag), dim=1)

    def rows(self, captions: Sequence[str]) -> Tensor:
        """Captions as word numbers `(n, words of the longest)`."""
        numbers = [[self.words[word] for word in words_of(caption) if word in self.words] for caption in captions]
        width = max([1, *map(len, numbers)])
        padded = [row + [0] * (width - len(row)) for row in numbers]
        return torch.tensor(padded, dtype=torch.long, device=self.vectors.weight.device)

    def label(self, caption: str) -> int | None:
        """The class that a caption asks for, None where it asks for none: `red apple, google style` names `google`."""
        named = [number for number, name in enumerate(self.classes) if f"{name} style" in caption]
        return named[0] if len(named) == 1 else None

    def config(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "words": list(self.words)}


LEVELS = 8  # of each colour in a palette
STEPS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # how far neighbours differ, of 1
MARGINS = 64  # rows and columns
MANNER = LEVELS**3 + 3 * 2 * len(STEPS) + 2 * len(STEPS) + 2 * MARGINS


def manner(pictures: Tensor) -> Tensor:
    """How pictures `(n, 3, h, w)` in [-1, 1] are drawn, whatever they show: `(n, 688)` numbers in [0, 1].

    The palette, how smooth areas and how hard edges are, and how much of each row and column is not left white.
    """
    colours = (pictures.clamp(-1, 1) + 1) / 2
    drawn = ((0.89 - colours.amin(1)) / 0.08).clamp(0, 1)
    margins = [F.adaptive_avg_pool1d(drawn.mean(side), MARGINS) for side in (1, 2)]
    return torch.cat([_palette(colours), _steps(colours), _edges(colours.mean(1)), *margins], 1)


def _palette(colours: Tensor) -> Tensor:
    """Square roots of the shares of `LEVELS` cubed colours; what lies between levels counts for each by nearness."""
    places = colours.flatten(2) * (LEVELS - 1)
    below = places.floor().clamp(max=LEVELS - 2)
    nearness = torch.stack([1 - (places - below), places - below], 1)  # (n, 2, 3, pixels)
    shares = colours.new_zeros(len(colours), LEVELS**3)
    for red, green, blue in itertools.product((0, 1), repeat=3):
        bins = ((below[:, 0] + red) * LEVELS + below[:, 1] + green) * LEVELS + below[:, 2] + blue
        shares.scatter_add_(1, bins.long(), nearness[:, red, 0] * nearness[:, green, 1] * nearness[:, blue, 2])
    return (shares / places.shape[2]).sqrt()


def _steps(colours: Tensor) -> Tensor:
    """The shares of pixels 1, 2 and 4 apart, along rows and columns, that differ by no more than each of `STEPS`."""
    apart = [(colours[..., far:] - colours[..., :-far], colours[:, :, far:] - colours[:, :, :-far]) for far in (1, 2, 4)]
    most = [difference.abs().amax(1).flatten(1) for pair in apart for difference in pair]
    return torch.stack([(each <= step).float().mean(1) for each in most for step in STEPS], 1)


def _edges(grey: Tensor) -> Tensor:
    """The shares of pixels whose Laplacian is above each of `STEPS`, and below its negative."""
    kernel = grey.new_tensor([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    laplacian = F.conv2d(grey.unsqueeze(1), kernel.view(1, 1, 3, 3)).flatten(1)
    return torch.stack([(sign * laplacian > step).float().mean(1) for sign in (1, -1) for step in STEPS], 1)


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation at their ends."""
    stripped = (word.strip(".,:;!?“”\"'()").lower() for word in caption.split())
    return [word for word in stripped if word]


def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


KINDS: Mapping[str, Callable[..., Judge]] = {"classifier": PictureClassifier, "caption": CaptionJudge}


def save_judge(judge: Judge, folder: Path) -> None:
    """Write a judge as `config.json` and float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, made in KINDS.items() if type(judge) is made)
    write_json(folder / "config.json", {"kind": kind, **judge.config()})
    save_file(_halves(judge.state_dict()), folder / "judge.safetensors")


def load_judge(folder: Path) -> Judge:
    """Read a judge back, as float32 and ready to infer. Raises `DataError` where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.pop("kind")
        if kind not in KINDS:
            raise DataError(f"{folder}: judge of kind {kind!r} is unknown: {suggest(kind, KINDS)}")
        judge = KINDS[kind](**config)
        judge.load_state_dict(load_file(folder / "judge.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: holds no judge that can be read ({' '.join(str(error).split())[:200]}).") from error
    return judge.float().eval()


def save_reference(seen: Seen, folder: Path) -> None:
    """Keep what the judge saw in real data, as float16."""
    save_file(_halves(seen), folder / REFERENCE)


def load_reference(folder: Path) -> Seen:
    """What the judge saw in real data, as float32. Raises `DataError` where nothing was kept."""
    try:
        return {name: tensor.float() for name, tensor in load_file(folder / REFERENCE).items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: keeps no reference ({error}). Give one with --reference DATA.") from error


def _halves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return {name: tensor.contiguous() for name, tensor in halves.items()}


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The share of rows `(n, classes)` whose most likely class is the label."""
    return float((probabilities.argmax(1) == labels).float().mean())
