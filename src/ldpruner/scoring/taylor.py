"""First-order Taylor expansion of the denoising loss (Molchanov et al., arXiv 1611.06440 and 1906.10771)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ldpruner.plans import Score
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.gradients import first_order
from ldpruner.scoring.shared import scored_together


@SCORERS.register("taylor")
@dataclass(frozen=True, kw_only=True)
class TaylorScorer(Scorer):
    """|sum over timesteps of <dL_t/dy, y' - y>|: how much the loss would change, to first order, if y' took the place of y.

    L_t is the denoising loss at `timesteps` spread timesteps on generated latents, y an operator's output and y' its
    stand-in's. Diff-Pruning (arXiv 2305.10924) has Taylor pruning as a baseline. The sources multiply weights by their
    gradients, channel by channel; whole operators are replaced here and not only zeroed, so we multiply the gradient of
    the output by its change. For a linear map replaced by zero the two are equal, |sum(w dL/dw)|.
    Costs `samples x steps` denoiser passes for clean latents and `samples x timesteps` forward and backward passes for all
    edits together. Raises `PipelineError` where no denoising loss is known, see `denoising.questions`.
    """

    timesteps: int = 20

    def scores(self, asked: Asked) -> Iterator[Score]:
        began = time.perf_counter()
        found = first_order(asked, timesteps=self.timesteps)
        values = {key: abs(sum(changes)) for key, changes in found.changes.items()}
        yield from scored_together(asked.edits, values, seconds=time.perf_counter() - began)
