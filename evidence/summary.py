"""What recovery came to on all pipelines, side by side: tables that the README and the page share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from claims import OURS
from lines import Line, markdown_table
from methods import WAYS

from ldpruner.reporting import percent

BEGIN = "<!-- from here on written by `python evidence/page.py --readme README.md` -->"
END = "<!-- up to here -->"
ORIGINAL, TAUGHT = "original", "original, taught the same way"
BESIDE = {
    "the default's first plan, taught again": "taught again",
    "the default's network, from random weights": "from random weights",
}
NAMES = ("fashion", "emoji", "digits")

Seeds = dict[str, dict[int, float]]  # by pipeline, what each seed came to


def summary(lines: Sequence[Line]) -> str:
    """A table a budget, the gentlest first: Fréchet distances after distillation, one figure a seed."""
    budgets = {line["budget"] for line in lines if line["stage"] == "distilled"}
    return "\n".join(markdown_table(list(_rows(lines, budget))) for budget in sorted(budgets, key=_share, reverse=True))


def put_into(text: str, tables: str) -> str:
    """The text with `tables` between its marks. Raises `ValueError` where it has none."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"no {BEGIN!r} and {END!r} in that order")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def overall(seeds: Seeds, own: Mapping[str, float]) -> list[float]:
    """A figure for each seed that every pipeline has: the geometric mean of Fréchet distances, each divided by the original's."""
    shared = set.intersection(*(set(seeds.get(name, {})) for name in own))
    return [statistics.geometric_mean([seeds[name][seed] / own[name] for name in own]) for seed in sorted(shared)]


def _rows(lines: Sequence[Line], budget: str) -> Iterator[list[str]]:
    """The originals, then methods by what they come to on all pipelines; last those that some pipeline lacks."""
    students = [line for line in lines if line["stage"] == "distilled" and line["budget"] == budget]
    own = {line["pipeline"]: _frechet(line) for line in lines if line["stage"] == ORIGINAL}
    names = [name for name in NAMES if name in own]
    yield [f"latency at most {budget.replace('%', ' %')}", *(f"`zoo:{name}`" for name in names), "all, beside the original"]
    found: dict[str, Seeds] = {ORIGINAL: {name: {0: own[name]} for name in names}, TAUGHT: _controls(lines, students)}
    for method in WAYS:
        found[method] = _by_seed(line for line in students if line["method"] == method)
    yield from (_row(title, found[title], own, names) for title in (ORIGINAL, TAUGHT))
    means = {method: overall(found[method], own) for method in WAYS if found[method]}
    for method in sorted(means, key=lambda each: statistics.mean(means[each]) if means[each] else float("inf")):
        yield _row(WAYS[method].title, found[method], own, names)
    for title, stage in BESIDE.items():
        seeds = _by_seed(line for line in lines if line["stage"] == stage and line["network"] == f"{OURS}, {budget}")
        if seeds:
            yield _row(title, seeds, own, names)
    latencies = [[line for line in students if (line["method"], line["pipeline"]) == (OURS, name)] for name in names]
    yield ["latency of the default's plans, alone", *(", ".join(map(_alone, each)) for each in latencies), ""]


def _row(title: str, seeds: Seeds, own: Mapping[str, float], names: Sequence[str]) -> list[str]:
    cells = [", ".join(f"{value:.4f}" for _, value in sorted(seeds.get(name, {}).items())) for name in names]
    means = overall(seeds, own)
    half = (max(means) - min(means)) / 2 if means else 0.0
    said = percent(statistics.mean(means)) if means else ""
    return [title, *cells, said.replace(" %", f" ± {half * 100:.1f} %") if half else said]


def _controls(lines: Sequence[Line], students: Sequence[Line]) -> Seeds:
    """The originals that were taught for as many steps as the students were."""
    steps = {line["pipeline"]: line["settings"]["distil_steps"] for line in students}
    return _by_seed(
        line for line in lines if line["stage"] == "fine-tuned" and line["settings"]["distil_steps"] == steps.get(line["pipeline"])
    )


def _by_seed(lines: Iterable[Line]) -> Seeds:
    found: Seeds = {}
    for line in lines:
        found.setdefault(line["pipeline"], {})[line["seed"]] = _frechet(line)
    return found


def _frechet(line: Line) -> float:
    value: float = line["figures"][str(line["settings"]["samples"])]["frechet"]["value"]
    return value


def _alone(line: Line) -> str:
    measured = line.get("latency_alone")
    return percent(measured) if measured else "not measured"


def _share(budget: str) -> float:
    return float(budget.rstrip("%"))
