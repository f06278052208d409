"""A zoo pipeline measured by the tool itself, its samples beside real data, and the card that says so."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldpruner.evaluation import METRICS, Evaluation, evaluate
from ldpruner.evaluation.base import Evidence
from ldpruner.evaluation.features import FeatureNet, judge
from ldpruner.evaluation.judges import REFERENCE, Seen, load_reference
from ldpruner.evaluation.streams import caption_streams, split
from ldpruner.operators import discover
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.reporting import environment_line, estimate


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Pictures `(n, c, h, w)`, uint8, and the caption of each where there are captions."""

    pictures: Tensor
    captions: Sequence[str] = ()


def judge_in(folder: Path) -> FeatureNet:
    """The judge of a pipeline folder, as `evaluate` uses it."""
    return judge(folder / "judge", "judge")


def seen_by(net: FeatureNet, pictures: Tensor) -> Seen:
    """What a judge makes of uint8 pictures `(n, c, h, w)`."""
    with torch.inference_mode():
        parts = [net.observe(part) for part in torch.split(pictures, 200)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def figures_of(net: FeatureNet, shown: Shown, reference: Seen | None = None) -> dict[str, dict[str, float | None]]:
    """Every metric that these allow: `{metric: {value, error}}`."""
    streams = {name: split(tensor) for name, tensor in seen_by(net, shown.pictures).items()}
    real = {name: split(tensor) for name, tensor in (reference or {}).items()}
    evidence = Evidence(samples=streams | caption_streams(net, shown.captions), reference=real, original={})
    estimates = {name: METRICS[name].measure(evidence) for name in METRICS if evidence.has(METRICS[name].needs)}
    return {name: {"value": estimate.value, "error": estimate.error} for name, estimate in estimates.items()}


def estimates_of(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    """The figures of an evaluation's first model: `{metric: {value, error}}`."""
    return {figure.metric: {"value": figure.value, "error": figure.error} for figure in evaluation.figures[0]}


def weight_bytes(folder: Path) -> dict[str, int]:
    """How large the weights of a pipeline folder are, those of its judge, and what that keeps of real data."""
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*.safetensors")}
    kept = sizes.get(Path("judge", REFERENCE), 0)
    of_judge = sum(size for path, size in sizes.items() if "judge" in path.parts) - kept
    return {"bytes": sum(sizes.values()) - of_judge - kept, "judge_bytes": of_judge, "reference_bytes": kept}


def measure(pipeline: Pipeline, net: FeatureNet, compared: Mapping[str, Shown], probe: Probe, cache: Path) -> dict[str, Any]:
    """The judge's figures on samples, made and measured by `evaluate`, and on what else is compared with the reference.

    Where there is less of that than of samples, these are measured a second time, as many of them: a Fréchet distance
    falls as samples become more.
    """
    assert net.reference is not None
    reference = load_reference(net.reference)
    size = min(100, probe.samples)
    of_samples = evaluate(pipeline, probe=probe, features=[net], batch_size=size, cache=cache)
    figures, counts = {"samples": estimates_of(of_samples)}, {"samples": probe.samples}
    fewest = min(len(shown.pictures) for shown in compared.values())
    if fewest < probe.samples:
        fewer = replace(probe, samples=fewest)
        figures["as many samples"] = estimates_of(evaluate(pipeline, probe=fewer, features=[net], batch_size=size, cache=cache))
        counts["as many samples"] = fewest
    operators = discover(pipeline.denoiser, pipeline.call(probe), timing_repeats=0).operators
    modules = {name: part for name, part in pipeline.pipe.components.items() if isinstance(part, nn.Module)}
    return {
        "figures": figures | {name: figures_of(net, shown, reference) for name, shown in compared.items()},
        "counts": counts
        | {name: len(shown.pictures) for name, shown in compared.items()}
        | {"reference": len(reference["features"])},
        "num_inference_steps": probe.num_inference_steps,
        "operators": len([operator for operator in operators if operator.candidates]),
        "params": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        "seconds": of_samples.seconds,
        "generated": of_samples.generated,
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


def _cell(found: Mapping[str, float | None] | None) -> str:
    return "" if found is None or found["value"] is None else estimate(found["value"], found["error"])


def card(
    *, title: str, licence: str, pipeline_tag: str, intro: str, facts: Mapping[str, str], quality: str, figures: Mapping[str, Any]
) -> str:
    """A model card: what it is, how it was made, and how good it is, every figure of it from the measurement."""
    rows = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    seconds = figures["seconds"]
    how = (
        f"Samples took {figures['num_inference_steps']} steps each. These figures compare with each other only, not with those of "
        f"Inception's features. Generating {figures['generated']:,} of them took {seconds['generating']:.0f} s, "
        f"the judge's look at all {seconds['looking']:.0f} s, the metrics {seconds['measuring']:.0f} s; meanwhile the process "
        f"held {(figures['peak_bytes'] or 0) / 1e6:.0f} MB at most. "
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
        "weights": f"{figures['bytes'] / 1e6:.1f} MB, float16 safetensors; the judge {figures['judge_bytes'] / 1e6:.1f} MB, "
        f"and {figures['reference_bytes'] / 1e6:.1f} MB of what it saw in real data",
        "steps x batch": ", ".join(f"{name} {recipe[name]['steps']:,} x {recipe[name]['batch_size']}" for name in networks),
    }
