"""Plots of the evidence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from lines import Group, Line, course, label

mpl.use("agg")
from matplotlib import pyplot as plt

OURS = "ld-pruner"


def quality_by_latency(groups: Sequence[Group], original: Line, many: int, few: int, file: Path, *, title: str) -> None:
    """Fréchet distance against measured latency: left before recovery, right after it."""
    figure, sides = plt.subplots(1, 2, figsize=(11, 4.4), sharey=False, layout="constrained")
    for axes, stage, count in zip(sides, ("pruned", "distilled"), (few, many), strict=True):
        goal = original["figures"][str(count)]["frechet"]["value"]
        axes.axhline(goal, color="black", linewidth=0.8, linestyle=":")
        axes.plot([1.0], [goal], "k*", markersize=10, label="original")
        for number, method in enumerate(dict.fromkeys(group.title for group in groups)):
            mine = [group for group in groups if group.title == method]
            points = [(statistics.mean(g.plain(stage, "latency_ratio")), g.values(stage, "frechet", count)) for g in mine]
            points = sorted((x, values) for x, values in points if values)
            ours = method.startswith(OURS)
            axes.errorbar(
                [x for x, _ in points],
                [statistics.mean(values) for _, values in points],
                yerr=[(max(values) - min(values)) / 2 for _, values in points],
                marker="o" if ours else "sv^<>DPX"[number % 8],
                linestyle="-" if ours else "--",
                linewidth=1,
                capsize=2,
                color=f"C{number % 10}",
                label=method,
            )
        axes.set(xlabel="measured latency / original's", ylabel=f"Fréchet distance, {count:,} samples", title=f"{title}, {stage}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        axes.yaxis.set_minor_formatter(mpl.ticker.ScalarFormatter())
        axes.tick_params(axis="y", which="both", labelsize=7)
    sides[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, file)


def courses(lines: Sequence[Line], original: Line, few: int, file: Path, *, title: str) -> None:
    """Fréchet distance against steps of distillation."""
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    axes.axhline(original["figures"][str(few)]["frechet"]["value"], color="black", linewidth=0.8, linestyle=":", label="original")
    for number, line in enumerate(lines):
        points = course(line, few)
        style = "-" if str(line.get("method", "")).startswith(OURS) else "--"
        axes.plot(
            [point["steps"] for point in points],
            [point["frechet"] for point in points],
            "osv^<>DPX"[number % 9] + style,
            markersize=4,
            linewidth=1,
            color=f"C{number % 10}",
            label=label(line),
        )
    axes.set(xlabel="steps of distillation", ylabel=f"Fréchet distance, {few:,} samples", title=title)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(mpl.ticker.ScalarFormatter())
    axes.yaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
