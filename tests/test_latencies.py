"""Latencies that are learned from measured plans: what they are kept as, and what they correct."""

from __future__ import annotations

import json
import logging
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from conftest import PROBE
from invented import operator, operators
from ldpruner import calibration
from ldpruner.calibration import Bench, readings_on
from ldpruner.fitting import blank
from ldpruner.latencies import DEAD, LEAST, MOST, Reading, Readings, learned, random_plans
from ldpruner.operators.discovery import DeadCode
from ldpruner.operators.layouts import layouts, relaid
from ldpruner.operators.tracing import Call
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Operators
from ldpruner.record import Measurement
from ldpruner.selection import predict_edits
from ldpruner.surgery import check_edits, pruned_view


def reading(ratio: float, *edits: tuple[str, str], spread: float = 0.0) -> Reading:
    return Reading(edits=edits, ratio=ratio, pairs=15, spread=spread)


def of_kinds(*kinds: str, ms: float = 10.0) -> Operators:
    """As many operators as kinds, named after their places."""
    return operators(*(replace(operator(f"o{place}", ms, "identity"), kind=kind) for place, kind in enumerate(kinds)))


def timed(given: Operators, readings: Sequence[Reading]) -> Operators:
    return learned(given, readings).operators


def ms(given: Operators, name: str) -> float:
    return given[name].cost.latency_ms


def test_readings_survive_a_trip_through_json() -> None:
    given = reading(0.7, ("a.b", "identity"), ("c", DEAD), spread=0.02)
    assert Reading.from_json(json.loads(json.dumps(given.to_json()))) == given


def test_a_reading_tells_what_was_chosen_from_what_died() -> None:
    edits = [Edit(operator="a", replacement="zero", options={}), Edit(operator="b", replacement="zero", options={}, reason="dead")]
    taken = Reading.of(edits, Measurement(value=0.6, unit="", n=9, spread=0.1, how=""), {"c": True})
    assert taken == Reading(edits=(("a", "zero"), ("b", DEAD)), relaid=(("c", True),), ratio=0.6, pairs=9, spread=0.1)


def test_without_readings_nothing_is_changed() -> None:
    given = of_kinds("Conv2d", "Linear")
    assert timed(given, []) == given
    assert timed(given, [reading(0.5, ("gone", "identity"))]) == given, "of operators that there are none of now"
    assert timed(given, [reading(0.5, ("o0", "shortcut"))]) == given, "nor of replacements"


def test_what_is_read_again_and_again_is_believed() -> None:
    given = of_kinds("Conv2d", "Linear")
    found = timed(given, [reading(0.8, ("o0", "identity"))] * 200)
    left = predict_edits(found, [Edit(operator="o0", replacement="identity", options={})])
    assert left.latency_ms == pytest.approx(80, abs=0.5), "hooks said 90"
    assert found.total == given.total


def test_a_noisy_reading_changes_less_than_a_quiet_one() -> None:
    given = of_kinds("Conv2d")
    quiet, noisy = (timed(given, [reading(0.8, ("o0", "identity"), spread=spread)]) for spread in (0.01, 0.5))
    assert 10 < ms(noisy, "o0") < ms(quiet, "o0") <= 20


def test_what_one_operator_teaches_holds_for_its_kind_more_than_for_others() -> None:
    found = timed(of_kinds("Conv2d", "Conv2d", "Linear"), [reading(0.8, ("o0", "identity"))])
    assert ms(found, "o0") > ms(found, "o1") > ms(found, "o2") > 10


def test_a_block_takes_as_long_as_its_parts_and_its_own_rest() -> None:
    inner = [replace(operator(name, 10, "identity"), parent="block") for name in ("block.a", "block.b")]
    given = operators(operator("block", 30, "identity"), *inner)
    taught = timed(given, [reading(0.85, ("block.a", "identity"))])
    assert ms(taught, "block.a") > 11
    assert ms(taught, "block") - ms(taught, "block.a") - ms(taught, "block.b") >= 10
    whole = timed(given, [reading(0.6, ("block", "identity"))])
    assert ms(whole, "block.a") > 10, "what the block saves more may be its parts'"


def test_no_time_is_below_zero() -> None:
    found = timed(of_kinds("Conv2d", "Linear"), [reading(1.5, ("o0", "identity"))] * 50)
    assert ms(found, "o0") == 0
    assert all(each.cost.latency_ms >= 0 for o in found.operators for each in o.candidates)


def test_a_stand_in_that_keeps_a_child_takes_what_the_child_takes() -> None:
    child = replace(operator("block.child", 10, "identity"), parent="block", kind="Conv2d")
    block = operator("block", 30, "shortcut")
    kept = replace(block.candidates[0], options={"child": "child"}, cost=replace(block.candidates[0].cost, latency_ms=10.0))
    given = operators(replace(block, candidates=(kept,)), child)
    found = timed(given, [reading(0.85, ("block.child", "identity"))] * 20)
    assert found["block"].candidates[0].cost.latency_ms >= ms(found, "block.child") > 12


