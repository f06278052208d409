"""In which order replacements are accepted until a budget is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ldpruner.errors import UnknownNameError, suggest
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


def _per_saving(power: float) -> Ranking:
    """The lowest score^power per unit saved first.

    With power 1 this is the greedy rule for a knapsack whose values are scores (Dantzig, 1957). Errors that know nothing of each
    other add up by their squares, which is power 2; the higher the power, the nearer to the paper's order. Ours.
    """

    def rank(options: Sequence[Option], quantity: Quantity) -> list[Option]:
        def cost(option: Option) -> float:
            return float(max(option.score.score, 0.0) ** power) / option.saves[quantity]

        return sorted(options, key=lambda option: (cost(option), -option.saves[quantity], option.score.key))

    return rank


RANKINGS.register("ratio")(_per_saving(1.0))
for _power in (1.25, 1.5, 2.0, 3.0):
    RANKINGS.register(f"power-{_power:g}")(_per_saving(_power))

SWEEP = "sweep"  # a plan by each ranking; the one with the least joint latent shift is taken


def rankings_of(selection: str) -> tuple[str, ...]:
    """The rankings that a selection tries. Raises `UnknownNameError` with the nearest known name."""
    if selection == SWEEP:
        return tuple(RANKINGS)
    if selection not in RANKINGS:
        raise UnknownNameError(f"selection {selection!r} is unknown: {suggest(selection, [*RANKINGS, SWEEP])}")
    return (selection,)
