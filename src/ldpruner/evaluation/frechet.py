"""Fréchet distance between two sets of features (Heusel et al., arXiv 1706.08500), in the features of any network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldpruner.errors import DataError


class _Given(nn.Module):
    """Hands features through: torchmetrics asks for a network, and ours has seen the pictures already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of features `(n, width)`; 0 is equal, and fewer samples raise it.

    Torchmetrics does the sums, in float64. Raises `DataError` where it is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise DataError("the Fréchet distance needs torchmetrics: pip install 'ldpruner[zoo]'.") from error
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), normalize=True).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())