def test_what_other_layouts_change_of_what_stays_is_learned_beside() -> None:
    given = of_kinds("Conv2d", "Conv2d", "Attention")
    removed = [Edit(operator="o2", replacement="identity", options={})]
    quiet = Measurement(value=0.9, unit="", n=31, spread=0.0, how="")
    with_layouts = Reading.of(removed, replace(quiet, value=0.86), {"o0": True, "o1": True, "somewhere": True})
    times = learned(given, [Reading.of(removed, quiet, {}), with_layouts] * 20)
    assert times.latency(removed, {}) == pytest.approx(0.9, abs=0.002)
    assert times.latency(removed, {"o0": True, "o1": True}) == pytest.approx(0.86, abs=0.002)
    assert times.latency(removed, {"o1": True}) == pytest.approx(0.88, abs=0.002), "those of a kind alike"
    assert times.latency(removed, {"o1": False}) == pytest.approx(0.92, abs=0.002)


class Machine:
    """Takes for every kind another multiple of what hooks say, and something for every stand-in."""

    def __init__(self, given: Operators, factors: dict[str, float], call: float) -> None:
        self.given = replace(
            given,
            operators=tuple(
                replace(
                    o,
                    cost=replace(o.cost, latency_ms=o.cost.latency_ms * factors[o.kind]),
                    candidates=tuple(replace(c, cost=replace(c.cost, latency_ms=c.cost.latency_ms + call)) for c in o.candidates),
                )
                for o in given.operators
            ),
        )
        self.noise = random.Random(0)

    def latency(self, edits: Sequence[Edit]) -> float:
        return predict_edits(self.given, edits).latency_ms / self.given.total.latency_ms

    def read(self, edits: Sequence[Edit]) -> Reading:
        off = self.noise.gauss(1.0, 0.01)
        return Reading.of(edits, Measurement(value=off * self.latency(edits), unit="", n=15, spread=0.04, how="invented"), {})


def test_sixteen_random_plans_teach_what_other_plans_take() -> None:
    given = of_kinds(*["Conv2d", "Linear", "Attention", "GroupNorm"] * 10, ms=2.4)
    machine = Machine(given, {"Conv2d": 0.5, "Linear": 1.0, "Attention": 1.7, "GroupNorm": 0.7}, call=0.1)
    found = timed(given, [machine.read(edits) for edits in random_plans(given, 16)])

    def off(model: Operators, edits: Sequence[Edit]) -> float:
        return abs(predict_edits(model, edits).latency_ms / 100 - machine.latency(edits)) / machine.latency(edits)

    others = list(random_plans(given, 40, seed=1))
    before, after = ([off(model, edits) for edits in others] for model in (given, found))
    assert statistics.median(after) < 0.5 * statistics.median(before)
    assert max(after) < 0.1 < max(before)


def test_random_plans_are_drawn_alike_and_fill_the_range() -> None:
    given = of_kinds(*["Conv2d"] * 50, ms=2.0)
    plans = list(random_plans(given, 6))
    assert plans == list(random_plans(given, 6)) != list(random_plans(given, 6, seed=1))
    shares = sorted(predict_edits(given, edits).latency_ms / 100 for edits in plans)
    for place, found in enumerate(shares):
        target = LEAST + (MOST - LEAST) * (place + 0.5) / 6
        assert target - 0.02 < found <= target + 1e-9


def test_random_plans_run(ldm: Pipeline, operators: Operators) -> None:
    for edits in random_plans(operators, 4):
        check_edits(ldm.denoiser, edits, ldm.call(PROBE))


def test_what_comes_after_an_attention_that_goes_is_laid_otherwise(ldm: Pipeline, operators: Operators) -> None:
    call = ldm.call(PROBE)
    before = layouts(ldm.denoiser, call)
    assert before["conv_in"], "contiguous, as the latents are given"
    attention = next(o for o in operators.operators if o.kind == "Attention")
    edits = [Edit(operator=attention.name, replacement="identity", options=attention.candidate("identity").options)]
    changed = relaid(before, layouts(pruned_view(ldm.denoiser, edits, {}), call))
    assert changed
    assert all(now and not before[module] for module, now in changed.items())
    assert relaid(before, before) == {}
    assert relaid({"a": True}, {"a": True, "new": False}) == {}


def test_readings_are_kept_by_place_and_found_again(tmp_path: Path) -> None:
    first = Readings.kept({"device": "A", "threads": 1}, tmp_path)
    first.add(reading(0.7, ("a", "identity")))
    first.add(reading(0.5, ("b", DEAD)))
    assert Readings.kept({"threads": 1, "device": "A"}, tmp_path).held == first.held
    assert Readings.kept({"threads": 2, "device": "A"}, tmp_path).held == []


