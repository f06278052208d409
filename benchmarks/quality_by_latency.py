"""How good each pipeline of the zoo is, and what pruning it further and further does to it, with nothing done to recover.

    python benchmarks/quality_by_latency.py --out docs

For every pipeline: score its operators once, prune it to 90 %, 80 % and 65 % of its latency, measure each result with
`ldpruner.evaluation` (the judge that ships, and the original's samples for the same seeds), and write `docs/zoo.json`,
`docs/zoo.md`, a picture and, for sound, WAV files. Scores, samples and features are kept in `--work`: a run that stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

import ldpruner
from ldpruner.environment import environment
from ldpruner.evaluation import METRICS, Evaluation, evaluate
from ldpruner.files import write_json, write_text
from ldpruner.opening import locate
from ldpruner.pipelines import Pipeline
from ldpruner.reporting import environment_line, estimate, grid, percent, upright_spectrogram
from ldpruner.sound import write_wav
from ldpruner.zoo.looks import joined, look

NAMES = ("fashion", "emoji", "digits")


def main() -> None:
    options = arguments()
    names = ("samples", "steps", "score_samples", "score_steps", "budgets")
    settings = {name: getattr(options, name) for name in names}
    before = options.out / "zoo.json"
    kept = json.loads(before.read_text(encoding="utf-8")) if before.exists() else {}
    found = dict(kept["models"]) if kept.get("settings") == settings else {}
    for name in options.names:
        found[name] = ladder(name, options)
        page = {"settings": settings, "models": {known: found[known] for known in NAMES if known in found}}
        write_json(before, page)
        write_text(options.out / "zoo.md", rendered(page))
    json.dump({"out": str(options.out), "models": list(options.names)}, sys.stdout)
    print()


def ladder(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One pipeline, the original and pruned to every budget, with pictures of the same seeds."""
    model = options.model or f"zoo:{name}"
    original = ldpruner.load(model)
    run = ldpruner.score(
        original,
        ldpruner.Probe(samples=options.score_samples, num_inference_steps=options.score_steps),
        method="paper",
        out=options.work / name / "run",
    )
    probe = ldpruner.Probe(samples=options.samples, num_inference_steps=options.steps, seed=20_000)
    shown = look(original, options.steps)
    rungs, rows = [], [original.images(shown)]
    for budget in options.budgets:
        pruned = ldpruner.prune(original, {"latency": budget}, probe=run.probe, method=run.method, run=run.folder)
        smaller = original.around(pruned.denoiser)
        measured = evaluate(smaller, original, probe=probe, batch_size=options.batch_size, cache=options.work / "cache")
        edits = [asdict(edit) for edit in pruned.plan.edits]
        rungs.append({**pruned.summary(), "budget": budget, "edits": edits, **of(measured, 0)})
        rows.append(smaller.images(shown))
    base = of(measured, 1)
    show(original, rows, ["original", *options.budgets], name, options.out)
    return {"original": base, "pruned": rungs, "environment": environment(original.denoiser)}


def of(measured: Evaluation, place: int) -> dict[str, Any]:
    """The figures of one of the models, and what measuring both of them cost."""
    figures = {figure.metric: {"value": figure.value, "error": figure.error} for figure in measured.figures[place]}
    cost = {"seconds": measured.seconds, "generated": measured.generated, "peak_bytes": measured.peak_bytes}
    return {"figures": figures, **cost}


def show(pipeline: Pipeline, rows: Sequence[list[Image.Image]], labels: list[str], name: str, out: Path) -> None:
    """A picture with a row for each model; of sound, spectrograms, and the eight sounds of each model one after the other."""
    out.mkdir(parents=True, exist_ok=True)
    if pipeline.mel is not None:
        for row, label in zip(rows, labels, strict=True):
            write_wav(out / f"zoo-{name}-{label.replace('%', '')}.wav", *joined(pipeline, row))
        rows = [[upright_spectrogram(picture) for picture in row] for row in rows]
    grid(rows, labels=labels).save(out / f"zoo-{name}.png")


