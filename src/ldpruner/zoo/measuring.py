"""A zoo pipeline measured by the tool itself, its samples beside real data, and the card that says so."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldpruner.evaluation import METRICS, Evaluation, evaluate
from ldpruner.evaluation.base import Evidence, Stream
from ldpruner.evaluation.judges import CaptionJudge, Judge, Seen, observe_all
from ldpruner.operators import discover
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.zoo.autoencoders import floats


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Pictures `(n, c, h, w)`, uint8, and the caption of each where there are captions."""

    pictures: Tensor
    captions: Sequence[str] = ()


def seen_by(judge: Judge, shown: Shown) -> Seen:
    """What a judge makes of pictures and of their captions, `captions` and `labels` among it."""
    seen = observe_all(judge, (floats(part) for part in torch.split(shown.pictures, 200)))
    if shown.captions and isinstance(judge, CaptionJudge):
        with torch.inference_mode():
            seen["captions"] = judge.describe(shown.captions)
        seen["labels"] = torch.tensor([-1 if label is None else label for label in map(judge.label, shown.captions)])
    return seen


def figures_of(seen: Seen, reference: Seen | None = None) -> dict[str, dict[str, float | None]]:
    """Every metric that these allow: `{metric: {value, error}}`."""
    evidence = Evidence(samples=_streams(seen), reference=_streams(reference or {}), original={})
    estimates = {name: METRICS[name].measure(evidence) for name in METRICS if evidence.has(METRICS[name].needs)}
    return {name: {"value": estimate.value, "error": estimate.error} for name, estimate in estimates.items()}


def estimates_of(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    """The figures of an evaluation's first model: `{metric: {value, error}}`."""
    return {figure.metric: {"value": figure.value, "error": figure.error} for figure in evaluation.figures[0]}


def weight_bytes(folder: Path) -> dict[str, int]:
    """How large the weights of a pipeline folder are, and of its judge with what it keeps."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*.safetensors")}
    of_judge = sum(size for path, size in sizes.items() if "judge" in path.relative_to(folder).parts)
    return {"bytes": sum(sizes.values()) - of_judge, "judge_bytes": of_judge}


def _streams(seen: Seen) -> dict[str, Stream]:
    return {name: lambda tensor=tensor: iter(torch.split(tensor, 250)) for name, tensor in seen.items()}  # type: ignore[misc]


def measure(
    pipeline: Pipeline, judge: Judge, reference: Seen, compared: Mapping[str, Shown], probe: Probe, cache: Path
) -> dict[str, Any]:
    """The judge's figures on samples, made and measured by `evaluate`, and on what else is compared with the reference."""
    of_samples = evaluate(pipeline, probe=probe, batch_size=min(100, probe.samples), cache=cache)
    operators = discover(pipeline.denoiser, pipeline.call(probe), timing_repeats=0).operators
    modules = {name: part for name, part in pipeline.pipe.components.items() if isinstance(part, nn.Module)}
    return {
        "figures": {
            "samples": estimates_of(of_samples),
            **{name: figures_of(seen_by(judge, shown), reference) for name, shown in compared.items()},
        },
        "counts": {
            "samples": probe.samples,
            "reference": len(reference["features"]),
            **{name: len(shown.pictures) for name, shown in compared.items()},
        },
        "num_inference_steps": probe.num_inference_steps,
        "operators": len([operator for operator in operators if operator.candidates]),
        "params": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        "seconds": of_samples.seconds,
        "peak_bytes": of_samples.peak_bytes,
        "environment": of_samples.environment,
    }


def quality_table(figures: Mapping[str, Any]) -> str:
    """Metrics in rows, what was measured in columns, as Markdown."""
    columns = list(figures["figures"])
    counts = figures["counts"]
    lines = ["| | " + " | ".join(f"{name} ({counts[name]:,})" for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in METRICS:
        cells = [_cell(figures["figures"][column].get(name)) for column in columns]
        if any(cells):
            metric = METRICS[name]
            lines.append(f"| {metric.title}, {metric.better} is better | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(estimate: Mapping[str, float | None] | None) -> str:
    if estimate is None:
        return ""
    error = f" ± {estimate['error']:.4f}" if estimate["error"] is not None else ""
    return f"{estimate['value']:.4f}{error}"


def environment_line(environment: Mapping[str, Any]) -> str:
    """Where the figures were taken, in one line."""
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def card(
    *, title: str, licence: str, pipeline_tag: str, intro: str, facts: Mapping[str, str], quality: str, figures: Mapping[str, Any]
) -> str:
    """A model card: what it is, how it was made, and how good it is, every figure of it from the measurement."""
    rows = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    seconds = figures["seconds"]
    how = (
        f"Samples took {figures['num_inference_steps']} steps each. These figures compare with each other only, not with those of "
        f"Inception's features. Generating took {seconds['generating']:.0f} s, "
        f"the judge's look at the samples {seconds['looking']:.0f} s, "
        f"the metrics {seconds['measuring']:.0f} s; the process held {figures['peak_bytes'] / 1e6:.0f} MB at most. "
        f"Measured by the same command that trains ({environment_line(figures['environment'])})."
    )
    return f"""---
library_name: diffusers
license: {licence}
pipeline_tag: {pipeline_tag}
---
# {title}

{_wrapped(intro)}

![samples](samples.png)

| | |
|---|---|
{rows}

## Quality

{_wrapped(quality)}

{quality_table(figures)}

{_wrapped(how)}
"""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 132, break_long_words=False, break_on_hyphens=False)


def network_facts(figures: Mapping[str, Any], networks: Sequence[str]) -> dict[str, str]:
    """Sizes and training, as rows of a card."""
    recipe = figures["recipe"]
    return {
        "parameters": ", ".join(f"{name} {count:,}" for name, count in figures["params"].items()),
        "removable operators": str(figures["operators"]),
        "weights": f"{figures['bytes'] / 1e6:.1f} MB, float16 safetensors; the judge {figures['judge_bytes'] / 1e6:.1f} MB",
        "steps x batch": ", ".join(f"{name} {recipe[name]['steps']:,} x {recipe[name]['batch_size']}" for name in networks),
    }