def test_what_a_killed_process_left_unfinished_costs_one_reading(tmp_path: Path) -> None:
    kept = Readings.kept({}, tmp_path)
    kept.add(reading(0.7, ("a", "identity")))
    assert kept.path is not None
    with kept.path.open("a", encoding="utf-8") as stream:
        stream.write('{"edits": [["b", "iden')
    again = Readings.kept({}, tmp_path)
    again.add(reading(0.6))
    assert [each.ratio for each in Readings.kept({}, tmp_path).held] == [0.7, 0.6]


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latencies").write_text("a file where a folder belongs", encoding="utf-8")
    readings = Readings(path=tmp_path / "latencies" / "some.jsonl")
    for ratio in (0.7, 0.6):
        readings.add(reading(ratio))
    assert [each.ratio for each in readings.held] == [0.7, 0.6]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["latencies are kept for this run only"]


@pytest.mark.parametrize("line", ["no JSON", '{"ratio": 1.0}', "[1]"])
def test_what_was_kept_and_cannot_be_read_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str) -> None:
    kept = Readings.kept({}, tmp_path)
    kept.add(reading(0.7))
    assert kept.path is not None
    kept.path.write_text(line + "\n", encoding="utf-8")
    again = Readings.kept({}, tmp_path)
    again.add(reading(0.5))
    assert len(again.held) == 1
    assert kept.path.read_text(encoding="utf-8") == line + "\n"
    assert "the latencies kept there cannot be read" in caplog.text


@pytest.fixture
def calibrated(ldm: Pipeline, operators: Operators) -> Callable[[int], Readings]:
    """Calibrate the tiny pipeline on readings kept in the test's cache."""
    call = ldm.call(PROBE)

    def run(count: int) -> Readings:
        readings = readings_on(ldm, call, operators)
        bench = Bench.of(ldm, call, operators, DeadCode(ldm.denoiser, call, operators), readings=readings)
        bench.calibrate(count=count, rounds=2)
        return readings

    return run


def test_calibration_measures_what_is_lacking_and_says_so(
    calibrated: Callable[[int], Readings], own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = calibrated(3)
    assert len(first.held) == 3
    assert "3 random plans are measured: of 3 readings that correct times, this device has 0" in caplog.text
    assert [path.parent.name for path in own_cache.rglob("*.jsonl")] == ["latencies"]
    caplog.clear()
    assert calibrated(3).held == first.held
    assert caplog.text == "", "nothing is lacking now"


def test_how_tensors_lie_is_looked_at_in_one_call_for_each_set_of_edits(
    ldm: Pipeline, operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ldm.call(PROBE)
    dead_code = DeadCode(ldm.denoiser, call, operators)
    bench = Bench.of(ldm, call, operators, dead_code, readings=readings_on(ldm, call, operators))
    first, second = (dead_code.completed(drawn) for drawn in random_plans(operators, 2))
    expected = [relaid(bench.laid, layouts(pruned_view(ldm.denoiser, edits, blank(edits)), call)) for edits in (first, second)]
    assert expected[0] != expected[1]
    looked = list[nn.Module]()

    def watched(denoiser: nn.Module, call: Call) -> dict[str, bool]:
        looked.append(denoiser)
        return layouts(denoiser, call)

    monkeypatch.setattr(calibration, "layouts", watched)
    bench.add(first, bench.measure(first, rounds=1))
    assert [bench.relaid(edits) for edits in (first, second, first, second)] == [*expected, *expected]
    assert len(looked) == 2


def test_where_calls_take_long_the_rest_waits_for_the_next_plan(
    calibrated: Callable[[int], Readings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(calibration, "PATIENCE_S", 0.0)
    assert [len(calibrated(3).held) for _ in range(4)] == [1, 2, 3, 3]
    assert "1 readings have to do for now: calls take long" in caplog.text


def test_plans_that_leave_room_for_repair_are_read_apart(ldm: Pipeline, operators: Operators) -> None:
    call = ldm.call(PROBE)
    readings_on(ldm, call, operators).add(reading(0.7))
    assert len(readings_on(ldm, call, operators).held) == 1
    assert readings_on(ldm, call, operators, "closed-form").held == []
    assert readings_on(ldm, ldm.call(PROBE, samples=2), operators).held == [], "nor is another batch"


def test_a_random_plan_that_does_not_run_is_passed_over(
    calibrated: Callable[[int], Readings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole, asked = Bench.measure, list[int]()

    def measure(self: Bench, edits: Sequence[Edit], *, rounds: int) -> Measurement:
        asked.append(len(edits))
        if len(asked) == 2:
            raise RuntimeError("The size of tensor a (3) must match")
        return whole(self, edits, rounds=rounds)

    monkeypatch.setattr(Bench, "measure", measure)
    assert len(calibrated(3).held) == 2
    assert "does not run, and tells nothing: The size of tensor a" in caplog.text
