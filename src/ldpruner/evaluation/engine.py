"""Generate, look, measure: every metric whose needs are met, for one model or for two beside each other."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ldpruner.environment import environment, peak_since_reset, reset_peak
from ldpruner.errors import DataError, suggest
from ldpruner.evaluation import features as nets
from ldpruner.evaluation.base import ALIASES, METRICS, Evidence, Metric, length
from ldpruner.evaluation.features import FEATURE_NETS, FeatureNet
from ldpruner.evaluation.kept import Samples, Watch
from ldpruner.evaluation.streams import RealData, paired, reference_streams, sample_streams
from ldpruner.files import cache_folder
from ldpruner.opening import locate
from ldpruner.operators.timing import device_of
from ldpruner.pipelines import Model, Pipeline, as_pipeline
from ldpruner.probes import Probe

Features = str | nn.Module | FeatureNet

PROBE = Probe(samples=500, num_inference_steps=20)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric of one model. Only figures with the same `features` and sample counts compare with each other."""

    metric: str
    title: str
    value: float
    error: float | None  # standard error, where the metric has one
    better: str  # lower or higher
    features: str | None  # the net that looked
    digest: str | None  # of that net: equal names may hide different weights
    samples: int
    reference: int | None  # real samples that it compares with
    note: str | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of each model, with the settings, the cost and the environment."""

    models: tuple[str, ...]
    task: str
    probe: Probe
    figures: tuple[tuple[Figure, ...], ...]  # for each model
    seconds: dict[str, float]  # spent generating, looking and measuring
    generated: int  # samples of all models that were not in the cache
    peak_bytes: int | None  # while evaluating; None where this system cannot tell
    environment: dict[str, Any]

    def __getitem__(self, metric: str) -> float:
        """The first model's value of a metric, by name or alias; the first net's where several looked."""
        name, net = ALIASES.get(metric.lower(), (metric, ""))
        for figure in self.figures[0]:
            if figure.metric == name and (figure.features or "").startswith(net):
                return figure.value
        raise DataError(f"metric {metric!r} was not measured: {suggest(metric, [f.metric for f in self.figures[0]])}")

    def to_json(self) -> dict[str, Any]:
        prompts = hashlib.sha256("\n".join(self.probe.prompts).encode()).hexdigest() if self.probe.prompts else None
        return {
            "models": [
                {"model": name, "figures": [asdict(figure) for figure in figures]}
                for name, figures in zip(self.models, self.figures, strict=True)
            ],
            "task": self.task,
            "probe": {**self.probe.to_json(), "prompts": len(self.probe.prompts), "prompts_sha256": prompts},
            "seconds": self.seconds,
            "generated": self.generated,
            "peak_bytes": self.peak_bytes,
            "environment": self.environment,
        }


def evaluate(
    model: Model,
    against: Model | None = None,
    *,
    probe: Probe = PROBE,
    metrics: Sequence[str] | None = None,
    features: Sequence[Features] | None = None,
    reference: Path | str | None = None,
    resize: int | None = None,
    batch_size: int = 50,
    cache: str | Path | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Measure a pipeline's samples; with `against`, the original, that one's too, and how far the two are apart seed by seed.

    `features` are names with an optional place (`inception=FILE`, `clip=FOLDER`, `judge=zoo:emoji`), networks, or
    `FeatureNet`s; by default the judge of the zoo pipeline that the model is, or was pruned from. `reference` is a folder
    or zip of real pictures or recordings; by default what that judge keeps of real data. `metrics` are names or the field's
    aliases (fid, kid, is, fad), by default all that what is given allows. Nets that look are shown pictures, real ones too,
    of `resize` x `resize` pixels, the middle where they are not square; by default pictures as they are generated. Samples, and
    what nets saw of them, are kept in `cache` and found again. Raises `DataError`, before anything is generated, where a metric
    that was asked for lacks something, and names it.
    """
    pipeline, original = as_pipeline(model), as_pipeline(against) if against is not None else None
    clock, keep = _Clock(), Path(cache or cache_folder())
    offer, looking, jobs = _asked(pipeline, original, probe, metrics, features, reference, resize)
    complete, real = offer.probe, offer.real
    device = device_of(pipeline.denoiser)
    watched = reset_peak(device)
    made = [Samples.of(each, complete, batch_size=batch_size, cache=keep) for each in (pipeline, original) if each]
    missing = sum(samples.missing() for samples in made)
    with clock("generating"):
        shapes = [samples.generate(watch) for samples in made]
    _check_alike(made, shapes, looking)
    figures: list[list[Figure]] = [[] for _ in made]
    with clock("measuring"):
        figures[0] += [_figure(metric, paired(made), None) for metric, net in jobs if net is None]
    for net in dict.fromkeys(net.digest for _, net in jobs if net):
        looker = next(each for each in looking if each.digest == net)
        with clock("looking"):
            known = reference_streams(looker, real, shapes[0][1], keep, watch)
        for samples, row in zip(made, figures, strict=True):
            with clock("looking"):
                evidence = Evidence(samples=sample_streams(samples, looker, keep, watch), reference=known, original={})
            with clock("measuring"):
                row.extend(_figure(metric, evidence, looker) for metric, each in jobs if each is looker)
    return Evaluation(
        models=tuple(samples.pipeline.source for samples in made),
        task=pipeline.task,
        probe=complete,
        figures=tuple(map(tuple, figures)),
        seconds=clock.seconds,
        generated=missing,
        peak_bytes=peak_since_reset(device) if watched else None,
        environment=environment(pipeline.denoiser),
    )


