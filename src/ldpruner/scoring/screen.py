"""All edits at once, to first order: how far the denoiser's output would move, read from random projections of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldpruner.operators.tracing import Call, tensors_in
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Score
from ldpruner.probes import Probe
from ldpruner.scoring.base import SCORERS
from ldpruner.scoring.gradients import Watch, watched
from ldpruner.scoring.shared import scored_together
from ldpruner.surgery import Fitted
from ldpruner.trajectories import spread_calls


@SCORERS.register("screen")
@dataclass(frozen=True, kw_only=True)
class ScreenScorer:
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

    def scores(
        self, pipeline: Pipeline, edits: Sequence[Edit], probe: Probe, *, fitted: Fitted, batch_size: int | None
    ) -> Iterator[Score]:
        began = time.perf_counter()
        calls = spread_calls(pipeline, probe, self.timesteps, batch_size=batch_size)
        draw, watch, numbers = torch.Generator().manual_seed(probe.seed), Watch.of(edits), 0
        squares = dict.fromkeys(watch.changes, 0.0)
        for call in calls:
            with watched(pipeline.denoiser, edits, watch, fitted=fitted):
                output = _output(call, pipeline)
                numbers += output.numel()
                for _ in range(self.projections):
                    watch.reset()
                    output.backward(_normal(output, draw), retain_graph=True)  # type: ignore[no-untyped-call]
                    for key, change in watch.changes.items():
                        squares[key] += float(change.square().sum()) / self.projections
        values = {key: (square / numbers) ** 0.5 for key, square in squares.items()}
        yield from scored_together(edits, values, seconds=time.perf_counter() - began)


def _output(call: Call, pipeline: Pipeline) -> Tensor:
    return tensors_in(call.run(pipeline.denoiser))[0]


def _normal(like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw).to(device=like.device, dtype=like.dtype)
