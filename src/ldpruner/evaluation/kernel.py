"""Kernel distances between two sets of features: KID's unbiased estimate, and CMMD."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from ldpruner.evaluation.base import Estimate, Evidence, Metric, Stream, length, register, rows

BLOCKS = 10  # at least, for a standard error
BLOCK = 250  # samples in one of them, at most
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0


def kernel_distance(real: Stream, generated: Stream, *, blocks: int | None = None) -> Estimate:
    """Squared MMD with the kernel (x.y / d + 1)^3, unbiased (KID, Binkowski et al., arXiv 1801.01401), of features `(n, d)`.

    The mean over disjoint blocks of both sets, and its standard error: blocks that share no sample err independently, where
    the usual KID draws overlapping subsets, whose spread is no standard error. Streams must be in no particular order. Below
    20 samples there is one block, and no error. May be negative, as it is unbiased.
    """
    counts = length(real), length(generated)
    number = blocks or (max(BLOCKS, -(-min(counts) // BLOCK)) if min(counts) >= 2 * BLOCKS else 1)
    parts = zip(rows(real, counts[0] // number), rows(generated, counts[1] // number), strict=False)
    estimates = [unbiased_mmd2(first.double(), second.double()) for first, second in itertools.islice(parts, number)]
    error = statistics.stdev(estimates) / math.sqrt(number) if number > 1 else None
    return Estimate(value=statistics.fmean(estimates), error=error)


def unbiased_mmd2(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of squared MMD between features `(m, d)` and `(n, d)` with KID's cubic kernel."""
    width = first.shape[1]

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.T / width + 1) ** 3

    def within(each: Tensor) -> Tensor:
        similar = kernel(each, each)
        return (similar.sum() - similar.diagonal().sum()) / (len(each) * (len(each) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def cmmd(real: Stream, generated: Stream) -> float:
    """1000 x squared MMD of unit vectors `(n, d)`, Gaussian kernel of width 10, diagonal included (arXiv 2401.09603)."""

    def mean(left: Stream, right: Stream) -> float:
        total = sum(float(torch.exp(-torch.cdist(a.double(), b.double()).square() / (2 * CMMD_BANDWIDTH**2)).sum())
                    for a in rows(left) for b in rows(right))  # fmt: skip
        return total / (length(left) * length(right))

    return CMMD_SCALE * (mean(real, real) + mean(generated, generated) - 2 * mean(real, generated))


def _on(name: str, measure: Callable[[Stream, Stream], float]) -> Callable[[Evidence], Estimate]:
    return lambda evidence: Estimate(value=measure(evidence.reference[name], evidence.samples[name]))


register(
    Metric(
        name="kernel",
        title="Kernel distance",
        source="arXiv 1801.01401; KID with Inception's features",
        better="lower",
        needs=("features", "reference"),
        measure=lambda evidence: kernel_distance(evidence.reference["features"], evidence.samples["features"]),
        minimum=4,
    )
)
register(
    Metric(
        name="cmmd",
        title="CMMD",
        source="arXiv 2401.09603; the published one with CLIP ViT-L/14 at 336 pixels",
        better="lower",
        needs=("embeddings", "reference"),
        measure=_on("embeddings", cmmd),
    )
)
