"""From scores to a plan whose *measured* latency meets the budget: predict, prune, measure, correct."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ldpruner.benchmarking import Comparison, compare_calls
from ldpruner.errors import BudgetError, RunError
from ldpruner.operators.discovery import find_dead
from ldpruner.operators.tracing import Call, weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Budget, Plan, Quantity, Repairing, corrected, parse_budgets
from ldpruner.replacements import REPLACEMENTS
from ldpruner.scoring import Run
from ldpruner.selection import Choice, Priors, choose, reachable
from ldpruner.selection.choice import FREE
from ldpruner.surgery import pruned_view

log = logging.getLogger(__name__)

Targets = dict[Quantity, float]
CLOSE = 0.985  # a measured latency above this share of its limit is near enough: readings spread by about as much


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan and, where its budget names the latency, the measurement that met it."""

    plan: Plan
    measured: Comparison | None


def plan(
    pipeline: Pipeline,
    run: Run,
    budget: Mapping[str, str | float],
    *,
    selection: str = "order",
    replacements: Sequence[str] | None = None,
    priors: Priors = FREE,
    repair: Repairing = "none",
    rounds: int = 31,
) -> Planned:
    """Choose edits from the scores of `run` so that every budget holds.

    MACs and parameters are counted. Latency is predicted from the operators' times, then measured on the pruned denoiser
    (`rounds` pairs of calls), and the prediction's target moved until the measured value holds with as little removed as
    the measurements can tell. With `repair`, what the stand-ins then hold besides is part of what is measured. Raises
    `BudgetError` with what can be reached where a budget is out of reach.
    """
    if weights_digest(pipeline.denoiser) != run.weights:
        raise RunError(f"{pipeline.source}: its weights are not those that were scored as {run.source}. Score it anew.")
    budgets = parse_budgets(budget)
    for name in replacements or ():
        REPLACEMENTS[name]
    scores = [entry for entry in run.scores if replacements is None or entry.replacement in replacements]
    targets: Targets = {b.quantity: b.share(run.operators.total) for b in budgets}
    search = _Search(
        pipeline=pipeline,
        run=replace(run, scores=tuple(scores)),
        budgets=budgets,
        selection=selection,
        priors=priors,
        repair=repair,
        rounds=rounds,
    )
    return search.measured(targets) if "latency" in targets else search.counted(targets)


def _ratio(planned: Planned) -> float:
    assert planned.measured is not None
    return planned.measured.ratio.value


def _first(aims: Sequence[float], limit: float) -> int:
    """The place of the first aim that is within the limit; the last one where none is."""
    return next((place for place, aim in enumerate(aims) if aim <= limit), len(aims) - 1)


