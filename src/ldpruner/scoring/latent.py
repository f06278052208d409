"""The paper's score: how far a change moves the distribution of generated latents (LD-Pruner, arXiv 2404.11936)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldpruner.plans import Score
from ldpruner.probes import Probe
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.teacher_forced import answers, mean_squared_error
from ldpruner.surgery import trial


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


def distances(reference: Tensor, modified: Tensor) -> Tensor:
    """||r_i - m_i||_2 for each sample, `(samples,)`."""
    moved: Tensor = torch.linalg.vector_norm((modified - reference).flatten(1), dim=1)
    return moved


def within_reach(reference: Tensor, modified: Tensor, limit: float) -> Tensor:
    """`modified`, with samples that lie farther than `limit` from their reference drawn up to there."""
    moved = distances(reference, modified)
    share = (limit / moved.clamp(min=limit)).nan_to_num(1.0)
    return reference + (modified - reference) * share.view(-1, *[1] * (reference.dim() - 1))


def tamed(reference: Tensor, modified: Tensor) -> Tensor:
    """`modified`, with no sample farther from its reference than `FAR` times the median of all."""
    limit = FAR * float(distances(reference, modified).median())
    return within_reach(reference, modified, limit) if 0 < limit < math.inf else modified


FAR = 4.0  # times the median movement: what moves farther has become another picture
BROKEN = 1e30  # latents that are not finite: worse than anything, and still a number in JSON


@SCORERS.register("paper")
@dataclass(frozen=True, kw_only=True)
class PaperScorer(Scorer):
    """Full trajectories from shared noise, one edit at a time; an edit that changes nothing scores exactly 0.

    Costs `(edits + 1) x samples x steps` denoiser passes. That the sampler is deterministic and the noise shared is our
    reading of the paper, which says neither. A few samples' shift holds much chance, so a second opinion is taken while the
    edit is made, which no step of a trajectory makes noisier: the root mean squared error of the output for half of the samples,
    at most `watched`, at `timesteps` steps of the original's own trajectory. That is `watched x timesteps` passes more for every
    edit, or fewer. Selections named `error-` and `both-` use it, and with them the sweep.
    """

    watched: int = 8
    timesteps: int = 4

    def cost(self, edits: int, probe: Probe) -> int:
        """Denoiser passes of one sample that so many edits cost; guidance doubles them."""
        whole, few = probe.samples * probe.num_inference_steps, self._few(probe)
        seen = few * min(self.timesteps, probe.num_inference_steps)
        return (edits + 1) * (whole + seen) + few * probe.num_inference_steps

    def _few(self, probe: Probe) -> int:
        return min(math.ceil(probe.samples / 2), self.watched)

    def scores(self, asked: Asked) -> Iterator[Score]:
        original = asked.original
        reference = Statistics.of(original.latents(asked.probe, batch_size=asked.batch_size))
        few = replace(asked.probe, samples=self._few(asked.probe))
        calls = original.spread_calls(few, self.timesteps, batch_size=asked.batch_size)
        known = answers(asked.pipeline.denoiser, calls)
        for edit in asked.mine:
            began = time.perf_counter()
            with torch.inference_mode(), trial(asked.pipeline.denoiser, [edit], fitted=asked.fitted) as changed:
                modified = Statistics.of(asked.pipeline.latents(asked.probe, batch_size=asked.batch_size))
                error = mean_squared_error(known, answers(changed, calls)) ** 0.5
            mean_shift, std_shift = shifts(reference, modified)
            yield Score(
                operator=edit.operator,
                replacement=edit.replacement,
                score=mean_shift + std_shift,
                mean_shift=mean_shift,
                std_shift=std_shift,
                output_error=error if math.isfinite(error) else BROKEN,
                seconds=time.perf_counter() - began,
            )
