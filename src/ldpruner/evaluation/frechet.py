"""Fréchet distance between two sets of features (Heusel et al., arXiv 1706.08500), in the features of any network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldpruner.errors import DataError
from ldpruner.evaluation.base import Estimate, Evidence, Metric, Stream, length, register

LATENT_NUMBERS = 2048  # a covariance of more takes more memory than a small machine has


class _Given(nn.Module):
    """Hands features through: torchmetrics asks for a network, and ours has seen the samples already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Stream, generated: Stream) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of features `(n, width)`; 0 is equal, and fewer samples raise it.

    Torchmetrics does the sums, in float64. Raises `DataError` where it is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise DataError("the Fréchet distance needs torchmetrics: pip install 'ldpruner[metrics]'.") from error
    metric = None
    for stream, is_real in ((real, True), (generated, False)):
        for part in stream():
            metric = metric or FrechetInceptionDistance(feature=_Given(part.shape[1]), normalize=True).set_dtype(torch.float64)
            metric.update(part.double(), real=is_real)
    assert metric is not None
    return float(metric.compute())


def _of_features(evidence: Evidence) -> Estimate:
    real, generated = evidence.reference["features"], evidence.samples["features"]
    width, fewest = next(generated()).shape[1], min(length(real), length(generated))
    note = f"fewer samples than the {width} features: compare at equal counts only" if fewest <= width else None
    return Estimate(value=frechet_distance(real, generated), note=note)


def _of_latents(evidence: Evidence) -> Estimate:
    value = frechet_distance(_flat(evidence.original["latents"]), _flat(evidence.samples["latents"]))
    shape = next(evidence.samples["latents"]()).shape[1:]
    return Estimate(value=value, note=f"averaged down from {shape.numel()} numbers" if shape.numel() > LATENT_NUMBERS else None)


def _flat(latents: Stream) -> Stream:
    """Latents as rows of at most 2,048 numbers: of larger ones neighbours are averaged, along the longest side first."""

    def stream() -> Iterator[Tensor]:
        for part in latents():
            pooled = part.float()
            while pooled[0].numel() > LATENT_NUMBERS:
                pooled = _halved(pooled, max(range(1, pooled.ndim), key=pooled.size))
            yield pooled.flatten(1)

    return stream


def _halved(values: Tensor, side: int) -> Tensor:
    """Neighbours along one side averaged in twos."""
    moved = values.movedim(side, -1)
    pooled = F.adaptive_avg_pool1d(moved.flatten(0, -2), (moved.shape[-1] + 1) // 2)
    return pooled.reshape(*moved.shape[:-1], -1).movedim(-1, side)


register(
    Metric(
        name="frechet",
        torchmetrics=True,
        title="Fréchet distance",
        source="arXiv 1706.08500; FID with Inception's features, FAD (arXiv 1812.08466) with those of sound",
        better="lower",
        needs=("features", "reference"),
        measure=_of_features,
    )
)
register(
    Metric(
        name="latent-frechet",
        torchmetrics=True,
        title="Fréchet distance of latents",
        source="arXiv 1706.08500, on latents, averaged down to 2,048 numbers where they are more",
        better="lower",
        needs=("latents", "original"),
        measure=_of_latents,
    )
)
