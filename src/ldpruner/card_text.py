"""What a model card says, section by section, every figure read from what a saved folder says of itself. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldpruner.errors import ArtifactError
from ldpruner.forms import FORMS, loading_lines
from ldpruner.markdown import NOT_EMA, bullets, folded, header_of, removed, table, wrapped
from ldpruner.plans import PLAN, Plan
from ldpruner.record import Measurement
from ldpruner.reporting import count, environment_line, estimate, interval, milliseconds, percent
from ldpruner.sharing import CARD

RECORD = "record.json"
EVALUATION = "evaluation.json"  # what `ldpruner evaluate --json` printed, for the card to show
VERSIONS = ("ldpruner", "torch", "diffusers", "python")
BUSY = 0.2  # an interquartile range above this share of its median is remarked upon
HOME = "[ldpruner](https://pypi.org/project/ldpruner)"

Kind = Literal["real-samples", "original-samples", "generated-samples"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One figure of an evaluation, and what it compares the samples with."""

    said: Mapping[str, Any]
    kind: Kind

    @property
    def compared(self) -> str:
        if self.kind == "real-samples":
            return f"{self.said['reference']} real samples"
        return "the original's samples, same seeds" if self.kind == "original-samples" else "nothing else"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a saved folder says of itself."""

    record: Mapping[str, Any]
    plan: Plan | None
    evaluation: Mapping[str, Any] | None
    component: str  # the part that was pruned, and
    denoiser: str  # its class
    card: str | None  # as it is now
    header: Mapping[str, Any] = field(default_factory=dict)  # of that card

    @classmethod
    def open(cls, folder: Path) -> Saved:
        """Read a folder that `artifacts.save` wrote. Raises `ArtifactError` where it did not, or what it wrote is damaged."""
        if not (folder / RECORD).is_file() or not (folder / "model_index.json").is_file():
            raise ArtifactError(f"{folder}: is no folder that ldpruner saved (no {RECORD} beside a model_index.json in it).")
        record, index = _read(folder / RECORD), _read(folder / "model_index.json")
        component = str(record.get("component") or next((name for name in ("unet", "transformer") if name in index), "denoiser"))
        card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None
        return cls(
            record=record,
            plan=Plan.load(folder / PLAN) if (folder / PLAN).is_file() else None,
            evaluation=_read(folder / EVALUATION) if (folder / EVALUATION).is_file() else None,
            component=component,
            denoiser=str((index.get(component) or ["", "denoiser"])[1]),
            card=card,
            header=header_of(card) if card else {},
        )

    @property
    def form(self) -> str:
        return str(self.record.get("form", "portable"))

    def figures(self) -> Iterator[Shown]:
        """Every figure of the model that was evaluated."""
        models = self.evaluation["models"] if self.evaluation else []
        of_both = {figure["metric"] for figure in models[1]["figures"]} if len(models) > 1 else set()
        for figure in models[0]["figures"] if models else ():
            paired = len(models) > 1 and figure["metric"] not in of_both
            kind: Kind = "original-samples" if paired else "generated-samples"
            yield Shown(said=figure, kind="real-samples" if figure.get("reference") else kind)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}). Remove it, or mend it.") from error


def body(saved: Saved, name: str, header: Mapping[str, Any]) -> str:
    """The text of the card of a saved folder that is loaded as `name`."""
    parts = [
        f"# {name.rpartition('/')[2]}",
        _opening(saved, header.get("base_model")),
        wrapped(NOT_EMA),
        "## How to load it",
        _loading(saved, name),
        *_costs(saved),
        "## What was removed",
        removed([vars(edit) for edit in saved.plan.edits] if saved.plan else []),
        "## How good it is",
        _quality(saved),
        "## Recovery",
        _recovery(saved),
        "## Limits",
        bullets(_limits(saved)),
        "## Licence",
        _licence(header),
        *_made_with(saved),
    ]
    return "\n\n".join(parts)


def _opening(saved: Saved, base_model: str | None) -> str:
    plan, base = saved.plan, str(saved.record.get("base", ""))
    called = f"`{Path(base).name}`" if base else "a base model"  # of a folder on someone's disk, its name alone
    if base_model:
        called = f"[{base_model}](https://huggingface.co/{base_model})"
    elif base.startswith("zoo:"):
        called = f"`{base}`, which ships with ldpruner"
    if plan is None:
        return wrapped(f"Made with {HOME} from {called}; nothing was removed.")
    said = f"Pruned with {HOME} from {called}: {len(plan.edits)} operators of its `{saved.denoiser}` were removed or replaced."
    if saved.form == "dense":
        return wrapped(f"{said} In this form it is as large and as slow as the base model, and gives what the pruned one gives.")
    if "latency" in saved.record:
        taken = percent(saved.record["latency"]["ratio"]["value"])
        said += f" Where it was measured, a call of it takes {taken} of the base model's time."
    return wrapped(said)


def _loading(saved: Saved, name: str) -> str:
    needs = {
        "portable": f"The code that is trusted is `{saved.component}/ldpruner_v1.py`: one file that imports torch and diffusers "
        "only, and puts the stand-ins in place before the weights are read. Where ldpruner is installed, "
        f'`ldpruner.load("{name}")` runs no code of this folder.',
        "plugin": "It needs `pip install ldpruner`. Without that import diffusers refuses to load it.",
        "dense": "It needs nothing but diffusers.",
    }
    form = f"This is the {saved.form} form: it {FORMS.get(saved.form, 'is one that this version does not know')}."
    return f"```python\n{loading_lines(name, saved.form)}\n```\n\n" + wrapped(f"{form} {needs.get(saved.form, '')}")


def _costs(saved: Saved) -> list[str]:
    """Sizes and times, original beside pruned, and what had been asked for."""
    record = saved.record
    if not {"latency", "params", "macs"} <= record.keys():
        return []
    read = {key: Measurement(**value) for key, value in record["latency"].items()}
    rows = [
        _cost(title, record[key])
        for key, title in (("params", "parameters of the denoiser"), ("macs", "MACs, one call, one sample"))
    ]
    times = milliseconds(read["original"]), milliseconds(read["pruned"]), interval(read["ratio"])
    rows.append((f"latency, {read['original'].how}", *times))
    said = [f"Asked for: {' and '.join(map(str, saved.plan.budgets))}."] if saved.plan and saved.plan.budgets else []
    if saved.form == "dense":
        said.insert(0, "These are figures of the pruned network; this form has the original's size and speed.")
    listed = table(("", "original", "pruned", "pruned / original"), rows)
    return ["## What it costs", listed, wrapped(" ".join([*said, _where(record)])), _shift(record)]


def _cost(title: str, pair: Mapping[str, int]) -> tuple[str, ...]:
    return title, count(pair["original"]), count(pair["pruned"]), percent(pair["pruned"] / pair["original"])


def _where(record: Mapping[str, Any]) -> str:
    original, pruned, ratio = (Measurement(**record["latency"][name]) for name in ("original", "pruned", "ratio"))
    bounds = "" if ratio.low is None else ", beside it the 95 % interval of that median"
    wide = any(read.spread > BUSY * read.value for read in (original, pruned))
    busy = " The spread is wide, as on a machine that does other work meanwhile: take the ratio as a rough one." if wide else ""
    return (
        f"Latencies are medians of {ratio.n} readings of each model, taken in turn, with their interquartile range; the ratio is "
        f"the median of the pairs' ratios{bounds}.{busy} Measured on: {environment_line(record.get('environment', {}))}."
    )


def _shift(record: Mapping[str, Any]) -> str:
    names = [name for name in ("latent_shift", "latent_shift_before_distillation") if record.get(name) is not None]
    if not names:
        return "How far the latents moved was not measured."
    probe, before = record.get("probe") or {}, record.get("latent_shift_before_repair")
    when = "" if names[0] == "latent_shift" else ", before distillation"
    unrepaired = "" if before is None else f" ({before:.4g} before repair)"
    made = f"{probe['samples']} samples of {probe['num_inference_steps']} steps" if probe else "the plan's samples"
    return wrapped(
        f"Latent shift of all edits together{when}: {record[names[0]]:.4g}{unrepaired}, on {made}. It is how far the mean and the "
        "standard deviation of the latents that generations end with moved from the original's (LD-Pruner, arXiv 2404.11936)."
    )


def _quality(saved: Saved) -> str:
    figures = list(saved.figures())
    if saved.evaluation is None or not figures:
        return wrapped(
            "Not measured. `ldpruner evaluate --json` measures it, and `ldpruner card --evaluation` puts the figures here. Look at "
            "samples of your own before you rely on it."
        )
    models, probe = saved.evaluation["models"], saved.evaluation.get("probe", {})
    original = {(figure["metric"], figure.get("digest")): figure for each in models[1:2] for figure in each["figures"]}
    headings = ("metric", "seen by", "samples", "compared with", "this model", *(["the original"] if len(models) > 1 else []))
    rows = [_figure(figure, original)[: len(headings)] for figure in figures]
    notes = dict.fromkeys(f"{figure.said['title']}: {figure.said['note']}." for figure in figures if figure.said.get("note"))
    guided = f", guidance scale {probe['guidance_scale']}" if probe.get("guidance_scale") is not None else ""
    said = [
        f"Generated in {probe.get('num_inference_steps')} steps each, seeds from {probe.get('seed')}{guided}.",
        *notes,
        "Figures compare only where the same net looked at as many samples.",
        f"Measured on: {environment_line(saved.evaluation.get('environment', {}))}.",
    ]
    return f"{table(headings, rows)}\n\n{wrapped(' '.join(said))}"


def _figure(figure: Shown, original: Mapping[tuple[str, str | None], Mapping[str, Any]]) -> tuple[str, ...]:
    said = figure.said
    other = original.get((said["metric"], said.get("digest")))
    values = [estimate(each["value"], each.get("error")) if each else "" for each in (said, other)]
    return (
        f"{said['title']}, {said['better']} is better",
        said.get("features") or "",
        f"{said['samples']}",
        figure.compared,
        *values,
    )


def _recovery(saved: Saved) -> str:
    """Repair and training: on what, for how long, and what it cost."""
    said: list[str] = []
    learnt = saved.record.get("distillation")
    while learnt:
        said.insert(0, _round(learnt))
        learnt = learnt.get("before")
    if saved.plan and saved.plan.repair == "closed-form":
        said.insert(
            0, wrapped("Stand-ins were fitted to each other in closed form, on generations of the original, without training.")
        )
    return "\n\n".join(said) or wrapped(
        "None: the weights that are left are the base model's own, and nothing was trained after pruning."
    )


def _round(learnt: Mapping[str, Any]) -> str:
    """One distillation in words, its losses as a table, its settings folded away."""
    teacher, guide = (Path(str(learnt.get(name) or "")).name for name in ("teacher", "guide"))
    device = learnt.get("environment", {}).get("device", "an unknown device")
    processes = f"{learnt['processes']} {'process' if learnt['processes'] == 1 else 'processes'}"
    parts = [
        wrapped(
            f"Distilled from `{teacher}`{f', away from `{guide}`,' if guide else ''} on {learnt['data']}: {learnt['steps']} steps "
            f"of {learnt['samples_per_step']} samples, {count(learnt['learning_parameters'])} parameters learning, "
            f"{learnt['seconds']:.0f} s in {processes} on {device}."
        )
    ]
    losses = learnt.get("losses")
    if losses:
        over = losses["steps_averaged"]
        rows = [(name, f"{first:.4g}", f"{losses['last'][name]:.4g}") for name, first in losses["first"].items()]
        parts.append(table(("loss", f"mean of the first {over} steps", f"mean of the last {over}"), rows))
    settings = [(f"`{name}`", f"{value}") for name, value in learnt.get("settings", {}).items()]
    if settings:
        parts.append(folded("Settings of the training", table(("setting", "value"), settings)))
    return "\n\n".join(parts)


def _limits(saved: Saved) -> Iterator[str]:
    """What a reader should know before relying on it."""
    yield "Samples differ from the base model's; how much is known only as far as this card says."
    yield "The ratio of latencies holds for the device, precision and batch that it was measured with. On others it is another one."
    yield (
        "Only the denoiser is pruned. The other parts are the base model's. What the base model gets wrong or must not be used for "
        "holds here too, and whether pruning made it worse was not looked at."
    )
    if "distillation" not in saved.record and saved.plan is not None:
        yield "Nothing was trained after pruning; `ldpruner distil` does that."
    if saved.form == "dense":
        return
    if saved.denoiser == "UNet2DConditionModel":
        yield (
            "LoRA weights find their places, but for operators that are gone. `ControlNetModel.from_unet` misses weights that are "
            "gone, and IP-Adapter, which finds attentions by their order, goes wrong where one was removed."
        )
    yield "`from_config` gives the unpruned architecture. A `quantization_config` given at loading is not read: quantize after it."
    if saved.form == "portable":
        yield '`device_map="balanced"` of a pipeline fails in this form: diffusers does not hand `trust_remote_code` on.'


def _licence(header: Mapping[str, Any]) -> str:
    if not header.get("license"):
        return wrapped(
            "The base model's licence could not be read when this card was written, so none is named. It holds for this model too: "
            "look it up with the base model."
        )
    link = f" ([text]({header['license_link']}))" if header.get("license_link") else ""
    return wrapped(f"{header.get('license_name') or header['license']}{link}. The terms of the base model hold for this model too.")


def _made_with(saved: Saved) -> list[str]:
    environment, probe = saved.record.get("environment"), saved.record.get("probe") or {}
    if not environment:
        return []
    versions = ", ".join(f"{name} {environment[name]}" for name in VERSIONS if name in environment)
    chosen = (
        f" The plan was chosen by {saved.plan.selection}; a low score is of an operator that is little needed."
        if saved.plan
        else ""
    )
    drawn = f" Seeds from {probe['seed']}." if probe else ""
    return ["## Made with", wrapped(f"{versions}.{chosen}{drawn} `{RECORD}` and `{PLAN}` hold the rest.")]
