"""Plans whose latency is measured: corrected until it holds, learned from, given back, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import PROBE
from ldpruner import Plan, benchmarking, calibration, planning, score
from ldpruner.benchmarking import Comparison
from ldpruner.files import read_json_lines
from ldpruner.latencies import Readings
from ldpruner.operators.discovery import DeadCode
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Cost, Edit, Operators, within
from ldpruner.record import Measurement
from ldpruner.scoring import Run
from ldpruner.selection import Priors, choose, predict_edits, reachable


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Run]:
    from conftest import ldm_operators, tiny_ldm

    pipeline = Pipeline(tiny_ldm(), source="tiny-ldm")
    return pipeline, score(pipeline, PROBE, operators=ldm_operators(), out=tmp_path_factory.mktemp("run"))


class SlowMachine:
    """Stands in for the clock: a call costs a fixed overhead, which no edit saves, and its predicted time."""

    def __init__(self, operators: Operators, overhead: float) -> None:
        self.operators = operators
        self.overhead = overhead
        self.asked = 0

    def measure(self, plan: Plan) -> Comparison:
        self.asked += 1
        left = predict_edits(self.operators, plan.edits).latency_ms / self.operators.total.latency_ms
        ratio = Measurement(value=self.overhead + (1 - self.overhead) * left, unit="", n=1, spread=0.0, how="computed")
        return Comparison(first=ratio, second=ratio, ratio=ratio)


def test_the_plan_is_corrected_until_the_measured_latency_holds(run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, scores = run
    machine = SlowMachine(scores.operators, overhead=0.3)
    monkeypatch.setattr(planning._Search, "_measure", machine.measure)
    planned = planning.plan(pipeline, scores, {"latency": "75%"})
    assert planned.measured is not None
    least = reachable(scores.operators, scores.scores, "latency")[-1]
    assert 0.3 + 0.7 * least + 0.05 < planned.measured.ratio.value <= 0.75, "by far not all that can go"
    left = predict_edits(scores.operators, planned.plan.edits).latency_ms / scores.operators.total.latency_ms
    assert left < 0.66, "the operators' own times alone would have stopped at 75 %"
    assert machine.asked > 1


def test_a_reading_just_above_the_limit_removes_a_little_more_and_not_everything(
    run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, scores = run
    shares = [1.0, *reachable(scores.operators, scores.scores, "latency")]
    place = max(range(1, len(shares) - 2), key=lambda k: shares[k - 1] - shares[k])
    limit = shares[place - 1] - 0.001  # a gap lies below: every aim in it gives the choice at `place`
    machine = SlowMachine(scores.operators, overhead=0.0)
    dead_code = DeadCode(pipeline.denoiser, pipeline.call(PROBE), scores.operators)

    def left(share: float) -> float:
        chosen = choose(scores.operators, scores.scores, {"latency": share}, selection="order").edits
        return predict_edits(scores.operators, dead_code.completed(chosen)).latency_ms / scores.operators.total.latency_ms

    above, below = left(shares[place]), next(made for made in map(left, shares[place:]) if made < left(shares[place]) - 1e-9)

    def measure(plan: Plan) -> Comparison:
        ratio = machine.measure(plan).ratio
        slow = replace(ratio, value=max(ratio.value, limit + 0.0005) if ratio.value > above - 1e-9 else ratio.value)
        return Comparison(first=slow, second=slow, ratio=slow)

    monkeypatch.setattr(planning._Search, "_measure", staticmethod(measure))
    planned = planning.plan(pipeline, scores, {"latency": f"{limit * 100}%"}, selection="order")
    assert planned.measured is not None
    assert below - 1e-6 < planned.measured.ratio.value < limit
    assert machine.asked <= 10


class Misjudged:
    """A machine on which linear maps take twice what operators' times say, convolutions 60 %, and blocks what is in them."""

    def __init__(self, operators: Operators) -> None:
        own = {o.name: o.cost.latency_ms for o in operators.operators}
        for each in operators.operators:
            if each.parent:
                own[each.parent] -= each.cost.latency_ms
        factors = {"Linear": 2.0, "Conv2d": 0.6}
        true = {o.name: own[o.name] * factors.get(o.kind, 1.0) for o in operators.operators}
        costs = {block: sum(true[name] for name in true if within(name, block)) for block in true}
        self.operators = replace(operators, operators=tuple(
            replace(o, cost=replace(o.cost, latency_ms=costs[o.name])) for o in operators.operators
        ))  # fmt: skip
        self.asked = 0

    def measure(self, plan: Plan) -> Comparison:
        self.asked += 1
        ratio = self.read(plan.edits)
        return Comparison(first=ratio, second=ratio, ratio=ratio)

    def read(self, edits: Sequence[Edit]) -> Measurement:
        left = predict_edits(self.operators, edits).latency_ms / self.operators.total.latency_ms
        return Measurement(value=left, unit="", n=15, spread=0.01, how="computed")