@dataclass(frozen=True, kw_only=True)
class _Search:
    pipeline: Pipeline
    run: Run
    budgets: tuple[Budget, ...]
    selection: str
    priors: Priors
    repair: Repairing
    rounds: int

    def counted(self, targets: Targets) -> Planned:
        choice = self._choose(targets)
        if choice.exhausted:
            raise self._out_of_reach(targets, choice.predicted)
        return Planned(plan=self._plan(choice, self._call()), measured=None)

    def measured(self, targets: Targets, *, attempts: int = 10) -> Planned:
        """Search the choices from the least removed to the most for the first that measures fast enough.

        The search goes over choices: each attempt is another one than those before, between the largest that was too slow and
        the smallest that was fast enough. It ends with a choice that is near enough, with no choice left in between, or after
        `attempts` plans of which one was fast enough. Where that one is faster than it need be, some of it is given back.
        """
        call, limit = self._call(), targets["latency"]
        aims = [1.0, *reachable(self.run.operators, self.run.scores, "latency", selection=self.selection, priors=self.priors)]
        too_slow, fast_enough, step = -1, len(aims), 1
        best: Planned | None = None
        seen: list[Planned] = []
        place = _first(aims, limit)
        while fast_enough - too_slow > 1 and (best is None or len(seen) < attempts):
            choice = self._choose({**targets, "latency": aims[place]})
            tried = self._try(choice, call, limit, seen)
            reached = _ratio(tried)
            log.info("choice %d of %d: predicted %.3f, measured %.3f", place + 1, len(aims), choice.predicted["latency"], reached)
            if reached <= limit and self._counts_hold(choice, targets):
                best, fast_enough = tried, place
                if reached > CLOSE * limit:
                    break
            else:
                too_slow = place
            proposed = _first(aims, aims[place] * limit / reached)
            if best is None:  # readings just above the limit would creep along choices that save next to nothing
                proposed, step = max(proposed, too_slow + step), 2 * step
            place = min(max(proposed, too_slow + 1), fast_enough - 1)
        if best is None:
            return self._everything(targets, call)
        above = aims[fast_enough - 1] if fast_enough else 1.0
        return self._given_back(best, targets, (aims[fast_enough], above), call, seen)

    def _given_back(self, best: Planned, targets: Targets, span: tuple[float, float], call: Call, seen: list[Planned]) -> Planned:
        """A plan with less removed that is still fast enough, where the choice just above it is too slow for `best` to grow.

        `span` holds the predicted shares of the two choices. What is left of the limit is offered whole, then half of it.
        """
        taken, above = span
        offered = min(taken * targets["latency"] / _ratio(best), math.nextafter(above, 0.0))
        for share in (1.0, 0.5):
            if _ratio(best) > CLOSE * targets["latency"] or offered <= taken:
                break
            choice = self._choose({**targets, "latency": taken + share * (offered - taken)})
            tried = self._try(choice, call, targets["latency"], seen)
            log.info("given back: predicted %.3f, measured %.3f", choice.predicted["latency"], _ratio(tried))
            if _ratio(tried) <= targets["latency"] and self._counts_hold(choice, targets):
                return tried
        return best

    def _try(self, choice: Choice, call: Call, limit: float, seen: list[Planned]) -> Planned:
        """The plan of a choice with its measurement; one that was measured before keeps what was measured then.

        A reading below the limit is taken again and the second one counts: the first was picked for being low.
        """
        made = self._plan(choice, call)
        for planned in seen:
            if planned.plan.edits == made.edits:
                return planned
        comparison = self._measure(made, call)
        if comparison.ratio.value <= limit:
            comparison = self._measure(made, call)
        seen.append(Planned(plan=made, measured=comparison))
        return seen[-1]

    def _everything(self, targets: Targets, call: Call) -> Planned:
        """All that can go, where the last choice was still too slow. Raises `BudgetError` where a second reading agrees."""
        choice = self._choose(dict.fromkeys(targets, 0.0))
        made = self._plan(choice, call)
        comparison = self._measure(made, call)
        reached = {**choice.predicted, "latency": comparison.ratio.value}
        if any(reached[quantity] > target for quantity, target in targets.items()):
            raise self._out_of_reach(targets, reached)
        return Planned(plan=made, measured=comparison)

    @staticmethod
    def _counts_hold(choice: Choice, targets: Targets) -> bool:
        return all(choice.predicted[quantity] <= target for quantity, target in targets.items() if quantity != "latency")

    def _choose(self, targets: Targets) -> Choice:
        return choose(self.run.operators, self.run.scores, targets, selection=self.selection, priors=self.priors)

    def _call(self) -> Call:
        return self.pipeline.call(self.run.probe)

    def _plan(self, choice: Choice, call: Call) -> Plan:
        edits = find_dead(self.pipeline.denoiser, call, self.run.operators, choice.edits)
        return Plan(
            model=self.run.operators.model,
            denoiser=self.run.operators.denoiser,
            edits=corrected(edits, self.run.operators) if self.repair == "closed-form" else edits,
            budgets=self.budgets,
            predicted={str(quantity): value for quantity, value in choice.predicted.items()},
            probe=self.run.probe,
            selection="/".join(filter(None, (self.run.method, self.selection, str(self.priors)))),
            repair=self.repair,
        )

    def _measure(self, made: Plan, call: Call) -> Comparison:
        original = self.pipeline.denoiser
        pruned = pruned_view(original, made.edits, self.run.fitted)
        return compare_calls(original, pruned, call, rounds=self.rounds)

    def _out_of_reach(self, targets: Targets, reached: Mapping[Quantity, float]) -> BudgetError:
        missed = {quantity: target for quantity, target in targets.items() if reached[quantity] > target}
        asked = ", ".join(f"{quantity} {target * 100:.4g}%" for quantity, target in (missed or targets).items())
        floor = ", ".join(f"{quantity} {reached[quantity] * 100:.1f}%" for quantity in (missed or targets))
        count = len({entry.operator for entry in self.run.scores})
        return BudgetError(
            f"{asked} cannot be met: all {count} removable operators together reach {floor}. Ask for that or more, or allow "
            "more replacements."
        )
