"""In which order replacements are accepted until a budget is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ldpruner.plans import Candidate, Operator, Quantity, Score
from ldpruner.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Option:
    """One replacement of one operator, what it does to the latents, and the share of each quantity that it saves."""

    operator: Operator
    candidate: Candidate
    score: Score
    saves: dict[Quantity, float]


Ranking = Callable[[Sequence[Option], Quantity], list[Option]]

RANKINGS: Registry[Ranking] = Registry("selection")


@RANKINGS.register("order")
def order(options: Sequence[Option], quantity: Quantity) -> list[Option]:
    """The paper's order: lowest score first (LD-Pruner, arXiv 2404.11936); of equal scores, what saves more."""
    return sorted(options, key=lambda option: (option.score.score, -option.saves[quantity], option.score.key))


@RANKINGS.register("ratio")
def ratio(options: Sequence[Option], quantity: Quantity) -> list[Option]:
    """The lowest score per unit saved first: the greedy rule for a knapsack (Dantzig, 1957)."""
    return sorted(
        options, key=lambda option: (option.score.score / option.saves[quantity], -option.saves[quantity], option.score.key)
    )
