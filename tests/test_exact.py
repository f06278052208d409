"""The exact selections: of all sets that meet the budgets, the one of least harm."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from invented import chosen, denoiser, operator, operators, scored, sets
from ldpruner.errors import BudgetError
from ldpruner.plans import Candidate, Quantity
from ldpruner.quiet import printing_nothing
from ldpruner.selection import OBJECTIVES, Priors, choose, predict, reachable
from ldpruner.selection.choice import share

PLAIN = operators(operator("a", 10, "identity"), operator("b", 30, "identity"), operator("c", 20, "identity"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("priors", [Priors(), Priors(apart=1), Priors(stage_cap=0.4)])
def test_no_other_set_that_meets_the_budgets_does_less_harm(seed: int, priors: Priors) -> None:
    model, scores = denoiser(seed)
    by_key = {entry.key: entry for entry in scores}
    targets: dict[Quantity, float] = {"latency": 0.85, "params": 0.84}
    harm_of: dict[str, Callable[[float, float], float]] = {
        "exact": lambda score, _: score,
        "error-exact-2": lambda _, error: error**2,
        "both-exact": lambda score, error: math.sqrt(score * error),
    }

    def harm(taken: Mapping[str, Candidate], objective: str) -> float:
        values = [by_key[name, candidate.replacement] for name, candidate in taken.items()]
        return sum(harm_of[objective](value.score, value.output_error or 0.0) for value in values)

    fit = [
        taken
        for taken in sets(model)
        if priors.allow(taken, model, "latency")
        and priors.allow(taken, model, "params")
        and all(share(predict(model, dict(taken)), model.total, quantity) <= target for quantity, target in targets.items())
    ]
    assert fit or priors != Priors(), "without priors the budgets can be met"
    assert {} not in fit, "and not by leaving all as it is"
    for objective in harm_of:
        choice = choose(model, scores, targets, selection=objective, priors=priors)
        if not fit:
            assert choice.exhausted
            continue
        taken = {e.operator: model[e.operator].candidate(e.replacement) for e in choice.edits if e.reason == "chosen"}
        assert taken in fit
        assert harm(taken, objective) <= min(harm(other, objective) for other in fit) * 1.001


def test_it_weighs_what_an_order_takes_one_after_the_other() -> None:
    values = scored(("a", "identity", 1.0), ("b", "identity", 2.5), ("c", "identity", 2.0))
    assert chosen(choose(PLAIN, values, {"latency": 0.75}, selection="order")) == ["a", "c"]
    assert chosen(choose(PLAIN, values, {"latency": 0.75}, selection="exact")) == ["b"], "2.5 against 3"
    assert choose(PLAIN, values, {"latency": 0.7}, selection="exact").predicted["latency"] == pytest.approx(0.7), "to the digit"


def test_a_high_power_would_rather_take_many_small_harms_than_a_large_one() -> None:
    values = scored(("a", "identity", 2.0), ("b", "identity", 2.5), ("c", "identity", 2.0))
    taken = {name: chosen(choose(PLAIN, values, {"latency": 0.75}, selection=name)) for name in ("exact", "exact-2", "exact-3")}
    assert taken == {"exact": ["b"], "exact-2": ["b"], "exact-3": ["b"]}, "2.5 against 4, 6.25 against 8, 15.6 against 16"
    values = scored(("a", "identity", 2.0), ("b", "identity", 2.9), ("c", "identity", 2.0))
    assert chosen(choose(PLAIN, values, {"latency": 0.75}, selection="exact-3")) == ["a", "c"], "24.4 against 16"


def test_what_does_no_harm_but_saves_nothing_that_is_needed_is_left_alone() -> None:
    values = scored(("a", "identity", 0.0), ("b", "identity", 1.0), ("c", "identity", 0.0))
    assert chosen(choose(PLAIN, values, {"latency": 0.82}, selection="exact")) == ["c"]


def test_out_of_reach_it_takes_what_saves_most() -> None:
    model, scores = denoiser(0)
    choice = choose(model, scores, {"latency": 0.0}, selection="exact")
    assert choice.exhausted
    least = min(share(predict(model, dict(taken)), model.total, "latency") for taken in sets(model))
    assert choice.predicted["latency"] == pytest.approx(least)
    aims = reachable(model, scores, "latency", selection="exact")
    assert aims == sorted(aims, reverse=True)
    assert aims[-1] == pytest.approx(least)


@pytest.mark.parametrize("selection", ["order", "exact"])
def test_a_quantity_that_was_not_measured_has_no_share(selection: str) -> None:
    model, scores = denoiser(0)
    untimed = replace(model, total=replace(model.total, latency_ms=0.0))
    with pytest.raises(BudgetError, match="latency: was not measured"):
        choose(untimed, scores, {"latency": 0.8}, selection=selection)


def test_what_c_code_prints_meanwhile_does_not_arrive(capfd: pytest.CaptureFixture[str]) -> None:
    with printing_nothing():
        os.write(1, b"noise")
    os.write(1, b"a result")
    assert capfd.readouterr().out == "a result"


def test_the_objectives_are_there_with_a_second_opinion_too() -> None:
    assert len(list(OBJECTIVES)) == 9
    model, scores = denoiser(1)
    plans = {str(chosen(choose(model, scores, {"latency": 0.8}, selection=name))) for name in OBJECTIVES}
    assert len(plans) > 1
