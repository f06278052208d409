"""What the evidence page says holds is read from figures, and so can fail."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OWN = {"frechet": 1.0, "precision": 0.9, "class-balance": 0.8, "latent-shift": 0.4}
FEW, MANY = 5, 20


@pytest.fixture(autouse=True)
def evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "evidence")


def line(method: str, frechet: float, *, budget: str = "65%", seed: int = 0, **others: Any) -> list[dict[str, Any]]:
    """A method's lines."""
    figures = {**OWN, "frechet": frechet, **others.pop("figures", {})}
    shared = {"method": method, "budget": budget, "seed": seed, "latency_ratio": 0.64, "latent_shift": 0.4}
    shared |= {"latent_shift_before_repair": 1.0, "settings": {"distil_steps": 100}, **others}
    reached = {str(count): {name: {"value": value} for name, value in figures.items()} for count in (FEW, MANY)}
    before = {str(FEW): reached[str(FEW)] | {"latent-shift": {"value": 1.0}}}
    course = [{"steps": 0, "figures": {"frechet": {"value": 2.0}}}] if seed == 0 else []
    learnt = {"course": course, "distillation": {"steps": 100}}
    stages = [{**shared, "stage": "pruned", "figures": before}, {**shared, "stage": "repaired", "figures": reached}]
    return [*stages, {**shared, "stage": "distilled", "figures": reached, **learnt}]


def claimed(*lines: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    from claims import claims
    from lines import grouped

    original = {"figures": {str(count): {name: {"value": value} for name, value in OWN.items()} for count in (FEW, MANY)}}
    rows = claims(grouped(itertools.chain(*lines)), original, ["precision", "class-balance"], MANY, FEW)
    return {asked: (holds, said) for asked, holds, said in rows}


def test_what_holds_is_said_to_hold() -> None:
    ours = line("ld-pruner, sweep", 0.9), line("ld-pruner, sweep", 0.92, seed=1)
    made = claimed(*ours, line("random", 1.4), line("ld-pruner, sweep", 1.0, budget="50%"))
    assert {holds for holds, _ in made.values()} == {"yes"}
    assert made["every seed better than every seed of every rival"][1] == "0.9 to 0.92, random 1.4 to 1.4, of 1 rivals"
    assert made["no rival in fewer steps at the original's quality"][1] == "ld-pruner, sweep 100, random inf"


@pytest.mark.parametrize(
    ("asked", "changed"),
    [
        ("latency at most 65.1 %", {"latency_ratio": 0.652}),
        ("latency at most 65.1 %", {"latency_alone": 0.652}),
        ("no second metric more than 3 % worse", {"figures": {"precision": 0.86}}),
        ("repair at least halves the joint latent shift, of the plan's own samples", {"latent_shift": 0.51}),
        ("repair at least halves the joint latent shift, of 5 others", {"figures": {"latent-shift": 0.51}}),
        (
            "repair at least halves the joint latent shift, of 80 others",
            {"shifts": [{"samples": 40, "pruned": 1.0, "repaired": 0.4}, {"samples": 80, "pruned": 1.0, "repaired": 0.51}]},
        ),
    ],
)
def test_what_does_not_hold_is_said_not_to(asked: str, changed: dict[str, Any]) -> None:
    made = claimed(line("ld-pruner, sweep", 0.9, **changed))
    assert [each for each, (holds, _) in made.items() if holds == "**no**"] == [asked]


def test_a_worse_distance_misses_every_claim_about_it() -> None:
    made = claimed(line("ld-pruner, sweep", 1.1), line("random", 1.05), line("ld-pruner, sweep", 1.1, budget="50%"))
    assert sum(holds == "**no**" for holds, _ in made.values()) == 4
    assert made["aim: 5.2 % better"] == ("**no**", "110.0 %")


def test_what_was_not_measured_is_not_claimed() -> None:
    assert claimed(line("random", 1.4)) == {"at 50 %: Fréchet distance no worse": ("not measured", "")}
