"""What recovery was to reach, and whether what was measured holds it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from lines import UNSEEN, Figures, Group, Line, course

from ldpruner.evaluation import METRICS
from ldpruner.reporting import percent

OURS = "ld-pruner, sweep"
LIMIT = 0.651  # the paper takes 34.9 % less time
BETTER = 0.948  # and its Fréchet distance is 5.2 % lower
TOLERATED = 0.03  # by which a second metric may be worse
NOT_MEASURED = "not measured"


def claims(groups: Sequence[Group], original: Line, seconds: Sequence[str], many: int, few: int) -> Iterator[tuple[str, str, str]]:
    """What was asked, whether it holds, and the figures that say so; means over seeds."""
    own: Figures = original["figures"][str(many)]
    goal = own["frechet"]["value"]
    by_place = {(group.title, group.budget): group for group in groups if group.stages.get("distilled")}
    ours = by_place.get((OURS, "65%"))
    if ours is not None:
        found = ours.values("distilled", "frechet", many)
        ratio = statistics.mean(found) / goal
        readings = [ours.plain("distilled", name) for name in ("latency_ratio", "latency_alone")]
        slowest = [max(values) for values in readings if values]
        said = ", alone ".join(map(percent, slowest))
        yield "latency at most 65.1 %", _holds(max(slowest) <= LIMIT), f"{said}, the slowest of {len(found)}"
        yield "Fréchet distance no worse than the original's", _holds(ratio <= 1), percent(ratio)
        yield "aim: 5.2 % better", _holds(ratio <= BETTER), percent(ratio)
        losses = {name: _loss(ours, own, name, many) for name in seconds}
        worst = max(losses, key=losses.__getitem__)
        said = f"furthest behind: {worst}, {losses[worst] * 100:+.1f} % worse" if losses[worst] > 0 else "all are better"
        yield "no second metric more than 3 % worse", _holds(losses[worst] <= TOLERATED), said
        own_samples = [ours.plain("repaired", name) for name in ("latent_shift_before_repair", "latent_shift")]
        others = [ours.values(stage, "latent-shift", few) for stage in ("pruned", "repaired")]
        whole = [line["shifts"][-1] for line in ours.stages["repaired"] if line.get("shifts")]
        shown = {"the plan's own samples": own_samples, f"{few:,} others": others}
        if whole:
            shown[f"{whole[0]['samples']:,} others"] = [[row[stage] for row in whole] for stage in ("pruned", "repaired")]
        for of_what, (before, after) in shown.items():
            left = statistics.mean(last / first for first, last in zip(before, after, strict=True))
            yield f"repair at least halves the joint latent shift, of {of_what}", _holds(left <= 0.5), f"{percent(left)} is left"
        rivals = [group for (title, budget), group in by_place.items() if budget == "65%" and not title.startswith("ld-pruner")]
        if rivals:
            yield from _against(ours, rivals, many, few, original["figures"][str(few)]["frechet"]["value"])
    half = by_place.get((OURS, "50%"))
    ratio = statistics.mean(half.values("distilled", "frechet", many)) / goal if half else 0.0
    reached = f"{percent(ratio)}, at latency {percent(max(half.plain('distilled', 'latency_ratio')))}" if half else ""
    yield "at 50 %: Fréchet distance no worse", _holds(ratio <= 1) if half else NOT_MEASURED, reached


def _against(ours: Group, rivals: Sequence[Group], many: int, few: int, goal: float) -> Iterator[tuple[str, str, str]]:
    nearest = min(rivals, key=lambda group: statistics.mean(group.values("distilled", "frechet", many)))
    mine, other = (group.values("distilled", "frechet", many) for group in (ours, nearest))
    said = f"{min(mine):.4g} to {max(mine):.4g}, {nearest.title} {min(other):.4g} to {max(other):.4g}, of {len(rivals)} rivals"
    yield "every seed better than every seed of every rival", _holds(max(mine) < min(other)), said
    steps = {group.title: _steps(group, few, goal) for group in (ours, *rivals)}
    fastest = min(rivals, key=lambda group: steps[group.title])
    told = [f"{title} {steps[title]:g}" for title in (OURS, fastest.title)]
    yield "no rival in fewer steps at the original's quality", _holds(steps[OURS] <= steps[fastest.title]), ", ".join(told)


def _steps(group: Group, few: int, goal: float) -> float:
    """After how many steps seed 0 had reached the original's Fréchet distance, of those at which it was measured."""
    points = [point for line in group.stages["distilled"] if line.get("course") for point in course(line, few)]
    return min((point["steps"] for point in points if point["frechet"] <= goal), default=float("inf"))


def _loss(group: Group, own: Figures, metric: str, many: int) -> float:
    """By which share of the original's a metric is worse; negative: better."""
    ratio = statistics.mean(group.values("distilled", metric, many)) / own[metric]["value"]
    name = metric.removeprefix(UNSEEN)
    return 1 - ratio if name in METRICS and METRICS[name].better == "higher" else ratio - 1


def _holds(it_does: bool) -> str:
    return "yes" if it_does else "**no**"
