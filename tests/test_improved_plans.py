"""A sweep's plan is improved on the joint shift: what is taken then, and what happens where the measured latency misses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from conftest import PROBE
from ldpruner import planning, score
from ldpruner.improving import Improved, Improver
from ldpruner.judging import JointShift
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit
from ldpruner.scoring import Run
from ldpruner.surgery import Fitted
from test_measured_plans import SlowMachine, timed_by_macs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Run]:
    from conftest import ldm_operators, tiny_ldm

    pipeline = Pipeline(tiny_ldm(), source="tiny-ldm")
    return pipeline, score(pipeline, PROBE, operators=ldm_operators(), out=tmp_path_factory.mktemp("run"))


def test_the_best_plan_of_a_sweep_is_improved_where_together_edits_do_other_than_alone(
    run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, scores = run
    plain = planning.plan(pipeline, scores, {"params": "60%"}, selection="sweep").plan
    clash = {edit.operator for edit in plain.edits}

    def harm(_: JointShift, edits: Sequence[Edit], fitted: Fitted) -> float:
        return 1.0 + 0.1 * len(edits) + 10.0 * (clash <= {edit.operator for edit in edits})

    monkeypatch.setattr(JointShift, "of", harm)
    monkeypatch.setattr(planning, "EVALUATIONS", 30)
    improved = planning.plan(pipeline, scores, {"params": "60%"}, selection="improved").plan
    assert improved.predicted["params"] <= 0.6
    assert not clash <= {edit.operator for edit in improved.edits}
    assert improved.selection.endswith(", improved")


def test_an_improved_plan_is_improved_again_where_the_measured_latency_misses(
    run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, scores = run[0], timed_by_macs(run[1])
    machine = SlowMachine(scores.operators, overhead=0.3)
    monkeypatch.setattr(planning._Search, "_measure", machine.measure)
    monkeypatch.setattr(planning, "FINALISTS", 1)
    asked = list[int]()
    found = Improver.improved

    def counted(improver: Improver, *given: Any, **allowed: int) -> Improved:
        asked.append(allowed["allowance"])
        return found(improver, *given, **allowed)

    monkeypatch.setattr(Improver, "improved", counted)
    planned = planning.plan(pipeline, scores, {"latency": "75%"}, selection="improved")
    assert planned.measured is not None
    assert planned.measured.ratio.value <= 0.75
    assert planned.plan.selection.endswith(", improved")
    assert planned.plan.predicted["latency"] < 0.66, "the prediction alone would have stopped at 75 %"
    assert asked[:1] == [planning.EVALUATIONS]
    assert set(asked[1:]) == {planning.MORE}
