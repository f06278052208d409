"""From scores to a plan whose *measured* latency meets the budget: predict, prune, measure, correct."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from ldpruner.benchmarking import Comparison, compare_calls
from ldpruner.calibration import Bench, calibrated, fillable
from ldpruner.errors import BudgetError
from ldpruner.improving import Improver
from ldpruner.judging import JointShift
from ldpruner.latencies import Times
from ldpruner.operators.discovery import DeadCode
from ldpruner.operators.tracing import Call, weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Budget, Edit, Plan, Quantity, Repairing, parse_budgets
from ldpruner.recovery.activations import fitting_calls
from ldpruner.recovery.closed_form import repair as fit_together
from ldpruner.replacements import REPLACEMENTS
from ldpruner.scoring import Run
from ldpruner.selection import (
    IMPROVED,
    SWEEP,
    Choice,
    Priors,
    choice_of,
    choose,
    chosen_in,
    predict_edits,
    reachable,
    selections_of,
    share,
)
from ldpruner.selection.choice import FREE, Chosen
from ldpruner.selection.exact import Keys
from ldpruner.surgery import pruned_view

log = logging.getLogger(__name__)

Targets = dict[Quantity, float]
CLOSE = 0.985  # a measured latency above this share of its limit is near enough: readings spread by about as much
AROUND = 8  # choices on either side of where a search begins: to predict a whole plan takes a second
NEAR = 1.05  # readings up to this share of the limit are taken twice
ALIKE = 1.05  # joint latent shifts of a few samples that differ by less are not told apart
RANKED_ON = 12  # calls on which plans are repaired to be compared
FINALISTS = 3  # plans that are measured, repaired where that is wanted, and judged again
JUDGED_ON = 64  # samples that judge plans, where the probe has not more: those of few tell chance from chance
APART = 5_000  # from the probe's seeds to those of samples that judge plans
IMPROVED_ON = 32  # samples on which plans are improved, none of those that judge plans
EVALUATIONS = 120  # sets of replacements that may be measured to improve a plan, and
MORE = 8  # to improve it again for a target that a measured latency has moved


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
    selection: str = SWEEP,
    replacements: Sequence[str] | None = None,
    priors: Priors = FREE,
    repair: Repairing = "none",
    rounds: int = 31,
    batch_size: int | None = None,
) -> Planned:
    """Choose edits from the scores of `run` so that every budget holds.

    `selection` names a ranking or an objective, or `sweep`: a plan by each. Of these the three with the least joint latent
    shift are measured, and the one that shifts least then (after repair, where that is wanted) is taken; of those that shift
    alike the one with the fewest edits, which leaves the least to recover. A sample that turns into another picture counts there
    as moved by at most four times the median: which ones do is chance. Scores are taken one operator at a time and do not
    tell which plan is best together; a generation by each does, and costs next to nothing. `improved` changes the best of the
    sweep's plans further, see `improving`, at some hundred generations more; it competes with the others.

    MACs and parameters are counted. Latency is predicted from the operators' times, as plans that were measured on this device
    correct them, then measured on the pruned denoiser (`rounds` pairs of calls), and the prediction's target moved until the
    measured value holds with as little removed as the measurements can tell. Readings are kept in the cache; where it has few of
    this device, random plans are measured first. With `repair`, what the stand-ins then hold besides is part of what is
    measured. Raises `BudgetError` with what can be reached where a budget is out of reach.
    """
    run.check_weights(weights_digest(pipeline.denoiser), pipeline.source)
    budgets = parse_budgets(budget)
    for name in replacements or ():
        REPLACEMENTS[name]
    scores = [entry for entry in run.scores if replacements is None or entry.replacement in replacements]
    names = selections_of(selection, scores)  # what is misspelt raises now, not after random plans were measured
    targets: Targets = {b.quantity: b.share(run.operators.total) for b in budgets}
    call = pipeline.call(run.probe)
    dead_code = DeadCode(pipeline.denoiser, call, run.operators)
    bench = calibrated(pipeline, call, run.operators, dead_code, repair) if "latency" in targets else None
    search = _Search(
        pipeline=pipeline,
        call=call,
        dead_code=dead_code,
        run=replace(run, scores=tuple(scores)),
        budgets=budgets,
        selection=selection,
        priors=priors,
        repair=repair,
        rounds=rounds,
        bench=bench,
    )
    searches = [replace(search, selection=name) for name in names]
    if len(searches) == 1:
        return search.planned(targets)
    samples = max(run.probe.samples, JUDGED_ON)
    judge = JointShift.on(pipeline, run.probe, samples=samples, seed=run.probe.seed + APART, batch_size=batch_size)
    judge = judge.tamed(searches[0].predicted(targets).edits, run.fitted)
    searches = _sorted(searches, targets, judge, run)
    if selection == IMPROVED:
        searches.insert(0, _Improving.of(searches[0], targets, batch_size))
    return _least_shifting(_held(searches, targets), pipeline, run, judge, batch_size)


def _held(searches: Sequence[_Search], targets: Targets) -> list[Planned]:
    """The plans of the first `FINALISTS` searches that can meet the targets. Raises `BudgetError` where none can."""
    found, missed = list[Planned](), list[BudgetError]()
    for search in searches:
        if len(found) == FINALISTS:
            break
        try:
            found.append(search.planned(targets))
        except BudgetError as error:
            missed.append(error)
    if not found:
        raise missed[0]
    return found


def _sorted(searches: Sequence[_Search], targets: Targets, judge: JointShift, run: Run) -> list[_Search]:
    """One search for every plan that is predicted to meet the targets: the least shift, before repair, first."""
    found: list[tuple[float, tuple[Edit, ...], _Search]] = []
    for search in searches:
        edits = search.predicted(targets).edits
        if all(edits != other for _, other, _ in found):
            found.append((judge.of(edits, run.fitted), edits, search))
            log.info("%s: %d edits, joint latent shift %.4g, predicted", search.selection, len(edits), found[-1][0])
    return [search for _, _, search in sorted(found, key=lambda entry: entry[0])]


def _least_shifting(plans: Sequence[Planned], pipeline: Pipeline, run: Run, judge: JointShift, batch_size: int | None) -> Planned:
    """The plan whose edits, all together, move the latents least; of those that do alike, the shortest."""
    distinct = [planned for place, planned in enumerate(plans) if all(planned.plan.edits != p.plan.edits for p in plans[:place])]
    if len(distinct) == 1:
        return distinct[0]
    repaired = distinct[0].plan.repair == "closed-form"
    calls = fitting_calls(pipeline, run.probe, batch_size=batch_size, count=RANKED_ON) if repaired else []
    shifts = []
    for planned in distinct:
        edits, fitted = planned.plan.edits, run.fitted
        if repaired:
            fitted = fit_together(pipeline, edits, run.probe, fitted=fitted, calls=calls)
        shifts.append(judge.of(edits, fitted))
        log.info("%s: %d edits, joint latent shift %.4g", planned.plan.selection, len(edits), shifts[-1])
    alike = [place for place, shift in enumerate(shifts) if shift <= ALIKE * min(shifts)]
    return distinct[min(alike, key=lambda place: (len(distinct[place].plan.edits), shifts[place]))]


def _ratio(planned: Planned) -> float:
    assert planned.measured is not None
    return planned.measured.ratio.value


def _first(aims: Sequence[float], limit: float) -> int:
    """The place of the first aim that is within the limit; the last one where none is."""
    return next((place for place, aim in enumerate(aims) if aim <= limit), len(aims) - 1)


@dataclass(frozen=True, kw_only=True)
class _Search:
    pipeline: Pipeline
    call: Call
    dead_code: DeadCode
    run: Run
    budgets: tuple[Budget, ...]
    selection: str
    priors: Priors
    repair: Repairing
    rounds: int
    bench: Bench | None = None  # where latency is among the targets
    times: Times | None = None  # that predict it
    seen: list[Planned] = field(default_factory=list)  # measured before, by searches that share the list too

    @property
    def name(self) -> str:
        return self.selection

    def planned(self, targets: Targets) -> Planned:
        return self.timed().measured(targets) if "latency" in targets else self.counted(targets)

    def timed(self) -> _Search:
        """The same search, with times of operators as all readings until now correct them."""
        if self.bench is None:
            return self
        times = self.bench.times()
        return replace(self, times=times, run=replace(self.run, operators=times.operators))

    def predicted(self, targets: Targets) -> Plan:
        """The plan that is predicted to meet the targets; nothing is measured."""
        search = self.timed()
        return search._plan(search._choose(targets))

    def counted(self, targets: Targets) -> Planned:
        choice = self._choose(targets)
        if choice.exhausted:
            raise self._out_of_reach(targets, choice.predicted)
        return Planned(plan=self._plan(choice), measured=None)

    def measured(self, targets: Targets, *, attempts: int = 10) -> Planned:
        """Search the choices from the least removed to the most for the first that measures fast enough.

        The search goes over choices: each attempt is another one than those before, between the largest that was too slow and
        the smallest that was fast enough. It ends with a choice that is near enough, with no choice left in between, or after
        `attempts` plans of which one was fast enough. Where that one is faster than it need be, some of it is given back.
        """
        limit = targets["latency"]
        aims = [1.0, *reachable(self.run.operators, self.run.scores, "latency", selection=self.selection, priors=self.priors)]
        too_slow, fast_enough, step = -1, len(aims), 1
        best: Planned | None = None
        place, tries = self._predicted_place(aims, targets), 0
        while fast_enough - too_slow > 1 and (best is None or tries < attempts):
            choice, tries = self._choose({**targets, "latency": aims[place]}), tries + 1
            tried = self._try(choice, limit)
            reached = _ratio(tried)
            predicted = tried.plan.predicted["latency"]
            log.info("choice %d of %d: predicted %.3f, measured %.3f", place + 1, len(aims), predicted, reached)
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
            return self._everything(targets)
        above = aims[fast_enough - 1] if fast_enough else 1.0
        return self._given_back(best, targets, (aims[fast_enough], above))

    def _predicted_place(self, aims: Sequence[float], targets: Targets) -> int:
        """The place of the first choice whose whole plan is predicted within the limit, found by halves near where choices say.

        A whole plan is without what died jointly, and what stays may get tensors that lie otherwise: a choice does not tell.
        """

        def holds(place: int) -> bool:
            choice = self._choose({**targets, "latency": aims[place]})
            return self._plan(choice).predicted["latency"] <= targets["latency"]

        near = _first(aims, targets["latency"])
        around = range(max(0, near - AROUND), min(len(aims), near + AROUND))
        return min(around.start + bisect_left(around, True, key=holds), len(aims) - 1)

    def _given_back(self, best: Planned, targets: Targets, span: tuple[float, float]) -> Planned:
        """A plan with less removed that is still fast enough, where the choice just above it is too slow for `best` to grow.

        `span` holds the predicted shares of the two choices. What is left of the limit is offered whole, then half of it.
        """
        taken, above = span
        offered = min(taken * targets["latency"] / _ratio(best), math.nextafter(above, 0.0))
        for part in (1.0, 0.5):
            if _ratio(best) > CLOSE * targets["latency"] or offered <= taken:
                break
            choice = self._choose({**targets, "latency": taken + part * (offered - taken)})
            tried = self._try(choice, targets["latency"])
            log.info("given back: predicted %.3f, measured %.3f", tried.plan.predicted["latency"], _ratio(tried))
            if _ratio(tried) <= targets["latency"] and self._counts_hold(choice, targets):
                return tried
        return best

    def _try(self, choice: Choice, limit: float) -> Planned:
        """The plan of a choice with its measurement; one that was measured before keeps what was measured then.

        A reading that is below the limit, or above it by little, is taken again and the second one counts: the first was picked
        for being low, or may be high by chance, and a better plan be lost.
        """
        made = self._plan(choice)
        for planned in self.seen:
            if planned.plan.edits == made.edits:
                return replace(planned, plan=made)
        comparison = self._read(made)
        if comparison.ratio.value <= NEAR * limit:
            comparison = self._read(made)
        self.seen.append(Planned(plan=made, measured=comparison))
        return self.seen[-1]

    def _everything(self, targets: Targets) -> Planned:
        """All that can go, where the last choice was still too slow. Raises `BudgetError` where a second reading agrees."""
        choice = self._choose(dict.fromkeys(targets, 0.0))
        made = self._plan(choice)
        comparison = self._read(made)
        reached = {**choice.predicted, "latency": comparison.ratio.value}
        if any(reached[quantity] > target for quantity, target in targets.items()):
            raise self._out_of_reach(targets, reached)
        return Planned(plan=made, measured=comparison)

    @staticmethod
    def _counts_hold(choice: Choice, targets: Targets) -> bool:
        return all(choice.predicted[quantity] <= target for quantity, target in targets.items() if quantity != "latency")

    def _choose(self, targets: Targets) -> Choice:
        return choose(self.run.operators, self.run.scores, targets, selection=self.selection, priors=self.priors)

    def _plan(self, choice: Choice) -> Plan:
        edits = fillable(self.dead_code.completed(choice.edits), self.run.operators, self.repair)
        left, total = predict_edits(self.run.operators, edits), self.run.operators.total
        predicted = {str(quantity): share(left, total, quantity) for quantity in choice.predicted}
        if self.bench is not None and self.times is not None:
            predicted["latency"] = self.times.latency(edits, self.bench.relaid(edits))
        return Plan(
            model=self.run.operators.model,
            denoiser=self.run.operators.denoiser,
            edits=edits,
            budgets=self.budgets,
            predicted=predicted,
            probe=self.run.probe,
            selection="/".join(filter(None, (self.run.method, self.name, str(self.priors)))),
            repair=self.repair,
        )

    def _read(self, made: Plan) -> Comparison:
        """A measurement, from which the searches after this one learn."""
        comparison = self._measure(made)
        if self.bench is not None:
            self.bench.add(made.edits, comparison.ratio)
        return comparison

    def _measure(self, made: Plan) -> Comparison:
        original = self.pipeline.denoiser
        pruned = pruned_view(original, made.edits, self.run.fitted)
        return compare_calls(original, pruned, self.call, rounds=self.rounds)

    def _out_of_reach(self, targets: Targets, reached: Mapping[Quantity, float]) -> BudgetError:
        missed = {quantity: target for quantity, target in targets.items() if reached[quantity] > target}
        asked = ", ".join(f"{quantity} {target * 100:.4g}%" for quantity, target in (missed or targets).items())
        floor = ", ".join(f"{quantity} {reached[quantity] * 100:.1f}%" for quantity in (missed or targets))
        count = len({entry.operator for entry in self.run.scores})
        return BudgetError(
            f"{asked} cannot be met: all {count} removable operators together reach {floor}. Ask for that or more, or allow "
            "more replacements."
        )


@dataclass(frozen=True, kw_only=True)
class _Improving(_Search):
    """A search whose choices are those of a selection, improved; where the target has moved, the last one is improved again."""

    judge: JointShift
    known: dict[Keys, float] = field(default_factory=dict)  # joint shifts of what was measured, for any target
    improved: list[Chosen] = field(default_factory=list)

    @classmethod
    def of(cls, search: _Search, targets: Targets, batch_size: int | None) -> _Improving:
        """The search, with judges whose samples are none of those that judge plans."""
        run, names = search.run, [f.name for f in fields(_Search)]
        judge = JointShift.on(
            search.pipeline, run.probe, samples=IMPROVED_ON, seed=run.probe.seed + 2 * APART, batch_size=batch_size
        )
        judge = judge.tamed(search.predicted(targets).edits, run.fitted)
        return cls(**{name: getattr(search, name) for name in names}, judge=judge)

    @property
    def name(self) -> str:
        return f"{self.selection}, improved"

    def _choose(self, targets: Targets) -> Choice:
        choice = super()._choose(targets)
        if choice.exhausted:
            return choice
        operators, scores = self.run.operators, self.run.scores
        improver = Improver.of(operators, scores, targets, judge=self._shift, priors=self.priors, known=self.known)
        starts = [chosen_in(choice.edits, operators), *self.improved[-1:]]
        found = improver.improved(starts, targets, allowance=MORE if self.improved else EVALUATIONS)
        log.info("%s: joint latent shift %.4g to %.4g in %d", self.name, found.steps[0].shift, found.shift, found.evaluations)
        self.improved.append(found.chosen)
        better = choice_of(found.chosen, operators, scores, targets)
        return choice if better.exhausted else better

    def _shift(self, chosen: Chosen) -> float:
        """The judge's, without a look for what else is dead: that changes no latent."""
        return self.judge.of(choice_of(chosen, self.run.operators, self.run.scores, {}).edits, self.run.fitted)
