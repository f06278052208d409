"""From scores to a plan whose *measured* latency meets the budget: predict, prune, measure, correct."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ldpruner.benchmarking import Comparison, compare_calls
from ldpruner.errors import BudgetError
from ldpruner.operators.discovery import find_dead
from ldpruner.operators.tracing import Call
from ldpruner.pipelines import Pipeline
from ldpruner.plan import Budget, Edit, Plan, Quantity, parse_budgets
from ldpruner.scoring import Run
from ldpruner.selection import Choice, choose
from ldpruner.surgery import Fitted, trial

log = logging.getLogger(__name__)

Targets = dict[Quantity, float]


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
    rounds: int = 31,
) -> Planned:
    """Choose edits from the scores of `run` so that every budget holds.

    MACs and parameters are counted. Latency is predicted from the operators' times, then measured on the pruned denoiser
    (`rounds` pairs of calls), and the prediction's target moved until the measured value holds with as little removed as
    the measurements can tell. Raises `BudgetError` with what can be reached where a budget is out of reach.
    """
    budgets = parse_budgets(budget)
    scores = [entry for entry in run.scores if replacements is None or entry.replacement in replacements]
    targets: Targets = {b.quantity: b.share(run.operators.total) for b in budgets}
    search = _Search(pipeline=pipeline, run=replace(run, scores=tuple(scores)), budgets=budgets, selection=selection, rounds=rounds)
    return search.measured(targets) if "latency" in targets else search.counted(targets)


@dataclass(frozen=True, kw_only=True)
class _Search:
    pipeline: Pipeline
    run: Run
    budgets: tuple[Budget, ...]
    selection: str
    rounds: int

    def counted(self, targets: Targets) -> Planned:
        choice = self._choose(targets)
        if choice.exhausted:
            raise self._out_of_reach(targets, choice.predicted)
        return Planned(plan=self._plan(choice, self._call()), measured=None)

    def measured(self, targets: Targets, *, attempts: int = 8) -> Planned:
        """Bisect the predicted target between what was measured to be too slow and what was fast enough."""
        call, limit = self._call(), targets["latency"]
        too_slow, fast_enough = 1.0, 0.0
        best: Planned | None = None
        aim = limit
        tried: list[tuple[Edit, ...]] = []
        for _ in range(attempts):
            choice = self._choose({**targets, "latency": aim})
            made = self._plan(choice, call)
            if made.edits in tried:
                break
            tried.append(made.edits)
            comparison = self._measure(made, call)
            reached = comparison.ratio.value
            log.info("aimed at %.3f of the latency, predicted %.3f, measured %.3f", aim, choice.predicted["latency"], reached)
            others_met = all(choice.predicted[quantity] <= share for quantity, share in targets.items() if quantity != "latency")
            if reached <= limit and others_met:
                fast_enough = aim
                best = Planned(plan=made, measured=comparison)
            elif choice.exhausted and choice.predicted["latency"] > aim:
                if best is None:
                    raise self._out_of_reach(targets, {**choice.predicted, "latency": reached})
                break
            elif choice.exhausted:
                raise self._out_of_reach(targets, {**choice.predicted, "latency": reached})
            else:
                too_slow = aim
            if reached <= limit and reached > 0.985 * limit:
                break
            aim = self._next_aim(aim * limit / reached, too_slow, fast_enough)
        if best is None:
            best = self._last_resort(targets, fast_enough, call)
        return best

    @staticmethod
    def _next_aim(proposed: float, too_slow: float, fast_enough: float) -> float:
        inside = fast_enough < proposed < too_slow
        return proposed if inside else (too_slow + fast_enough) / 2

    def _last_resort(self, targets: Targets, aim: float, call: Call) -> Planned:
        """Everything that can go, for a budget that no attempt met."""
        choice = self._choose({**targets, "latency": 0.0})
        made = self._plan(choice, call)
        comparison = self._measure(made, call)
        if comparison.ratio.value > targets["latency"]:
            raise self._out_of_reach(targets, {**choice.predicted, "latency": comparison.ratio.value})
        return Planned(plan=made, measured=comparison)

    def _choose(self, targets: Targets) -> Choice:
        return choose(self.run.operators, self.run.scores, targets, selection=self.selection)

    def _call(self) -> Call:
        return self.pipeline.call(self.run.probe)

    def _plan(self, choice: Choice, call: Call) -> Plan:
        edits = find_dead(self.pipeline.denoiser, call, self.run.operators, choice.edits)
        return Plan(
            model=self.run.operators.model,
            denoiser=self.run.operators.denoiser,
            edits=edits,
            budgets=self.budgets,
            predicted=choice.predicted,
            probe=self.run.probe,
            selection=f"{self.run.method}/{self.selection}",
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


def pruned_view(denoiser: nn.Module, edits: Sequence[Edit], fitted: Fitted) -> nn.Module:
    """A denoiser with the edits made that shares every weight it keeps with `denoiser`, which stays as it is."""
    with trial(denoiser, edits, fitted=fitted):
        shared = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
        return copy.deepcopy(denoiser, dict(shared))
