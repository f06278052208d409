"""How far the denoiser's own output moves, step by step (LAPTOP-Diff, arXiv 2404.11098)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ldpruner.plans import Score
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.shared import scored
from ldpruner.scoring.teacher_forced import answers, mean_squared_error
from ldpruner.surgery import trial
from ldpruner.trajectories import spread_calls


@SCORERS.register("output-mse")
@dataclass(frozen=True, kw_only=True)
class OutputErrorScorer(Scorer):
    """Mean squared error between the outputs of the changed and the original denoiser, one edit at a time.

    Both are given the inputs that the original met at `timesteps` steps of its own trajectory, so errors do not build up
    from step to step. LAPTOP-Diff calls it the output loss criterion and adds the errors of layers up in a knapsack; it
    takes noised training data as inputs, we take generated latents, and leave the choice to the selection (its "ratio"
    is the greedy knapsack). Under guidance the conditional and the unconditional rows count alike.
    Costs `samples x steps` denoiser passes to record, then `(edits + 1) x samples x timesteps`.
    """

    timesteps: int = 4

    def scores(self, asked: Asked) -> Iterator[Score]:
        calls = spread_calls(asked.pipeline, asked.probe, self.timesteps, batch_size=asked.batch_size)
        reference = answers(asked.pipeline.denoiser, calls)
        for edit in asked.mine:
            began = time.perf_counter()
            with trial(asked.pipeline.denoiser, [edit], fitted=asked.fitted) as changed:
                error = mean_squared_error(reference, answers(changed, calls))
            yield scored(edit, error, seconds=time.perf_counter() - began)
