"""Taylor expansion over the timesteps that matter (Diff-Pruning, arXiv 2305.10924)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ldpruner.errors import RunError
from ldpruner.plans import Score
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.gradients import FirstOrder, first_order
from ldpruner.scoring.ledger import Key
from ldpruner.scoring.shared import scored_together


@SCORERS.register("diff-pruning")
@dataclass(frozen=True, kw_only=True)
class DiffPruningScorer(Scorer):
    """|sum of <dL_t/dy, y' - y> over the timesteps t with L_t / max L > threshold|; for y and y' see `taylor`.

    The paper's importance is |w x the sum of those timesteps' gradients|, summed over the weights of a channel group;
    `threshold` is its T, 0.05 in its published command for CIFAR-10. That code goes up from timestep 0 and ends at the
    first loss below the threshold, over all 1000 timesteps; we read the formula as it stands, on `timesteps` spread ones,
    with generated latents for data. A threshold of 0 is `taylor`. Costs what `taylor` costs.
    """

    timesteps: int = 20
    threshold: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise RunError(f"threshold={self.threshold}: a loss is compared with the largest one, so give 0 or more, below 1.")

    def scores(self, asked: Asked) -> Iterator[Score]:
        began = time.perf_counter()
        found = first_order(asked, timesteps=self.timesteps)
        yield from scored_together(asked.edits, above(found, self.threshold), seconds=time.perf_counter() - began)


def above(found: FirstOrder, threshold: float) -> dict[Key, float]:
    """|sum of changes| over the timesteps t with L_t > threshold x max L."""
    worst = max(found.losses)
    kept = [not loss <= threshold * worst for loss in found.losses]  # a loss that is no number stays in, and shows
    return {key: abs(sum(c for c, keep in zip(changes, kept, strict=True) if keep)) for key, changes in found.changes.items()}
