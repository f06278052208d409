"""From options to a set of edits that meets its targets, as predicted from the operators' costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ldpruner.errors import BudgetError, RunError
from ldpruner.plans import QUANTITIES, Candidate, Cost, Edit, Operator, Operators, Quantity, Score, dead_edit, outermost, within
from ldpruner.selection.exact import solve
from ldpruner.selection.priors import Priors
from ldpruner.selection.rankings import OBJECTIVES, RANKINGS, Option

Chosen = dict[str, Candidate]  # operator -> its replacement
FREE = Priors()
STEP = 0.0025  # between the targets that a search tries with an objective


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Edits, those of dead operators included, and the predicted share of each quantity that is left."""

    edits: tuple[Edit, ...]
    predicted: dict[Quantity, float]
    exhausted: bool = False  # whether every option that saves anything was taken, and still a target is missed


def choose(
    operators: Operators,
    scores: Sequence[Score],
    targets: Mapping[Quantity, float],
    *,
    selection: str = "order",
    priors: Priors = FREE,
) -> Choice:
    """The replacements with which every target (a share of the original) is predicted to be met, by a ranking or an objective.

    A block and its parts are never both replaced. Raises `RunError` where scores are missing, `BudgetError` where a target's
    quantity was not measured.
    """
    for quantity in targets:
        share(operators.total, operators.total, quantity)
    if selection in OBJECTIVES:
        options = options_of(operators, scores)
        chosen = solve(operators, options, targets, objective=OBJECTIVES[selection], priors=priors)
    else:
        chosen = _accepted(operators, scores, targets, selection, priors)
    return choice_of(chosen, operators, scores, targets)


def choice_of(chosen: Chosen, operators: Operators, scores: Sequence[Score], targets: Mapping[Quantity, float]) -> Choice:
    """The edits of a set of replacements that were scored, and what they are predicted to leave."""
    left = predict(operators, chosen)
    predicted = {quantity: share(left, operators.total, quantity) for quantity in QUANTITIES if operators.total.of(quantity)}
    return Choice(
        edits=_edits(operators, chosen, {entry.key: entry.score for entry in scores}),
        predicted=predicted,
        exhausted=any(predicted[quantity] > target + 1e-9 for quantity, target in targets.items()),
    )


def chosen_in(edits: Iterable[Edit], operators: Operators) -> Chosen:
    """The set of replacements that edits were made of: without those of what is only dead."""
    return {e.operator: operators[e.operator].candidate(e.replacement) for e in edits if e.reason == "chosen"}


def reachable(
    operators: Operators, scores: Sequence[Score], quantity: Quantity, *, selection: str = "order", priors: Priors = FREE
) -> list[float]:
    """The targets, falling, at which a selection takes other options, down to the least share that it can reach.

    Of a ranking, these are the shares that options taken one after the other end at: for a target from one of them up to the one
    before, `choose` takes the same options, and gives back what the target allows. Of an objective: steps of `STEP`.
    """
    if selection not in OBJECTIVES:
        steps = _steps(operators, scores, {quantity: 0.0}, selection, priors)
        return [share(left, operators.total, quantity) for _, left in steps]
    least = choose(operators, scores, {quantity: 0.0}, selection=selection, priors=priors).predicted[quantity]
    return [1 - STEP * step for step in range(1, math.ceil((1 - least) / STEP))] + [least]


def _accepted(
    operators: Operators, scores: Sequence[Score], targets: Mapping[Quantity, float], selection: str, priors: Priors
) -> Chosen:
    """Options, first of the ranking first, until every target is met.

    Of a block and its parts, what saves more of the quantity that is still over target stays. What `priors` do not allow beside
    what is chosen already is passed over. The last option often saves more than was lacking: what the targets hold without is
    then given back, last of the ranking first, which the paper does not do.
    """
    chosen = Chosen()
    for chosen, _ in _steps(operators, scores, targets, selection, priors):  # noqa: B007  the last step is what counts
        pass
    return _needed(chosen, operators, scores, targets, selection)


def _steps(
    operators: Operators, scores: Sequence[Score], targets: Mapping[Quantity, float], selection: str, priors: Priors
) -> Iterator[tuple[Chosen, Cost]]:
    """What is chosen and what is left after each option that is accepted, until every target is met or no option is left."""
    chosen, left = Chosen(), operators.total
    for option in _ranked(operators, scores, list(targets), selection):
        missed = [quantity for quantity, target in targets.items() if share(left, operators.total, quantity) > target]
        if not missed:
            return
        changed = _with(chosen, option, operators)
        after = predict(operators, changed)
        if after.of(missed[0]) < left.of(missed[0]) and priors.allow(changed, operators, missed[0]):
            chosen, left = changed, after
            yield chosen, left