def rendered(page: dict[str, Any]) -> str:
    """The page: the three cards' figures side by side, then what pruning does to each."""
    parts = [
        "# The zoo: three trained pipelines, measured\n",
        "Made by `python benchmarks/quality_by_latency.py --out docs` from the cards that ship with the pipelines and from its\n"
        "own measurements. Figures of one judge compare with each other only.\n",
        cards(list(page["models"])),
    ]
    parts += [section(name, found, page) for name, found in page["models"].items()]
    return "\n".join(parts)


def cards(names: Sequence[str]) -> str:
    """The cards of the pipelines that ship, side by side."""
    figures = {name: json.loads((Path(locate(f"zoo:{name}")) / "figures.json").read_text(encoding="utf-8")) for name in names}
    lines = ["| | " + " | ".join(f"`zoo:{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]

    def row(title: str, cells: Sequence[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    every = figures.values()
    row("parameters, denoiser", [f"{each['params']['unet']:,}" for each in every])
    row("removable operators", [str(each["operators"]) for each in every])
    row("weights, MB", [f"{each['bytes'] / 1e6:.1f}" for each in every])
    row("judge, MB", [f"{each['judge_bytes'] / 1e6:.1f}" for each in every])
    for name in METRICS:
        for samples in (True, False):
            title, cells = "samples" if samples else "real data", []
            for each in every:
                found = each["figures"]["samples" if samples else floor_of(each["figures"])].get(name)
                cells.append(f"{found['value']:.4f}" if found else "")
            if any(cells):
                row(f"{METRICS[name].title}, {title}", cells)
    return "\n".join(lines) + "\n"


def floor_of(figures: dict[str, Any]) -> str:
    """The column of a card that holds real data."""
    return next(column for column in figures if column not in ("samples", "as many samples", "their reconstructions"))


def section(name: str, found: dict[str, Any], page: dict[str, Any]) -> str:
    """One pipeline: its picture, and the table of what pruning does to it."""
    rungs = found["pruned"]
    lines = [f"## zoo:{name}\n", f"![zoo:{name}](zoo-{name}.png)\n"]
    lines.append("| | original | " + " | ".join(f"latency {rung['budget']}" for rung in rungs) + " |")
    lines.append("|---" * (len(rungs) + 2) + "|")
    for title, key in (("measured latency", "latency_ratio"), ("parameters", "params_ratio"), ("MACs", "macs_ratio")):
        lines.append(f"| {title} | 100 % | " + " | ".join(percent(rung[key]) for rung in rungs) + " |")
    lines.append("| operators replaced | 0 | " + " | ".join(str(len(rung["edits"])) for rung in rungs) + " |")
    for metric in METRICS:
        cells = [cell(each["figures"].get(metric)) for each in (found["original"], *rungs)]
        if any(cells):
            arrow = {"lower": "↓", "higher": "↑"}[METRICS[metric].better]
            lines.append(f"| {METRICS[metric].title} {arrow} | " + " | ".join(cells) + " |")
    last, settings = rungs[-1], page["settings"]
    spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in last["seconds"].items())
    how = (
        f"{settings['samples']:,} samples of each, {settings['steps']} steps, nothing done to recover; operators were scored with "
        f"{settings['score_samples']} samples in {settings['score_steps']} steps. Measuring the last of them took: {spent} "
        f"({last['generated']:,} samples generated, the others from the cache); the process held "
        f"{(last['peak_bytes'] or 0) / 1e6:.0f} MB at most. {environment_line(found['environment'])}."
    )
    lines.append("\n" + textwrap.fill(how, 132, break_long_words=False, break_on_hyphens=False) + "\n")
    return "\n".join(lines)


def cell(found: dict[str, float | None] | None) -> str:
    return "" if found is None or found["value"] is None else estimate(found["value"], found["error"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="fashion, emoji, digits; all of them by default")
    parser.add_argument("--model", help="another pipeline in the place of zoo:NAME")
    parser.add_argument("--budgets", nargs="+", default=["90%", "80%", "65%"])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--score-samples", type=int, default=16)
    parser.add_argument("--score-steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("zoo-work"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
