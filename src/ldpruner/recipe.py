"""Recipes run: the stages of one experiment in order, each made once and kept, so that a run that was stopped goes on.

In the folder of a run lie `recipe.yaml`, `scores/`, `plan.json`, `pruned/`, `distilled/` where a recipe asks for it,
`evaluation.json`, `benchmark.json` and `summary.json`. A stage is made again where its settings, or a file that it reads, are
other than when it was made; scores and distillations of other settings are kept beside each other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldpruner import artifacts, evaluation, planning, recovery, scoring, workflow
from ldpruner.benchmarking import benchmark
from ldpruner.card_text import RECORD
from ldpruner.errors import ArtifactError, RecipeError
from ldpruner.evaluation.base import ALIASES, METRICS
from ldpruner.evaluation.features import FEATURE_NETS
from ldpruner.evaluation.kept import Watch
from ldpruner.files import as_json, write_json, write_text
from ldpruner.opening import locate
from ldpruner.pipelines import PROMPTS, USUAL, Pipeline, load
from ldpruner.plans import Plan
from ldpruner.recipe_settings import Recipe
from ldpruner.recovery.settings import LATEST
from ldpruner.replacements import REPLACEMENTS
from ldpruner.runs import read_scored
from ldpruner.selection import selections_of
from ldpruner.sharing import INDEX, is_hub_id
from ldpruner.solvers import SOLVERS

__all__ = ["Recipe", "run"]

log = logging.getLogger(__name__)

STAGES = "stages.json"
SUMMARY = "summary.json"


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    tell: Callable[[str], None] = log.info,
    progress: scoring.engine.Progress | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Run what is missing of a recipe's stages in the folder `out`, and return the summary, which `summary.json` there holds.

    `tell` is told what each stage does. Raises `LDPrunerError` with what to do; a name that is unknown, data that is missing and
    a metric that cannot be measured are told before anything is computed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a recipe runs in one process, and several were started. Start it without torchrun or accelerate.")
    recipe.check_files()
    check_names(recipe)
    work = _Work(recipe=recipe, out=Path(out), progress=progress, watch=watch)
    work.prepare()
    stages = work.stages()
    if not all(work.done(stage) for stage in stages):
        work.check()
    for stage in stages:
        if work.done(stage):
            tell(f"{stage.name}: done before, with the same settings")
            continue
        tell(f"{stage.name}: begins")
        began = time.monotonic()
        stage.make()
        work.keep(stage, seconds=time.monotonic() - began)
    summary = work.summary()
    _write_changed(work.out / SUMMARY, as_json(summary))
    return summary


def check_names(recipe: Recipe) -> None:
    """Raise what a stage would raise of a name that nothing has, hours later."""
    scoring.SCORERS[recipe.score.method]
    selections_of(recipe.plan.selection)
    for name in recipe.score.replacements or ():
        REPLACEMENTS[name]
    for section in (recipe.score, recipe.distil, recipe.evaluate, recipe.benchmark):
        if section and section.solver:
            SOLVERS[section.solver]
    for name in recipe.evaluate.metrics or ():
        METRICS[ALIASES.get(name.lower(), (name, ""))[0]]
    for net in recipe.evaluate.features or ():
        name = net.partition("=")[0]
        if name != "judge":
            FEATURE_NETS[name]


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One step of a run: what decides what comes of it, and what it leaves."""

    name: str
    settings: Any
    reads: tuple[Path, ...]
    product: Path
    make: Callable[[], None]

    def key(self) -> str:
        """A fingerprint of the settings, and of the files that are read: their names, sizes and times."""
        return _key([self.name, self.settings, [_files_in(path) for path in self.reads]])


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One run of a recipe, in its folder."""

    recipe: Recipe
    out: Path
    progress: scoring.engine.Progress | None
    watch: Watch | None

    def prepare(self) -> None:
        """Write down what runs. Raises `ArtifactError` where the folder holds anything that no run left, or cannot be written."""
        there = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        if there and STAGES not in there and "recipe.yaml" not in there:
            raise ArtifactError(f"{self.out}: holds files that no run of a recipe left. Name another folder.")
        _write_changed(self.out / "recipe.yaml", self.recipe.to_yaml())

    def check(self) -> None:
        """Raise now what the last stages would raise before they begin."""
        asked = self.recipe.evaluate
        evaluation.check(
            self.original,
            self.original,
            probe=asked.probe(),
            metrics=asked.metrics,
            features=asked.features,
            reference=asked.reference,
            resize=asked.resize,
        )
        self.original.call(self.recipe.benchmark.probe())
        self.original.latents(replace(asked.probe(), samples=1, num_inference_steps=min(2, asked.num_inference_steps)))

    def stages(self) -> list[_Stage]:
        """What is to be done, in order."""
        recipe, model = self.recipe, asdict(self.recipe.model)
        where = recipe.model.source
        source = () if is_hub_id(where) else (Path(locate(where)),)
        parts = {"score": asdict(recipe.score), "plan": asdict(recipe.plan), "prune": asdict(recipe.prune)}
        read = {name: self._data(name) for name in ("score", "distil", "evaluate", "benchmark")}
        budget = dict(recipe.plan.budget)
        scores, plan, pruned, last = self._scores, self.out / "plan.json", self.out / "pruned", self._last
        stages = [
            _Stage(name="score", settings=[model, parts["score"], budget], reads=(*source, *read["score"]),
                   product=scores / "run.json", make=self._score),
            _Stage(name="plan", settings=[model, parts["plan"]], reads=(*source, scores), product=plan, make=self._plan),
            _Stage(name="prune", settings=[model, parts["prune"]], reads=(*source, plan), product=pruned, make=self._prune),
        ]  # fmt: skip
        if recipe.distil:
            stages.append(_Stage(name="distil", settings=[model, asdict(recipe.distil)], reads=(*source, pruned, *read["distil"]),
                                 product=last, make=self._distil))  # fmt: skip
        for name, make in (("evaluate", self._evaluate), ("benchmark", self._benchmark)):
            reads = (*source, last, *read[name])
            settings = [model, asdict(getattr(recipe, name))]
            stages.append(_Stage(name=name, settings=settings, reads=reads, product=self._result(name), make=make))
        return stages

    def _data(self, section: str) -> tuple[Path, ...]:
        """The files of the user's that a stage reads."""
        return tuple(Path(file).expanduser() for setting, file in self.recipe.files() if setting.startswith(f"{section}."))

    @property
    def _last(self) -> Path:
        """The model that is evaluated."""
        return self.out / ("distilled" if self.recipe.distil else "pruned")

    def _result(self, stage: str) -> Path:
        return self.out / {"evaluate": "evaluation.json", "benchmark": "benchmark.json"}[stage]

    @property
    def _scores(self) -> Path:
        return self.out / "scores" / _key([asdict(self.recipe.model), asdict(self.recipe.score)])[:8]

    def done(self, stage: _Stage) -> bool:
        """Whether what a stage makes is there, made with the same settings from the same files."""
        return stage.product.exists() and self._kept().get(stage.name, {}).get("key") == stage.key()

    def keep(self, stage: _Stage, *, seconds: float) -> None:
        """Remember that a stage is done."""
        write_json(self.out / STAGES, self._kept() | {stage.name: {"key": stage.key(), "seconds": round(seconds, 2)}})

    def _kept(self) -> dict[str, Any]:
        return _json(self.out / STAGES) if (self.out / STAGES).exists() else {}

    @functools.cached_property
    def original(self) -> Pipeline:
        """The pipeline that is pruned, loaded once."""
        return self._load(self.recipe.model.source)

    def _load(self, source: str, dtype: str | None = None) -> Pipeline:
        asked = self.recipe.model
        options = {name: getattr(asked, name) for name in ("device", "component")}
        if source == asked.source:
            options |= {name: getattr(asked, name) for name in ("revision", "variant", "config", "trust_remote_code")}
        return load(source, dtype=getattr(torch, dtype or asked.dtype), **options)

    def _score(self) -> None:
        asked = self.recipe.score
        scoring.score(
            self.original,
            asked.probe(),
            method=asked.method,
            replacements=asked.replacements,
            budget=self.recipe.plan.budget,
            out=self._scores,
            batch_size=asked.batch_size,
            progress=self.progress,
        )

    def _plan(self) -> None:
        asked, scored = self.recipe.plan, scoring.Run.load(self._scores)
        made = planning.plan(
            self.original,
            scored,
            asked.budget,
            selection=asked.selection,
            replacements=self.recipe.score.replacements,
            priors=asked.priors(),
            repair=asked.repair,
            batch_size=self.recipe.score.batch_size,
        )
        made.plan.save(self.out / "plan.json")

    def _prune(self) -> None:
        plan = Plan.load(self.out / "plan.json")
        pruned = workflow.apply(self.original, plan, batch_size=self.recipe.score.batch_size)
        pruned.save_pretrained(self.out / "pruned", form=self.recipe.prune.form)

    def _distil(self) -> None:
        asked = self.recipe.distil
        assert asked is not None
        folder = _key([asdict(asked), _files_in(self.out / "pruned")])[:8]
        training = replace(asked.training, resume_from_checkpoint=asked.training.resume_from_checkpoint or LATEST)
        teacher = self.recipe.model.source
        distilled = recovery.distil(
            self._load(str(self.out / "pruned"), "float32"),
            self.original if self.recipe.model.dtype == "float32" else self._load(teacher, "float32"),
            work=self.out / "distillation" / folder,
            settings=training,
            data=Path(asked.data) if asked.data else None,
            split=asked.split,
            caption=asked.caption,
            probe=asked.probe(),
        )
        artifacts.save_distilled(distilled, self._last)

    def _evaluate(self) -> None:
        asked = self.recipe.evaluate
        made = evaluation.evaluate(
            self._load(str(self._last)),
            self.original,
            probe=asked.probe(),
            metrics=asked.metrics,
            features=asked.features,
            reference=asked.reference,
            resize=asked.resize,
            batch_size=asked.batch_size,
            watch=self.watch,
        )
        write_json(self._result("evaluate"), made.to_json())

    def _benchmark(self) -> None:
        asked = self.recipe.benchmark
        made = benchmark(self._load(str(self._last)), self.original, probe=asked.probe(), rounds=asked.rounds)
        write_json(self._result("benchmark"), made)

    def summary(self) -> dict[str, Any]:
        """What came of every stage, in short; the rest is in their files."""
        record, evaluated, timed = (_json(path) for path in (self._last / RECORD, *map(self._result, ("evaluate", "benchmark"))))
        plan, scored = Plan.load(self.out / "plan.json"), read_scored(self._scores)
        return {
            "recipe": self.recipe.name,
            "model": self.recipe.model.source,
            "published": dict(self.recipe.published),
            "scores": len(scored.scores),
            "edits": len(plan.edits),
            "budget": [str(budget) for budget in plan.budgets],
            "params": record["params"],
            "macs": record["macs"],
            "latency_ratio": record["latency_ratio"],
            "distillation": _learnt(record),
            "evaluation": _figures(evaluated),
            "benchmark": {name: times["ratio"]["value"] for name, times in timed["times"].items()},
            "seconds": {stage.name: self._kept()[stage.name]["seconds"] for stage in self.stages()},
            "files": {
                "scores": str(self._scores),
                "plan": str(self.out / "plan.json"),
                "model": str(self._last),
                "evaluation": str(self._result("evaluate")),
                "benchmark": str(self._result("benchmark")),
            },
        }


