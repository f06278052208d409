"""The paper's score: how far a change moves the distribution of generated latents (LD-Pruner, arXiv 2404.11936)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Score
from ldpruner.probes import Probe
from ldpruner.scoring.base import SCORERS
from ldpruner.surgery import Fitted, trial


@dataclass(frozen=True)
class Statistics:
    """Mean and unbiased standard deviation of latents `(samples, ...)` over dim 0, the samples."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> Statistics:
        return cls(latents.mean(0), latents.std(0))


def latent_shift(reference: Tensor, modified: Tensor) -> float:
    """||mean(r) - mean(m)||_2 + ||std(r) - std(m)||_2 of latents `(samples, ...)`, statistics over dim 0 (LD-Pruner)."""
    return sum(shifts(Statistics.of(reference), Statistics.of(modified)))


def shifts(reference: Statistics, modified: Statistics) -> tuple[float, float]:
    """The two terms of the score: the distances of means and of standard deviations. Latents that are not finite are `BROKEN`."""
    mean, std = float(torch.dist(reference.mean, modified.mean)), float(torch.dist(reference.std, modified.std))
    return (mean, std) if math.isfinite(mean + std) else (BROKEN, BROKEN)


BROKEN = 1e30  # latents that are not finite: worse than anything, and still a number in JSON


@SCORERS.register("paper")
@dataclass(frozen=True, kw_only=True)
class PaperScorer:
    """Full trajectories from shared noise, one edit at a time; an edit that changes nothing scores exactly 0.

    Costs `(edits + 1) x samples x steps` denoiser passes. That the sampler is deterministic and the noise shared is our
    reading of the paper, which says neither.
    """

    def scores(
        self, pipeline: Pipeline, edits: Sequence[Edit], probe: Probe, *, fitted: Fitted, batch_size: int | None
    ) -> Iterator[Score]:
        reference = Statistics.of(pipeline.latents(probe, batch_size=batch_size))
        for edit in edits:
            began = time.perf_counter()
            with trial(pipeline.denoiser, [edit], fitted=fitted):
                modified = Statistics.of(pipeline.latents(probe, batch_size=batch_size))
            mean_shift, std_shift = shifts(reference, modified)
            yield Score(
                operator=edit.operator,
                replacement=edit.replacement,
                score=mean_shift + std_shift,
                mean_shift=mean_shift,
                std_shift=std_shift,
                seconds=time.perf_counter() - began,
            )
