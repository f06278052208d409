"""The lines of `evidence/results/`, and how they belong together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from methods import WAYS

Line = dict[str, Any]
Figures = dict[str, dict[str, float]]  # by metric, what was found and its error
UNSEEN = "unseen-"  # before the name of a metric: of captions that no training picture has
OF_CAPTIONS = ("retrieval-5", "class-accuracy")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The lines of one method at one budget, taught for as many steps; one a seed, for each stage."""

    title: str
    budget: str
    steps: int
    stages: dict[str, list[Line]]

    def values(self, stage: str, metric: str, count: int) -> list[float]:
        found = (line["figures"].get(str(count), {}).get(metric) for line in self.stages.get(stage, []))
        return [each["value"] for each in found if each is not None]

    def plain(self, stage: str, name: str) -> list[float]:
        return [line[name] for line in self.stages.get(stage, []) if line.get(name) is not None]


def place_of(method: str, budget: str, seed: int) -> str:
    """What files of one plan are called."""
    return f"{method}-{budget}-{seed}".replace("%", "").replace(", ", "-").replace(" ", "-")


def grouped(lines: Iterable[Line]) -> list[Group]:
    """Methods in the order of `WAYS`, budget by budget, the gentlest first."""
    found: dict[tuple[str, int, str], dict[str, list[Line]]] = {}
    for line in lines:
        if line["stage"] in ("pruned", "repaired", "distilled"):
            key = line["budget"], line["settings"]["distil_steps"], line["method"]
            found.setdefault(key, {}).setdefault(line["stage"], []).append(line)
    ordered = sorted(found, key=lambda key: (-float(key[0].rstrip("%")), key[1], list(WAYS).index(key[2])))
    return [
        Group(title=method, budget=budget, steps=steps, stages=found[budget, steps, method]) for budget, steps, method in ordered
    ]


def course(line: Line, few: int) -> list[dict[str, float]]:
    """Steps and Fréchet distances of a student, the last included."""
    points = [{"steps": point["steps"], "frechet": point["figures"]["frechet"]["value"]} for point in line["course"]]
    return [*points, {"steps": line["distillation"]["steps"], "frechet": line["figures"][str(few)]["frechet"]["value"]}]


def label(line: Line) -> str:
    """What a line is called beside others."""
    if "method" in line:
        return f"{line['method']}, {line['budget']}"
    if line["stage"] == "from random weights":
        return f"{line['network']}, from random weights"
    if line["stage"] == "fine-tuned":
        return f"original, taught for {line['settings']['distil_steps']:,} steps"
    return str(line["stage"])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown, the first one their head."""
    head, *body = rows
    whole = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in whole) + "\n"
