"""What a selection goes by: an order in which replacements are accepted until a budget is met, or a sum to be made small."""

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


Value = Callable[[Option], float]
Ranking = Callable[[Sequence[Option], Quantity], list[Option]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The sum of value^power, to be made as small as the budgets allow.

    With power 1 harms add up, with 2 they do as errors that know nothing of each other; the higher the power, the more the worst
    one counts, and the nearer it comes to the order of values.
    """

    value: Value
    power: float


RANKINGS: Registry[Ranking] = Registry("selection")
OBJECTIVES: Registry[Objective] = Registry("selection")


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


def _per_saving(value: Value) -> Ranking:
    """The lowest value per unit saved first, the greedy rule for a knapsack whose values are scores (Dantzig, 1957)."""

    def rank(options: Sequence[Option], quantity: Quantity) -> list[Option]:
        def cost(option: Option) -> float:
            return value(option) / option.saves[quantity]

        return sorted(options, key=lambda option: (cost(option), -option.saves[quantity], option.score.key))

    return rank


SECOND = ("error-", "both-")  # before the names of selections that need the output error
for _prefix, _value in {"": shift, "error-": error, "both-": both}.items():
    RANKINGS.register(f"{_prefix}order")(_lowest(_value))
    RANKINGS.register(f"{_prefix}ratio")(_per_saving(_value))
    for _name, _power in {"exact": 1.0, "exact-2": 2.0, "exact-3": 3.0}.items():
        OBJECTIVES.register(f"{_prefix}{_name}")(Objective(value=_value, power=_power))

SWEEP = "sweep"  # a plan by every objective and every order; the one with the least joint latent shift is taken
IMPROVED = "improved"  # the same, and that plan improved, see `improving`


def selections_of(selection: str, scores: Iterable[Score] = ()) -> tuple[str, ...]:
    """What a selection tries on scores. Raises `UnknownNameError` with the nearest known name."""
    if selection in (SWEEP, IMPROVED):
        whole = all(entry.output_error is not None for entry in scores)
        names = [name for name in RANKINGS if name.endswith("order")] + list(OBJECTIVES)
        return tuple(name for name in names if whole or not name.startswith(SECOND))
    known = [*RANKINGS, *OBJECTIVES]
    if selection not in known:
        raise UnknownNameError(f"selection {selection!r} is unknown: {suggest(selection, [*known, SWEEP, IMPROVED])}")
    return (selection,)
