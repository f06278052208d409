"""Plots of the evidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from lines import Group, Line, course, label
from methods import WAYS

mpl.use("agg")
from matplotlib import pyplot as plt

OURS = "ld-pruner"
NEAR = 0.2  # what a closer look shows lies this far from the original's distance, at most
COLOURS = (*(f"C{number}" for number in range(10)), "black", "gold", "navy", "crimson", "indigo")
PANELS = ("pruned", "distilled", "distilled, near the original")


def quality_by_latency(groups: Sequence[Group], original: Line, many: int, few: int, file: Path, *, title: str) -> None:
    """Fréchet distance against measured latency: before recovery, after it, and a closer look at that."""
    figure, sides = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for axes, panel in zip(sides, PANELS, strict=True):
        stage, _, near = panel.partition(", ")
        count = few if stage == "pruned" else many
        goal = original["figures"][str(count)]["frechet"]["value"]
        axes.axhline(goal, color="black", linewidth=0.8, linestyle=":")
        axes.plot([1.0], [goal], "k*", markersize=10, label="original")
        for method in dict.fromkeys(group.title for group in groups):
            mine = [group for group in groups if group.title == method]
            points = [(statistics.mean(g.plain(stage, "latency_ratio")), g.values(stage, "frechet", count)) for g in mine]
            points = sorted((x, values) for x, values in points if values)
            axes.errorbar(
                [x for x, _ in points],
                [statistics.mean(values) for _, values in points],
                yerr=[(max(values) - min(values)) / 2 for _, values in points],
                capsize=2,
                label=method,
                **_drawn(method),
            )
        axes.set(xlabel="measured latency / original's", ylabel=f"Fréchet distance, {count:,} samples", title=f"{title}, {panel}")
        if near:
            axes.set_ylim(goal * (1 - NEAR), goal * (1 + NEAR))
        else:
            _logarithmic(axes)
    sides[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, file)


def courses(lines: Sequence[Line], original: Line, few: int, file: Path, *, title: str) -> None:
    """Fréchet distance against steps of distillation, a panel a budget; what ends best is named first."""
    panels: dict[str, list[Line]] = {}
    for line in lines:
        panels.setdefault(f"latency {line['budget']}" if "method" in line else "controls", []).append(line)
    figure, sides = plt.subplots(len(panels), 1, figsize=(8, 3.6 * len(panels)), sharex=True, squeeze=False, layout="constrained")
    for axes, (panel, some) in zip(sides[:, 0], sorted(panels.items(), reverse=True), strict=True):
        axes.axhline(
            original["figures"][str(few)]["frechet"]["value"], color="black", linewidth=0.8, linestyle=":", label="original"
        )
        for line in sorted(some, key=lambda line: course(line, few)[-1]["frechet"]):
            points = course(line, few)
            steps, found = ([point[name] for point in points] for name in ("steps", "frechet"))
            axes.plot(steps, found, label=label(line), **_drawn(line.get("method", label(line))))
        axes.set(xlabel="steps of distillation", ylabel=f"Fréchet distance, {few:,} samples", title=f"{title}, {panel}")
        _logarithmic(axes)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, file)


def _drawn(method: str) -> Mapping[str, Any]:
    """One look for a method in every plot; the default is drawn heavily, and rivals are dashed."""
    number = list(WAYS).index(method) if method in WAYS else len(WAYS) + len(method)
    look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": "os^vDPX<>"[number % 9], "markersize": 5}
    default = method == next(iter(WAYS))
    return look | {
        "linestyle": "-" if method.startswith(OURS) else "--",
        "linewidth": 2.5 if default else 1,
        "zorder": 3 if default else 2,
    }


def _logarithmic(axes: Any) -> None:
    """A logarithmic axis that is not crowded with numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = math.log10(high / low) > 1
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5) if wide else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
