"""In which order replacements are accepted until a budget is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ldpruner.errors import RunError, UnknownNameError, suggest
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
Value = Callable[[Option], float]

RANKINGS: Registry[Ranking] = Registry("selection")


def shift(option: Option) -> float:
    """The score that the run's method gave."""
    return max(option.score.score, 0.0)


def error(option: Option) -> float:
    """The root mean squared error of the denoiser's output. Raises `RunError` where the run holds none."""
    if option.score.output_error is None:
        raise RunError("these scores hold no output error: the paper's scorer measures it (`--method paper`). Score again.")
    return option.score.output_error


def both(option: Option) -> float:
    """The geometric mean of the two: they err for different reasons."""
    return math.sqrt(shift(option) * error(option))


def _lowest(value: Value) -> Ranking:
    """The lowest value first; of equal ones, what saves more. By score it is the paper's order (LD-Pruner, arXiv 2404.11936)."""

    def rank(options: Sequence[Option], quantity: Quantity) -> list[Option]:
        return sorted(options, key=lambda option: (value(option), -option.saves[quantity], option.score.key))

    return rank


def _per_saving(value: Value, power: float) -> Ranking:
    """The lowest value^power per unit saved first.

    With power 1 this is the greedy rule for a knapsack whose values are scores (Dantzig, 1957). Errors that know nothing of each
    other add up by their squares, which is power 2; the higher the power, the nearer to the order of values. Ours.
    """

    def rank(options: Sequence[Option], quantity: Quantity) -> list[Option]:
        def cost(option: Option) -> float:
            return float(value(option) ** power) / option.saves[quantity]

        return sorted(options, key=lambda option: (cost(option), -option.saves[quantity], option.score.key))

    return rank


SECOND = ("error-", "both-")  # before the names of rankings that need the output error
for _prefix, _value in {"": shift, "error-": error, "both-": both}.items():
    RANKINGS.register(f"{_prefix}order")(_lowest(_value))
    RANKINGS.register(f"{_prefix}ratio")(_per_saving(_value, 1.0))
    for _power in (1.25, 1.5, 2.0, 3.0):
        RANKINGS.register(f"{_prefix}power-{_power:g}")(_per_saving(_value, _power))

SWEEP = "sweep"  # plans by every ranking; the one with the least joint latent shift is taken


def rankings_of(selection: str, scores: Iterable[Score] = ()) -> tuple[str, ...]:
    """The rankings that a selection tries on scores. Raises `UnknownNameError` with the nearest known name."""
    if selection == SWEEP:
        whole = all(entry.output_error is not None for entry in scores)
        return tuple(name for name in RANKINGS if whole or not name.startswith(SECOND))
    if selection not in RANKINGS:
        raise UnknownNameError(f"selection {selection!r} is unknown: {suggest(selection, [*RANKINGS, SWEEP])}")
    return (selection,)
