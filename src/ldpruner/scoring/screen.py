"""All edits at once, to first order: how far the denoiser's output would move, read from random projections of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldpruner.operators.tracing import Call
from ldpruner.operators.watching import tensors_in
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Score
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.gradients import Watch, watched
from ldpruner.scoring.ledger import Key
from ldpruner.scoring.shared import scored_together
from ldpruner.scoring.teacher_forced import steered
from ldpruner.trajectories import spread_calls


@SCORERS.register("screen")
@dataclass(frozen=True, kw_only=True)
class ScreenScorer(Scorer):
    """The root mean square, over the numbers of an output and over calls, of J (y' - y), the output's change to first order.

    y is an operator's output, y' its stand-in's for the same input, J the Jacobian of the denoiser's output by y. Both are taken
    where the original is at `timesteps` steps of its own trajectory. For v drawn from N(0, I), E[(v^T J (y' - y))^2] is
    ||J (y' - y)||^2 (Hutchinson's estimator), and one backward pass from v gives v^T J for every operator; `projections` are
    averaged. Each sample has a v of its own and counts by itself wherever an operator's output has a row for each.
    The gate is ours: an operator's replacement is blended in, and the blend is taken at nought. Costs `samples x steps` denoiser
    passes to record, then `samples x timesteps` forward and `projections` times as many backward passes, for all edits together;
    for memory see `gradients.first_order`.
    """

    timesteps: int = 5
    projections: int = 4

    def scores(self, asked: Asked) -> Iterator[Score]:
        began = time.perf_counter()
        calls = spread_calls(asked.pipeline, asked.probe, self.timesteps, batch_size=asked.batch_size)
        values = screened(asked, calls, projections=self.projections)
        yield from scored_together(asked.edits, values, seconds=time.perf_counter() - began)


def screened(asked: Asked, calls: Sequence[Call], *, projections: int, guidance_scale: float | None = None) -> dict[Key, float]:
    """The screen's value of every edit, see `ScreenScorer`, on calls that the original made; for the scale see `steered`."""
    draw, watch, numbers = torch.Generator().manual_seed(asked.probe.seed), Watch.of(asked.edits), 0
    squares = dict.fromkeys(watch.changes, 0.0)
    for call in calls:
        with watched(asked.pipeline.denoiser, asked.edits, watch, fitted=asked.fitted):
            output = steered(_output(call, asked.pipeline), call, guidance_scale)
            numbers += output.numel()
            for number in range(projections):
                watch.reset()
                more = number + 1 < projections
                output.backward(_normal(output, draw), retain_graph=more)  # type: ignore[no-untyped-call]
                for key, change in watch.changes.items():
                    squares[key] += float(change.square().sum()) / projections
    return {key: (square / numbers) ** 0.5 for key, square in squares.items()}


def _output(call: Call, pipeline: Pipeline) -> Tensor:
    return tensors_in(call.run(pipeline.denoiser))[0]


def _normal(like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw).to(device=like.device, dtype=like.dtype)
