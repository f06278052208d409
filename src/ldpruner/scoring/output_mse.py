"""How far the denoiser's own output moves, step by step (LAPTOP-Diff, arXiv 2404.11098)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Score
from ldpruner.probes import Probe
from ldpruner.scoring.base import SCORERS
from ldpruner.scoring.shared import scored
from ldpruner.scoring.teacher_forced import answers, mean_squared_error
from ldpruner.surgery import Fitted, trial
from ldpruner.trajectories import spread_calls


@SCORERS.register("output-mse")
@dataclass(frozen=True, kw_only=True)
class OutputErrorScorer:
    """Mean squared error between the outputs of the changed and the original denoiser, one edit at a time.

    Both are given the inputs that the original met at `timesteps` steps of its own trajectory, so errors do not build up
    from step to step. LAPTOP-Diff calls it the output loss criterion and adds the errors of layers up in a knapsack; it
    takes noised training data as inputs, we take generated latents, and leave the choice to the selection (its "ratio"
    is the greedy knapsack). Under guidance the conditional and the unconditional rows count alike.
    Costs `samples x steps` denoiser passes to record, then `(edits + 1) x samples x timesteps`.
    """

    timesteps: int = 4

    def scores(
        self, pipeline: Pipeline, edits: Sequence[Edit], probe: Probe, *, fitted: Fitted, batch_size: int | None
    ) -> Iterator[Score]:
        calls = spread_calls(pipeline, probe, self.timesteps, batch_size=batch_size)
        reference = answers(pipeline.denoiser, calls)
        for edit in edits:
            began = time.perf_counter()
            with trial(pipeline.denoiser, [edit], fitted=fitted) as changed:
                error = mean_squared_error(reference, answers(changed, calls))
            yield scored(edit, error, seconds=time.perf_counter() - began)