def _learnt(record: dict[str, Any]) -> dict[str, Any] | None:
    learnt = record.get("distillation")
    return {name: learnt[name] for name in ("data", "steps", "losses")} if learnt else None


def _figures(evaluated: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of the pruned model, beside the original's where it has one."""
    pruned, original = (model["figures"] for model in evaluated["models"])
    known = {(figure["metric"], figure["features"]): figure["value"] for figure in original}
    return [
        {name: figure[name] for name in ("metric", "title", "features", "better", "samples", "reference")}
        | {"original": known.get((figure["metric"], figure["features"])), "pruned": figure["value"]}
        for figure in pruned
    ]


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}). Remove it, and run again: it is made anew.") from error


def _write_changed(path: Path, text: str) -> None:
    """Write a text, unless the file says that already."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _key(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _files_in(path: Path) -> list[tuple[str, int, int]]:
    """The name, size and time of a file, or of every file below a folder; of a pipeline's folder not its card and record."""
    pipeline = (path / INDEX).is_file()
    return sorted(
        (file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns)
        for file in (path.rglob("*") if path.is_dir() else _existing(path))
        if file.is_file() and not (pipeline and file.parent == path and file.name not in (INDEX, PROMPTS, USUAL))
    )


def _existing(path: Path) -> Iterable[Path]:
    return [path] if path.exists() else []
