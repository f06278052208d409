"""Structural priors: what selection leaves alone because of where it stands."""

from __future__ import annotations

import pytest

from conftest import PROBE
from invented import ZERO, chosen
from ldpruner import planning, score
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Candidate, Cost, Operator, Operators, Score
from ldpruner.selection import Priors, choose
from ldpruner.selection.priors import stages


def block(name: str, ms: float, stage: str, *, of: str = "") -> Operator:
    return Operator(
        name=name,
        kind="Block",
        input_shape=(1, 1),
        output_shape=(1, 1),
        cost=Cost(params=int(ms), macs=int(ms), latency_ms=ms),
        parent=None,
        candidates=(Candidate(replacement="identity", options=ZERO, cost=Cost()),),
        if_dead=None,
        block=of or ("" if name == stage else name),
        stage=stage,
    )


def denoiser(*found: Operator) -> Operators:
    return Operators(model="m", denoiser="D", total=Cost(params=100, macs=100, latency_ms=100.0), device="cpu", operators=found)


FOUR = denoiser(*(block(f"down.0.{n}", 10, "down.0") for n in range(4)), *(block(f"up.0.{n}", 10, "up.0") for n in range(3)))


def scores(operators: Operators, *values: float) -> list[Score]:
    return [
        Score(operator=o.name, replacement="identity", score=v, seconds=0.0)
        for o, v in zip(operators.operators, values, strict=True)
    ]


RISING = scores(FOUR, 1, 2, 3, 4, 5, 6, 7)


def test_no_prior_leaves_the_order_as_it_is() -> None:
    assert chosen(choose(FOUR, RISING, {"latency": 0.7})) == ["down.0.0", "down.0.1", "down.0.2"]
    assert str(Priors()) == ""


def test_the_ends_of_every_stage_stay_whole() -> None:
    kept = choose(FOUR, RISING, {"latency": 0.5}, priors=Priors(protect_ends=1))
    assert chosen(kept) == ["down.0.1", "down.0.2", "up.0.1"]
    assert kept.exhausted, "nothing else may go, and it says so"


def test_a_part_of_a_protected_block_stays_and_so_does_what_holds_one() -> None:
    nested = denoiser(
        block("down.0", 40, "down.0"),
        block("down.0.0", 10, "down.0"),
        block("down.0.0.conv", 5, "down.0", of="down.0.0"),
        block("down.0.1", 10, "down.0"),
        block("down.0.2", 10, "down.0"),
    )
    kept = choose(nested, scores(nested, 1, 2, 3, 9, 4), {"latency": 0.5}, priors=Priors(protect_ends=1))
    assert chosen(kept) == ["down.0.1"]


def test_no_stage_gives_more_than_its_cap() -> None:
    capped = choose(FOUR, RISING, {"latency": 0.5}, priors=Priors(stage_cap=0.5))
    assert chosen(capped) == ["down.0.0", "down.0.1", "up.0.0"]


def test_cuts_are_spread_over_a_stage() -> None:
    spread = choose(FOUR, RISING, {"latency": 0.5}, priors=Priors(apart=1))
    assert chosen(spread) == ["down.0.0", "down.0.2", "up.0.0", "up.0.2"]


@pytest.mark.parametrize("wrong", [{"protect_ends": -1}, {"apart": -1}, {"stage_cap": 0.0}, {"stage_cap": 1.1}])
def test_a_prior_without_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="protect_ends and apart are 0 or more, stage_cap is above 0 and at most 1"):
        Priors(**wrong)  # type: ignore[arg-type]


def test_stages_and_blocks_come_from_the_denoiser_and_the_plan_names_its_priors(ldm: Pipeline, operators: Operators) -> None:
    found = stages(operators)
    assert found["down_blocks.1"] == ["down_blocks.1.resnets.0", "down_blocks.1.attentions.0"]
    assert "mid_block" in found
    assert operators["mid_block"].stage == "mid_block"
    assert operators["down_blocks.1.resnets.0.conv1"].block == "down_blocks.1.resnets.0"
    run = score(ldm, PROBE, method="magnitude", operators=operators, replacements=["identity", "shortcut"])
    plan = planning.plan(ldm, run, {"params": "90%"}, selection="order", priors=Priors(apart=1)).plan
    assert plan.selection == "magnitude/order/apart=1"
    assert Operators.from_json(operators.to_json()) == operators
