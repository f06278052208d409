"""`docs/evidence.md` from the lines of `results.jsonl`: tables, nothing that was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldpruner.evaluation import METRICS
from ldpruner.reporting import environment_line, estimate, percent

SHOWN = (
    "frechet",
    "kernel",
    "precision",
    "recall",
    "class-balance",
    "confidence",
    "class-accuracy",
    "retrieval-5",
    "latent-frechet",
    "latent-shift",
)
HEAD = """# Evidence: every method side by side

Made by `python evidence/run.py` from `evidence/results.jsonl`: each line of a table is a line there. Latency is that of one
denoiser call, measured in turn with the original's; all methods take the same operators, budgets, repair, distillation and data.
"""


def rendered(lines: Sequence[dict[str, Any]]) -> str:
    """The page: a table for every pipeline and every set of settings."""
    parts = [HEAD]
    for name in dict.fromkeys(line["pipeline"] for line in lines):
        mine = [line for line in lines if line["pipeline"] == name]
        for settings in {str(line["settings"]): line["settings"] for line in mine}.values():
            parts.append(_section(name, settings, [line for line in mine if line["settings"] == settings]))
    return "\n".join(parts)


def _section(name: str, settings: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    metrics = [metric for metric in SHOWN if any(metric in line["figures"] for line in lines)]
    titles = [f"{METRICS[metric].title} {'↓' if METRICS[metric].better == 'lower' else '↑'}" for metric in metrics]
    head = ["budget", "method", "seed", "stage", "latency", "parameters", "MACs", *titles]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rows += ["| " + " | ".join(_cells(line, metrics)) + " |" for line in sorted(lines, key=_place)]
    said = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in settings.items())
    return f"## zoo:{name}\n\n" + "\n".join(rows) + f"\n\nSettings: {said}. {environment_line(lines[-1]['environment'])}.\n"


def _place(line: dict[str, Any]) -> tuple[Any, ...]:
    stages = ("original", "fine-tuned", "pruned", "repaired", "distilled")
    return ("method" in line, line.get("budget", ""), line.get("method", ""), line.get("seed", 0), stages.index(line["stage"]))


def _cells(line: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    ratios = [percent(line[key]) if key in line else "100 %" for key in ("latency_ratio", "params_ratio", "macs_ratio")]
    found = [line["figures"].get(metric) for metric in metrics]
    figures = ["" if each is None or each["value"] is None else estimate(each["value"], each["error"]) for each in found]
    return [line.get("budget", ""), line.get("method", ""), str(line.get("seed", "")), line["stage"], *ratios, *figures]