def _needed(
    chosen: Chosen, operators: Operators, scores: Sequence[Score], targets: Mapping[Quantity, float], selection: str
) -> Chosen:
    """`chosen` without what every target holds without, last of the ranking first."""
    for option in reversed(_ranked(operators, scores, list(targets), selection)):
        name = option.operator.name
        if chosen.get(name) == option.candidate:
            others = {other: candidate for other, candidate in chosen.items() if other != name}
            left = predict(operators, others)
            if all(share(left, operators.total, quantity) <= target for quantity, target in targets.items()):
                chosen = others
    return chosen


def _ranked(operators: Operators, scores: Sequence[Score], quantities: Sequence[Quantity], selection: str) -> list[Option]:
    """What saves of the first quantity in its ranking, then what saves of the others only."""
    options = options_of(operators, scores)
    ranked: list[Option] = []
    for quantity in quantities:
        seen = {option.score.key for option in ranked}
        rest = [option for option in options if option.saves[quantity] > 0 and option.score.key not in seen]
        ranked += RANKINGS[selection](rest, quantity)
    return ranked


def share(left: Cost, total: Cost, quantity: Quantity) -> float:
    """What is left of a quantity, as a share of the original's."""
    if not total.of(quantity):
        raise BudgetError(f"{quantity}: was not measured, so no share of it can be asked for.")
    return left.of(quantity) / total.of(quantity)


def predict(operators: Operators, chosen: Chosen) -> Cost:
    """What a denoiser costs once `chosen` is replaced and all that dies with it is gone."""
    gone = outermost([*chosen, *_dead(chosen)])
    return left_without(operators, {name: chosen[name].cost if name in chosen else Cost() for name in gone})


def predict_edits(operators: Operators, edits: Iterable[Edit]) -> Cost:
    """What a denoiser costs with these edits made and no others; what dies jointly is among them, where it is to count."""

    def added(edit: Edit) -> Cost:
        return Cost() if edit.reason == "dead" else operators[edit.operator].candidate(edit.replacement).cost

    return left_without(operators, {edit.operator: added(edit) for edit in edits})


def left_without(operators: Operators, gone: Mapping[str, Cost]) -> Cost:
    """What a denoiser costs once operators, none of which lies in another, have given way to what costs this much."""
    total = operators.total
    params, macs, latency_ms = total.params, total.macs, total.latency_ms
    for name, added in gone.items():
        removed = operators[name].cost
        params += added.params - removed.params
        macs += added.macs - removed.macs
        latency_ms += added.latency_ms - removed.latency_ms
    return Cost(params=params, macs=macs, latency_ms=latency_ms)


def options_of(operators: Operators, scores: Sequence[Score]) -> list[Option]:
    """Every replacement that has a score. Raises `RunError` where none has."""
    by_key = {entry.key: entry for entry in scores}
    pairs = [(o, c) for o, c in operators.pairs() if (o.name, c.replacement) in by_key]
    if not pairs:
        raise RunError("this run holds no scores yet: finish `ldpruner score` first.")
    return [Option(operator=o, candidate=c, score=by_key[o.name, c.replacement], saves=_saves(operators, o, c)) for o, c in pairs]


def _saves(operators: Operators, operator: Operator, candidate: Candidate) -> dict[Quantity, float]:
    left = predict(operators, {operator.name: candidate})
    return {q: 1 - left.of(q) / operators.total.of(q) if operators.total.of(q) else 0.0 for q in QUANTITIES}


def _with(chosen: Chosen, option: Option, operators: Operators) -> Chosen:
    """`chosen` with one option more and without what lies in its operator or dies with it; unchanged where that is gone."""
    name = option.operator.name
    if any(within(name, other) for other in (*chosen, *_dead(chosen)) if other != name):
        return chosen
    going = (name, *option.candidate.dead)
    kept = {other: candidate for other, candidate in chosen.items() if not any(within(other, path) for path in going)}
    return kept | {name: option.candidate}


def _dead(chosen: Chosen) -> Iterable[str]:
    return (name for candidate in chosen.values() for name in candidate.dead)


def _edits(operators: Operators, chosen: Chosen, scores: Mapping[tuple[str, str], float]) -> tuple[Edit, ...]:
    gone = set(outermost([*chosen, *_dead(chosen)]))
    edits = []
    for operator in operators.operators:
        if operator.name not in gone:
            continue
        candidate = chosen.get(operator.name)
        if candidate is None:
            edits.append(dead_edit(operator))
            continue
        score = scores[operator.name, candidate.replacement]
        edits.append(Edit(operator=operator.name, replacement=candidate.replacement, options=candidate.options, score=score))
    return tuple(edits)
