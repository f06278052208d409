"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991): how much of each set lies within the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ldpruner.evaluation.base import Estimate, Evidence, Metric, Stream, register, rows

NEIGHBOURS = 3


def share_within(manifold: Stream, asked: Stream, *, neighbours: int = NEIGHBOURS) -> float:
    """The share of `asked` `(n, d)` that lies within the manifold of `manifold` `(m, d)`.

    The manifold is the union of balls around its points, each as wide as the distance to the point's k-th nearest
    neighbour. Precision asks samples about the reference's manifold, recall the reference about the samples'.
    """
    radii = [_radii(part, manifold, neighbours) for part in rows(manifold)]
    inside = total = 0
    for part in rows(asked):
        hit = torch.zeros(len(part), dtype=torch.bool)
        for centres, radius in zip(rows(manifold), radii, strict=True):
            hit |= (torch.cdist(part.double(), centres.double()) <= radius).any(1)
        inside, total = inside + int(hit.sum()), total + len(part)
    return inside / total


def _radii(part: Tensor, manifold: Stream, neighbours: int) -> Tensor:
    nearest = torch.full((len(part), neighbours + 1), float("inf"), dtype=torch.float64)
    for others in rows(manifold):
        seen = torch.cat([nearest, torch.cdist(part.double(), others.double())], dim=1)
        nearest = seen.topk(neighbours + 1, largest=False).values  # the nearest of all is the point itself
    return nearest[:, -1]


def _precision(evidence: Evidence) -> Estimate:
    return Estimate(value=share_within(evidence.reference["features"], evidence.samples["features"]))


def _recall(evidence: Evidence) -> Estimate:
    return Estimate(value=share_within(evidence.samples["features"], evidence.reference["features"]))


for _name, _measure, _what in (
    ("precision", _precision, "samples within the reference's manifold"),
    ("recall", _recall, "reference within the samples' manifold"),
):
    register(
        Metric(
            name=_name,
            title=f"{_name.capitalize()} (k = {NEIGHBOURS})",
            source=f"arXiv 1904.06991: share of the {_what}",
            better="higher",
            needs=("features", "reference"),
            measure=_measure,
            minimum=NEIGHBOURS + 1,
        )
    )