def check(
    model: Model,
    against: Model | None = None,
    *,
    probe: Probe = PROBE,
    metrics: Sequence[str] | None = None,
    features: Sequence[Features] | None = None,
    reference: Path | str | None = None,
    resize: int | None = None,
) -> None:
    """Raise what `evaluate` would raise before it generates anything: for who asks it at the end of hours of other work."""
    pipeline, original = as_pipeline(model), as_pipeline(against) if against is not None else None
    offer, _, _ = _asked(pipeline, original, probe, metrics, features, reference, resize)
    pipeline.call(offer.probe)


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("generating", "looking", "measuring"), 0.0)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A metric that is wanted, by the name that the user gave, and the net that the name insists on."""

    given: str
    metric: Metric
    net: str | None


def _wanted(metrics: Sequence[str] | None) -> list[_Wanted]:
    """What is asked for: everything by default. Raises `UnknownNameError`."""
    if metrics is None:
        return [_Wanted(given=name, metric=METRICS[name], net=None) for name in METRICS]
    asked = [(given, *ALIASES.get(given.lower(), (given, None))) for given in dict.fromkeys(metrics)]
    return [_Wanted(given=given, metric=METRICS[name], net=net) for given, name, net in asked]


def _asked(
    pipeline: Pipeline,
    original: Pipeline | None,
    probe: Probe,
    metrics: Sequence[str] | None,
    features: Sequence[Features] | None,
    reference: Path | str | None,
    resize: int | None,
) -> tuple[_Offer, list[FeatureNet], list[Job]]:
    """What there will be to look at, the nets that look, and every metric with the net that it is measured with."""
    wanted = _wanted(metrics)
    if resize is not None and resize < 1:
        raise DataError(f"resize={resize}: a side of 1 pixel or more is needed.")
    looking = [net.at(resize) if resize else net for net in _nets(pipeline, original, features, wanted)]
    real = RealData.open(Path(reference), pipeline) if reference is not None else None
    complete = (original or pipeline).completed(probe)
    offer = _Offer(original=original is not None, real=real, probe=complete, pipeline=pipeline)
    return offer, looking, _jobs(wanted, looking, offer, explicit=metrics is not None)


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """What there will be to look at, known before anything is generated."""

    original: bool
    real: RealData | None
    probe: Probe
    pipeline: Pipeline

    def lacking(self, metric: Metric, net: FeatureNet | None) -> list[str]:
        """Why a metric cannot be measured with a net, or without one; nothing where it can."""
        given = {"latents", "pictures"} | ({"original"} if self.original else set())
        if net:
            prompts = self.probe.prompts
            given |= set(net.gives)
            given |= {"captions"} if net.describe and prompts else set()
            given |= {"labels"} if net.label and any(net.label(prompt) is not None for prompt in prompts) else set()
            given |= {"reference"} if self.real or net.reference else set()
        elif metric.by_nets:
            return ["a feature net"]
        lacking = [_WAYS.get(need, need) for need in metric.needs if need not in given]
        if self.probe.samples < metric.minimum:
            lacking.append(f"{metric.minimum} samples or more")
        if "reference" in metric.needs and self.real and len(self.real.names) < metric.minimum:
            lacking.append(f"{metric.minimum} real samples or more")
        if "captions" in metric.needs and len(set(self.probe.prompts[: self.probe.samples])) < metric.captions:
            lacking.append(f"{metric.captions} different prompts or more")
        return lacking


_WAYS = {
    "original": "an original (--against MODEL)",
    "reference": "real data (--reference DATA)",
    "captions": "prompts, and a feature net that reads them (--features clip)",
    "embeddings": "a feature net that reads captions (--features clip)",
    "features": "features",
    "probabilities": "a feature net with classes (--features inception, or a zoo pipeline's judge)",
    "labels": "prompts that name a class",
    "a feature net": "a feature net (--features inception=FILE, clip=FOLDER, clap=FOLDER, judge=zoo:NAME)",
}

Job = tuple[Metric, FeatureNet | None]


def _jobs(wanted: Sequence[_Wanted], looking: Sequence[FeatureNet], offer: _Offer, *, explicit: bool) -> list[Job]:
    """Every metric with every net that it can be measured with. Raises where one that was named cannot, or none can."""
    jobs: list[Job] = []
    for each in wanted:
        able: list[FeatureNet | None] = [net for net in looking if not each.net or net.name.startswith(each.net)]
        reasons = {net.name if net else "": offer.lacking(each.metric, net) for net in (able if each.metric.by_nets else [None])}
        fit = [net for net in (able if each.metric.by_nets else [None]) if not reasons[net.name if net else ""]]
        if explicit and not fit:
            lacking = next(iter(reasons.values()), ["a feature net"])
            wants = " and ".join(_WAYS.get(need, need) for need in lacking)
            raise DataError(f"{each.given}: cannot be measured on {offer.pipeline.source}, for want of {wants}.")
        jobs += [(each.metric, net) for net in fit]
    if not jobs:
        raise DataError(
            f"{offer.pipeline.source}: nothing to measure. Give --against for the original, or --features and --reference."
        )
    if any(metric.torchmetrics for metric, _ in jobs) and importlib.util.find_spec("torchmetrics") is None:
        raise DataError("the Fréchet distances, SSIM and PSNR need torchmetrics: pip install 'ldpruner[metrics]'.")
    return list(dict.fromkeys(jobs))


def _nets(
    pipeline: Pipeline, original: Pipeline | None, features: Sequence[Features] | None, wanted: Sequence[_Wanted]
) -> list[FeatureNet]:
    """The nets that look: those named and those that an alias insists on; the judge where none is named and some metric is free."""
    device = str(device_of(pipeline.denoiser))
    sources = [each.source for each in (pipeline, original) if each]
    built = [_net(each, sources, device) for each in features or ()]
    insisted = dict.fromkeys(each.net for each in wanted if each.net)
    built += [FEATURE_NETS[name](None, device) for name in insisted if not any(net.name.startswith(name) for net in built)]
    found = next((judge for source in sources if (judge := judge_of(source))), None)
    if features is None and found and any(each.metric.by_nets and not each.net for each in wanted):
        built.append(nets.judge(found[0], found[1], device))
    return built


def _net(given: Features, sources: Sequence[str], device: str) -> FeatureNet:
    if isinstance(given, FeatureNet):
        return given
    if isinstance(given, nn.Module):
        return nets.module(given)
    name, _, place = given.partition("=")
    if name != "judge":
        return FEATURE_NETS[name](place or None, device)
    found = next((judge for source in ([place] if place else sources) if (judge := judge_of(source))), None)
    if found is None:
        raise DataError(f"judge: {place or sources[0]} has none. Say --features judge=zoo:NAME.")
    return nets.judge(found[0], found[1], device)


def judge_of(source: str) -> tuple[Path, str] | None:
    """The folder and the name of the judge of a zoo pipeline, or of the one that a pruned folder came from."""
    folder = Path(locate(source)) if source.startswith("zoo:") else Path(source).expanduser()
    if (folder / "judge" / "config.json").is_file():
        return folder / "judge", f"judge of {source if source.startswith('zoo:') else folder.name}"
    record = folder / "record.json"
    base = json.loads(record.read_text(encoding="utf-8")).get("base", "") if record.is_file() else ""
    return judge_of(base) if base and base != source else None


def _check_alike(made: Sequence[Samples], shapes: Sequence[tuple[Any, Any]], looking: Sequence[FeatureNet]) -> None:
    """Raise where two models cannot be compared, or a net cannot look at what is generated."""
    for samples, shape in zip(made, shapes, strict=True):
        if shape != shapes[0]:
            sizes = [f"{each.pipeline.source} {tuple(latents)}" for each, (latents, _) in zip(made, shapes, strict=True)]
            raise DataError(
                f"the two models do not generate alike: latents of {' and '.join(sizes)}. Compare models of one family."
            )
        for net in looking:
            if net.channels not in (None, shape[1][0]):
                raise DataError(
                    f"{net.name}: looks at pictures of {net.channels} channels; {samples.pipeline.source} makes {shape[1][0]}."
                )
            if net.sample_rate and samples.pipeline.mel is None:
                raise DataError(f"{net.name}: listens; {samples.pipeline.source} generates no sound that can be had as waves.")


def _figure(metric: Metric, evidence: Evidence, net: FeatureNet | None) -> Figure:
    counted = next(name for name in metric.needs if name in evidence.samples)
    estimate = metric.measure(evidence)
    if not math.isfinite(estimate.value):
        raise DataError(f"{metric.name}: came out as {estimate.value}; there is something wrong with what it looked at.")
    return Figure(
        metric=metric.name,
        title=metric.title,
        value=estimate.value,
        error=estimate.error,
        better=metric.better,
        features=net.name if net else None,
        digest=net.digest if net else None,
        samples=length(evidence.samples[counted]),
        reference=length(evidence.reference[counted]) if "reference" in metric.needs else None,
        note=estimate.note,
        source=metric.source,
    )
