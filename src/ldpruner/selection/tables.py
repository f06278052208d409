"""What each budget would cost, from scores alone: nothing is measured, and no model is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldpruner.errors import BudgetError, OperatorError, RunError, UnknownNameError, suggest
from ldpruner.plans import Edit, Operators, Quantity, Score
from ldpruner.runs import Scored
from ldpruner.selection.choice import FREE, choose
from ldpruner.selection.priors import Priors
from ldpruner.selection.rankings import IMPROVED, SWEEP, selections_of

SHIFTS = ("fast", "paper")  # the methods whose scores are latent shifts
SELECTION = "exact-2"  # the least `joint_shift` that a budget allows
SHARES = tuple(percent / 100 for percent in range(95, 35, -5))
LIKELY = (0.87, 1.75)  # measured joint shift / `joint_shift`: four fifths of the 69 plans that we measured lie between, median 1.06


@dataclass(frozen=True, kw_only=True)
class Row:
    """One budget: what a plan under it is predicted to leave, and to do to the latents."""

    target: float  # the share of the original that the budget allows
    predicted: Mapping[Quantity, float]  # the share of each quantity that is left
    edits: int  # those of dead operators included
    joint_shift: float  # of all edits together
    likely: tuple[float, float]  # where measured joint shifts mostly lie, see `LIKELY`
    exhausted: bool  # whether the target is out of reach: then the rest is of the plan that comes nearest


def joint_shift(edits: Iterable[Edit]) -> float:
    """sqrt(s_1^2 + s_2^2 + ...): how far edits would move the latents together, from how far each moves them alone, s.

    Errors that know nothing of each other add up as squares. That latent shifts nearly do is a measurement of ours, no theorem:
    the plans were of three small pipelines, by all methods, at 80, 65 and 50 % of the latency, before repair.
    """
    return math.hypot(*(edit.score for edit in edits if edit.score is not None))


def price_table(
    operators: Operators,
    scores: Sequence[Score],
    *,
    quantity: Quantity = "latency",
    selection: str = SELECTION,
    shares: Sequence[float] = SHARES,
    priors: Priors = FREE,
) -> list[Row]:
    """One row for each share of the original's `quantity` that a budget may allow.

    `scores` have to be latent shifts; `priced` sees to that. What only dies with several edits together is found by tracing the
    model, so a plan may hold a few edits more, and its latency is measured where this one is predicted. Raises `RunError` where
    scores are missing, `BudgetError` where the quantity was not measured or a share is none.
    """
    if selection in (SWEEP, IMPROVED):
        raise UnknownNameError(
            f"selection {selection!r} generates with each plan, and a table needs no model: name one, say {SELECTION}."
        )
    selections_of(selection)
    for share in shares:
        if not 0 < share <= 1:
            raise BudgetError(f"a budget of {share:g} of the {quantity}: give a share above 0 and at most 1.")
    return [_row(operators, scores, {quantity: share}, selection, priors) for share in shares]


def priced(run: Scored, *, replacements: Sequence[str] | None = None, **settings: Any) -> list[Row]:
    """The `price_table` of a run, with these replacements alone where any are named. Raises `RunError` for other scores."""
    if run.method not in SHIFTS:
        raise RunError(
            f"scores by {run.method} are no latent shifts, so they do not tell what a budget would cost: "
            "score by --method paper, or make a plan."
        )
    known = {candidate.replacement for _, candidate in run.operators.pairs()}
    for name in replacements or ():
        if name not in known:
            raise OperatorError(f"replacement {name!r} fits no operator of {run.source}: {suggest(name, known)}")
    scores = [entry for entry in run.scores if replacements is None or entry.replacement in replacements]
    return price_table(run.operators, scores, **settings)


def _row(operators: Operators, scores: Sequence[Score], targets: Mapping[Quantity, float], selection: str, priors: Priors) -> Row:
    choice = choose(operators, scores, targets, selection=selection, priors=priors)
    shift = joint_shift(choice.edits)
    return Row(
        target=min(targets.values()),
        predicted=choice.predicted,
        edits=len(choice.edits),
        joint_shift=shift,
        likely=(LIKELY[0] * shift, LIKELY[1] * shift),
        exhausted=choice.exhausted,
    )