def test_random_plans_that_were_measured_make_the_prediction_right_and_spare_attempts(
    run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    pipeline, scores = run[0], timed_by_macs(run[1])
    machine = Misjudged(scores.operators)
    monkeypatch.setattr(planning._Search, "_measure", machine.measure)
    monkeypatch.setattr(calibration.Bench, "measure", lambda _, edits, rounds: machine.read(edits))
    asked, off = [], []
    for count in (0, 16):
        shutil.rmtree(own_cache, ignore_errors=True)
        monkeypatch.setattr(calibration, "CALIBRATING", count)
        for budget in (0.5, 0.6, 0.7, 0.8):
            planned = planning.plan(pipeline, scores, {"latency": f"{budget:.0%}"}, selection="order")
            assert planned.measured is not None
            assert planned.measured.ratio.value <= budget
            off.append(abs(planned.plan.predicted["latency"] / planned.measured.ratio.value - 1))
        asked.append(machine.asked)
    assert asked[1] - asked[0] < asked[0]
    assert max(off[4:]) < 0.03 < max(off[:4]), "at 50 % nothing was known before, at the others what searches had measured"


def test_every_plan_that_is_measured_is_kept(run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    pipeline, scores = run[0], timed_by_macs(run[1])
    machine = Misjudged(scores.operators)
    monkeypatch.setattr(planning._Search, "_measure", machine.measure)
    planning.plan(pipeline, scores, {"latency": "70%"}, selection="order")
    (kept,) = (own_cache / "latencies").glob("*.jsonl")
    assert len(read_json_lines(kept)) == machine.asked
    planning.plan(pipeline, scores, {"macs": "70%"}, selection="order")
    assert list((own_cache / "latencies").iterdir()) == [kept], "what is counted needs no readings"


def timed_by_macs(scores: Run) -> Run:
    """Scores of operators that take a nanosecond a MAC, whatever they took here."""

    def timed(cost: Cost) -> Cost:
        return replace(cost, latency_ms=cost.macs / 1e6)

    every = scores.operators
    return replace(scores, operators=replace(
        every,
        total=timed(every.total),
        operators=tuple(
            replace(each, cost=timed(each.cost), candidates=tuple(replace(c, cost=timed(c.cost)) for c in each.candidates))
            for each in every.operators
        ),
    ))  # fmt: skip


@pytest.mark.parametrize(("first", "readings"), [(0.97, 2), (1.03, 2), (1.1, 1)])
def test_a_reading_near_the_limit_is_taken_again_and_the_second_counts(
    run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch, first: float, readings: int
) -> None:
    pipeline, scores = run
    call, taken = pipeline.call(PROBE), iter((first, 1.0, 1.0))

    def measure(_: Plan) -> Comparison:
        ratio = Measurement(value=0.7 * next(taken), unit="", n=1, spread=0.0, how="computed")
        return Comparison(first=ratio, second=ratio, ratio=ratio)

    monkeypatch.setattr(planning._Search, "_measure", staticmethod(measure))
    search = planning._Search(
        pipeline=pipeline,
        call=call,
        dead_code=DeadCode(pipeline.denoiser, call, scores.operators),
        run=scores,
        budgets=(),
        selection="order",
        priors=Priors(),
        repair="none",
        rounds=1,
    )
    tried = search._try(search._choose({"params": 0.7}), 0.7)
    assert tried.measured is not None
    assert tried.measured.ratio.value == pytest.approx(0.7 * (first if readings == 1 else 1.0))
    assert len(list(taken)) == 3 - readings


def test_what_a_measurement_leaves_of_the_limit_is_given_back(run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, scores = run[0], timed_by_macs(run[1])
    machine = SlowMachine(scores.operators, overhead=0.1)
    monkeypatch.setattr(calibration, "readings_on", lambda *_: Readings())  # else the later plans know more than the first
    monkeypatch.setattr(planning._Search, "_measure", machine.measure)
    budgets = (0.5, 0.6, 0.7, 0.8)
    asked: list[dict[str, str | float]] = [{"latency": f"{budget:.0%}"} for budget in budgets]
    lean = [planning.plan(pipeline, scores, budget, selection="order") for budget in asked]
    monkeypatch.setattr(planning._Search, "_given_back", lambda _, best, *rest: best)
    greedy = [planning.plan(pipeline, scores, budget, selection="order") for budget in asked]
    for budget, kept in zip(budgets, lean, strict=True):
        assert kept.measured is not None
        assert kept.measured.ratio.value <= budget
    harm = [[sum(edit.score or 0.0 for edit in planned.plan.edits) for planned in plans] for plans in (lean, greedy)]
    assert all(kept <= taken for kept, taken in zip(*harm, strict=True))
    assert sum(harm[0]) < sum(harm[1]), "somewhere there was something to give back"


def test_a_latency_out_of_reach_says_what_was_measured(run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, scores = run
    monkeypatch.setattr(planning._Search, "_measure", SlowMachine(scores.operators, overhead=0.5).measure)
    with pytest.raises(ValueError, match=r"latency 40% cannot be met: .* together reach latency [5-9]\d\.\d%"):
        planning.plan(pipeline, scores, {"latency": "40%"})


def test_a_ratio_is_the_median_of_readings_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    clock = {"slow": iter([9.0, 4.0, 8.0, 6.0]), "fast": iter([9.0, 1.0, 4.0, 3.0])}  # the first of each is the warm-up

    def reading(run: Callable[[], str], _: torch.device) -> float:
        taken.append(run())
        return next(clock[taken[-1]])

    monkeypatch.setattr(benchmarking, "seconds", reading)
    comparison = benchmarking.alternate(lambda: "slow", lambda: "fast", torch.device("cpu"), rounds=3, how="by hand")
    assert taken == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert (comparison.first.value, comparison.first.unit, comparison.first.n) == (6000.0, "ms", 3)
    assert comparison.second.value == 3000.0
    assert comparison.ratio.value == 0.5
