"""Small classifiers that measure the zoo's samples: their features carry the Fréchet distance, their classes the balance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class GreyClassifier(nn.Module):
    """Class logits `(n, classes)` of grey pictures `(n, 1, 32, 32)` in [-1, 1]; `features` gives the `(n, 128)` before them."""

    feature_width = 128

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        widths = [(1, 24, 2), (24, 48, 1), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 128, 2)]
        self.trunk = nn.Sequential(*(_stage(*width) for width in widths))
        self.head = nn.Linear(self.feature_width, classes)

    def features(self, images: Tensor) -> Tensor:
        """What the classifier sees, `(n, 128)`, pooled over the grid."""
        pooled: Tensor = self.trunk(images).mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def save_judge(judge: GreyClassifier, path: Path) -> None:
    """Write the weights as float16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in judge.state_dict().items()}
    save_file(halves, path)


def load_judge(path: Path) -> GreyClassifier:
    """Read a judge back, as float32 and ready to infer."""
    weights = load_file(path)
    judge = GreyClassifier(classes=weights["head.bias"].shape[0])
    judge.load_state_dict(weights)
    return judge.float().eval()


@torch.inference_mode()
def judge_features(judge: GreyClassifier, batches: Iterator[Tensor]) -> Tensor:
    """The features of every batch of pictures, stacked to `(n, 128)`."""
    return torch.cat([judge.features(batch) for batch in batches])


@torch.inference_mode()
def accuracy(judge: GreyClassifier, images: Tensor, labels: Tensor) -> float:
    """The share of pictures `(n, 1, 32, 32)` whose most likely class is the label."""
    hits = [judge(part).argmax(1) == true for part, true in zip(torch.split(images, 500), torch.split(labels, 500), strict=True)]
    return float(torch.cat(hits).float().mean())
