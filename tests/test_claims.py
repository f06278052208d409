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


def two(method: str, fashion: float, digits: float, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of one method on two pipelines."""
    settings = {"samples": MANY, "distil_steps": 100}
    both = [line(method, fashion, seed=seed, settings=settings), line(method, digits, seed=seed, settings=settings)]
    return [{**each, "pipeline": name} for name, lines in zip(("fashion", "digits"), both, strict=True) for each in lines]


def originals(stage: str, fashion: float, digits: float, steps: int) -> list[dict[str, Any]]:
    shared = {"stage": stage, "seed": 0, "settings": {"samples": MANY, "distil_steps": steps}}
    found = {"fashion": fashion, "digits": digits}
    return [{**shared, "pipeline": name, "figures": {str(MANY): {"frechet": {"value": found[name]}}}} for name in found]


def summed(lines: list[dict[str, Any]]) -> dict[str, list[str]]:
    from summary import summary

    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in summary(lines).splitlines() if row]
    return {row[0]: row[1:] for row in rows}


def test_one_figure_a_method_is_the_geometric_mean_beside_the_originals() -> None:
    lines = originals("original", 1.0, 4.0, 100) + two("ld-pruner, sweep", 0.5, 8.0) + two("ld-pruner, sweep", 0.5, 2.0, seed=1)
    rows = summed(lines + two("random", 0.9, 4.0)[:3] + two("laptop-diff", 0.5, 1.0))
    assert rows["original"] == ["1.0000", "4.0000", "100.0 %"]
    assert rows["ldpruner's default"] == ["0.5000, 0.5000", "8.0000, 2.0000", "75.0 ± 25.0 %"]
    assert rows["random"] == ["0.9000", "", ""]  # one pipeline lacks it, so there is no figure for all
    assert [name for name in rows if name in ("random", "LAPTOP-Diff's knapsack", "ldpruner's default")] == [
        "LAPTOP-Diff's knapsack",
        "ldpruner's default",
        "random",
    ]


def test_students_stand_beside_originals_that_were_taught_for_as_long() -> None:
    lines = originals("original", 1.0, 4.0, 100) + two("ld-pruner, sweep", 0.5, 8.0)
    rows = summed(lines + originals("fine-tuned", 0.9, 3.6, 100) + originals("fine-tuned", 0.1, 0.4, 300))
    assert rows["original, taught the same way"] == ["0.9000", "3.6000", "90.0 %"]


def test_networks_from_random_weights_stand_below_the_methods() -> None:
    lines = originals("original", 1.0, 4.0, 100) + two("ld-pruner, sweep", 0.5, 8.0)
    random = originals("from random weights", 9.0, 16.0, 100)
    rows = summed(lines + [{**each, "network": "ld-pruner, sweep, 65%"} for each in random])
    assert rows["the default's network, from random weights"] == ["9.0000", "16.0000", "600.0 %"]
    assert "the default's first plan, taught again" not in rows


def test_the_readme_shows_what_the_lines_say() -> None:
    from page import known_lines
    from summary import put_into, summary

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert put_into(readme, summary(known_lines(ROOT / "evidence" / "results"))) == readme
    with pytest.raises(ValueError, match="from here on"):
        put_into("no marks", "")
