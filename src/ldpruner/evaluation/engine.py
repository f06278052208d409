"""Generate, look, measure: every metric whose needs are met, for one model or for two beside each other."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ldpruner.environment import environment, peak_bytes
from ldpruner.errors import DataError, suggest
from ldpruner.evaluation import features as nets
from ldpruner.evaluation.base import ALIASES, METRICS, Evidence, Metric, length
from ldpruner.evaluation.features import FEATURE_NETS, FeatureNet, cache_folder
from ldpruner.evaluation.kept import Samples
from ldpruner.evaluation.streams import Watch, generated_shape, paired, reference_streams, sample_streams
from ldpruner.operators.timing import device_of
from ldpruner.pipelines import Model, Pipeline, as_pipeline, locate
from ldpruner.probes import Probe

Features = str | nn.Module | FeatureNet

BY_NETS = {"features", "probabilities", "embeddings"}
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
    samples: int
    reference: int | None  # real samples that it compares with
    source: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of each model, with the settings, the cost and the environment."""

    models: tuple[str, ...]
    task: str
    probe: Probe
    figures: tuple[tuple[Figure, ...], ...]  # for each model
    seconds: dict[str, float]  # spent generating, looking and measuring
    peak_bytes: int
    environment: dict[str, Any]

    def __getitem__(self, metric: str) -> float:
        """The first model's value of a metric, by name; the first net's where several looked."""
        for figure in self.figures[0]:
            if figure.metric == metric:
                return figure.value
        raise DataError(f"metric {metric!r} was not measured: {suggest(metric, [f.metric for f in self.figures[0]])}")

    def to_json(self) -> dict[str, Any]:
        return {
            "models": [
                {"model": name, "figures": [asdict(figure) for figure in figures]}
                for name, figures in zip(self.models, self.figures, strict=True)
            ],
            "task": self.task,
            "probe": {**self.probe.to_json(), "prompts": len(self.probe.prompts)},
            "seconds": self.seconds,
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
    batch_size: int = 50,
    cache: Path | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Measure a pipeline's samples; with `against`, the original, that one's too, and how far the two are apart seed by seed.

    `features` are names with an optional place (`inception=FILE`, `clip=FOLDER`, `judge=zoo:emoji`), networks, or
    `FeatureNet`s; by default the judge of the zoo pipeline that the model is, or was pruned from. `reference` is a folder
    or zip of real pictures or recordings; by default what that judge keeps of real data. `metrics` are names or the field's
    aliases (fid, kid, is, fad), by default all that what is given allows. Samples, and what nets saw of them, are kept in
    `cache` and found again. Raises `DataError` where a metric that was asked for lacks something, and names it.
    """
    asked = _asked(metrics)
    pipeline, original = as_pipeline(model), as_pipeline(against) if against is not None else None
    keep, clock = cache or cache_folder(), _Clock()
    looking = _nets(pipeline, original, features, asked)
    made = [Samples.of(each, probe, batch_size=batch_size, cache=keep) for each in (pipeline, original) if each]
    with clock("generating"):
        shapes = [generated_shape(samples, watch) for samples in made]

    bench = _Bench(asked=asked, explicit=metrics is not None, clock=clock)
    rows: list[list[Figure]] = [[] for _ in made]
    rows[0] += bench.figures(paired(made), None)
    for net in looking:
        with clock("looking"):
            real = reference_streams(net, pipeline, reference, shapes[0], keep)
        for samples, row in zip(made, rows, strict=True):
            with clock("looking"):
                evidence = Evidence(samples=sample_streams(samples, net, keep, watch), reference=real, original={})
            row.extend(bench.figures(evidence, net))
    bench.check(pipeline.source)
    return Evaluation(
        models=tuple(samples.pipeline.source for samples in made),
        task=pipeline.task,
        probe=made[0].probe,
        figures=tuple(map(tuple, rows)),
        seconds=clock.seconds,
        peak_bytes=peak_bytes(device_of(pipeline.denoiser)),
        environment=environment(pipeline.denoiser),
    )


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began


class _Bench:
    """The metrics asked for, and what became of each."""

    def __init__(self, asked: dict[str, str | None], *, explicit: bool, clock: _Clock) -> None:
        self.asked = asked
        self.explicit = explicit  # the user named them: none may be left out
        self.clock = clock
        self.measured: set[str] = set()
        self.lacking: dict[str, list[str]] = {}

    def figures(self, evidence: Evidence, net: FeatureNet | None) -> list[Figure]:
        """Every metric that this evidence allows: with a net, those that look through one; without, the others."""
        found = []
        for name, wanted in self.asked.items():
            metric = METRICS[name]
            if bool(BY_NETS & set(metric.needs)) != (net is not None) or (wanted and net and not net.name.startswith(wanted)):
                continue
            lacking = evidence.lacking(metric.needs)
            if lacking:
                self.lacking[name] = lacking
                continue
            with self.clock("measuring"):
                found.append(_figure(metric, evidence, net))
            self.measured.add(name)
        return found

    def check(self, source: str) -> None:
        """Raise where nothing could be measured, or something that the user named could not."""
        unmeasured = [name for name in self.asked if name not in self.measured]
        if self.explicit and unmeasured:
            name = unmeasured[0]
            lacking = self.lacking.get(name, ["a feature net"])
            raise DataError(f"{name}: cannot be measured on {source}, for want of {' and '.join(map(_explained, lacking))}.")
        if not self.measured:
            raise DataError(f"{source}: nothing to measure. Give --against for the original, or --features and --reference.")


def _explained(need: str) -> str:
    ways = {
        "original": "an original (--against MODEL)",
        "reference": "real data (--reference DATA)",
        "captions": "prompts, and a feature net that reads them (--features clip)",
        "embeddings": "a feature net that reads captions (--features clip)",
        "probabilities": "a feature net with classes (--features inception, or a zoo pipeline's judge)",
        "labels": "prompts that name a class",
        "a feature net": "a feature net (--features inception=FILE, clip=FOLDER, clap=FOLDER, judge=zoo:NAME)",
    }
    return ways.get(need, need)


def _figure(metric: Metric, evidence: Evidence, net: FeatureNet | None) -> Figure:
    counted = next(name for name in metric.needs if name in evidence.samples)
    samples = length(evidence.samples[counted])
    if samples < metric.minimum:
        raise DataError(f"{metric.name}: needs {metric.minimum} samples or more; there are {samples}.")
    estimate = metric.measure(evidence)
    return Figure(
        metric=metric.name,
        title=metric.title,
        value=estimate.value,
        error=estimate.error,
        better=metric.better,
        features=net.name if net else None,
        samples=samples,
        reference=length(evidence.reference[counted]) if "reference" in metric.needs else None,
        source=metric.source,
    )


def _asked(metrics: Sequence[str] | None) -> dict[str, str | None]:
    """Metric names, each with the feature net that its alias insists on. Raises `UnknownNameError`."""
    if metrics is None:
        return dict.fromkeys(METRICS)
    asked: dict[str, str | None] = {}
    for given in metrics:
        name, net = ALIASES.get(given.lower(), (given, None))
        asked[METRICS[name].name] = net
    return asked


def _nets(
    pipeline: Pipeline, original: Pipeline | None, features: Sequence[Features] | None, asked: dict[str, str | None]
) -> list[FeatureNet]:
    """The nets that look: those named, those that an alias insists on, else the judge where there is one."""
    device = str(device_of(pipeline.denoiser))
    wanted = list(dict.fromkeys(net for net in asked.values() if net))
    if features is None and not wanted:
        found = judge_of(pipeline.source) or (judge_of(original.source) if original else None)
        return [nets.judge(found[0], found[1], device)] if found else []
    built = [_net(each, pipeline, device) for each in features or ()]
    return built + [FEATURE_NETS[name](None, device) for name in wanted if not any(net.name.startswith(name) for net in built)]


def _net(given: Features, pipeline: Pipeline, device: str) -> FeatureNet:
    if isinstance(given, FeatureNet):
        return given
    if isinstance(given, nn.Module):
        return nets.module(given)
    name, _, place = given.partition("=")
    if name != "judge":
        return FEATURE_NETS[name](place or None, device)
    found = judge_of(place or pipeline.source)
    if found is None:
        raise DataError(f"judge: {place or pipeline.source} has none. Say --features judge=zoo:NAME.")
    return nets.judge(found[0], found[1], device)


def judge_of(source: str) -> tuple[Path, str] | None:
    """The folder and the name of the judge of a zoo pipeline, or of the one that a pruned folder came from."""
    folder = Path(locate(source)) if source.startswith("zoo:") else Path(source)
    if (folder / "judge" / "config.json").is_file():
        return folder / "judge", f"judge of {source if source.startswith('zoo:') else folder.name}"
    record = folder / "record.json"
    base = json.loads(record.read_text(encoding="utf-8")).get("base", "") if record.is_file() else ""
    return judge_of(base) if base and base != source else None
