"""Every method side by side, on the pipelines that ship: the same operators, budgets, repair, distillation and judge.

    python evidence/run.py --data DIR                             # 65 %, every method, two seeds: hours of CPU, resumable
    python evidence/run.py --data DIR --budgets 80% 50% --methods "ld-pruner, ratio" random taylor
    python evidence/run.py fashion --data DIR --methods ld-pruner random --seeds 0

`DIR` holds what the zoo was trained on (`fashion-mnist/`, `emoji64.zip`, `fsdd.zip`); without it, students learn on the
teacher's own generations. Where a recipe names a guide, its plan lies in `evidence/guides/NAME.json`. One line a result goes to
`evidence/results/NAME.jsonl`, as it comes: the original; the original fine-tuned for as many steps (the control); for each
method, budget and seed the pruned model as it is, after repair, and after distillation, with its course on the way; the
first method's network taught from random weights, and its plan taught again under other seeds. A result that is there with the
same settings is not made again.
`docs/evidence.md` is written from the lines.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ldpruner
from ldpruner.environment import environment
from ldpruner.evaluation import Evaluation, evaluate
from ldpruner.files import append_json_line, read_json_lines, write_json
from ldpruner.fitting import fit_pointwise, pointwise_wanted
from ldpruner.operators.tracing import weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.recovery import FIRST_SEED, Distillation, distil
from ldpruner.surgery import pruned_view
from ldpruner.workflow import Pruned, apply, prune

sys.path.insert(0, str(Path(__file__).parent))
from data import distance_to, training_latents, unseen_captions
from lines import OF_CAPTIONS, UNSEEN, place_of
from methods import WAYS
from page import write_page
from pictures import show
from recipes import LONGER, RECIPES
from remembering import remembering
from students import averaged, untrained

NAMES = tuple(RECIPES)
STAGES = ("pruned", "repaired", "distilled")
SETTINGS = (
    *("samples", "few_samples", "steps", "score_samples", "score_steps", "threads"),
    *("distil_steps", "distil_batch", "learning_rate", "warmup_steps"),
    *("task_weight", "output_weight", "feature_weight", "ema_decay"),
    *("guide_budget", "autoguidance_scale"),
)

Key = dict[str, Any]
Facts = dict[str, Any]
Figures = dict[str, dict[str, float | None]]  # by metric, what was found and its error


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    for name, budget in itertools.product(options.names, options.budgets):
        Bench(name, budget, options).run()
    write_page(options.results, options.page)
    json.dump({"results": str(options.results), "page": str(options.page)}, sys.stdout)
    print()


class Bench:
    """One pipeline at one budget: what is done to it, in which order, and what is known already."""

    def __init__(self, name: str, budget: str, options: argparse.Namespace) -> None:
        typed = {option: value for option, value in vars(options).items() if value is not None}
        recipe = RECIPES[name] | LONGER.get((name, budget), {})
        options = argparse.Namespace(**{**vars(options), **recipe, **typed})
        self.name, self.budget, self.options = name, budget, options
        self.work: Path = options.work / name
        self.cache = self.work / "cache"
        self.results: Path = options.results / f"{name}.jsonl"
        self.results.parent.mkdir(parents=True, exist_ok=True)
        self.original = ldpruner.load(options.model or f"zoo:{name}")
        self.data: Path | None = None
        self.unseen: tuple[str, ...] = ()
        self.known_figures: dict[tuple[str, int], Figures] = {}
        if options.data and options.distil_steps:
            self.unseen = unseen_captions(name, options.data)
            self.data = training_latents(name, self.original, options.data, self.work / "data.safetensors")
        self.settings = {setting: getattr(options, setting) for setting in SETTINGS}
        self.settings["data"] = "training latents" if self.data else f"{options.distil_latents} generations of the original"

    def run(self) -> None:
        """Make every result that was asked for and is not there yet, one after the other."""
        self.one({"stage": "original"}, lambda: (self.original, {}))
        first = True
        for seed in self.options.seeds:
            for method in self.options.methods:
                self.of_method(method, seed)
                if first and self.options.distil_steps and not self.learns_nothing():
                    self.one({"stage": "fine-tuned", "seed": 0}, lambda: self.taught(self.original, "original", 0, {}))
                first = False
        if self.options.from_random and self.options.distil_steps:
            self.one({"stage": "from random weights", "seed": 0}, self.from_random)
        for seed in range(1, 1 + self.options.taught_again) if self.options.distil_steps else ():
            self.one({"stage": "taught again", "seed": seed}, functools.partial(self.again, seed))

    def of_method(self, method: str, seed: int) -> None:
        key = {"method": method, "budget": self.budget, "seed": seed}
        keys = [{"stage": stage, **key} for stage in STAGES[: 2 + bool(self.options.distil_steps)]]
        if all(self.known(each) for each in keys):
            return
        pruned, facts = self.pruned(method, self.budget, seed)
        assert pruned.plan.probe is not None
        alone = fit_pointwise(self.original, pointwise_wanted(pruned.plan.edits), pruned.plan.probe)
        bare = self.original.around(pruned_view(self.original.denoiser, pruned.plan.edits, alone))
        repaired = self.original.around(pruned.denoiser)
        self.one(keys[0], lambda: (bare, facts), few=True)
        self.one(keys[1], lambda: (repaired, facts), few=True)
        if len(keys) > 2:
            self.one(keys[2], lambda: self.taught(repaired, place_of(method, self.budget, seed), seed, facts))

    def learns_nothing(self) -> bool:
        """Whether the original has nothing to learn of itself: only the data, or a guide, would teach it something."""
        return not self.options.task_weight and self.options.guide_budget is None

    def from_random(self) -> tuple[Pipeline, Facts]:
        """The network that the first method left, taught from random weights: what do the weights that were kept save?"""
        method = self.options.methods[0]
        pruned, facts = self.pruned(method, self.budget, 0)
        student = self.original.around(untrained(pruned.denoiser))
        return self.taught(student, "random-weights", 0, {**facts, "network": f"{method}, {self.budget}"})

    def again(self, seed: int) -> tuple[Pipeline, Facts]:
        """The first method's plan of seed 0 under another seed of distillation: how far do students differ by training alone?"""
        method = self.options.methods[0]
        pruned, facts = self.pruned(method, self.budget, 0)
        student = self.original.around(pruned.denoiser)
        return self.taught(student, f"again-{seed}", seed, {**facts, "network": f"{method}, {self.budget}"})

    def pruned(self, method: str, budget: str, seed: int) -> tuple[Pruned, Facts]:
        """The method's plan at a measured latency, repaired, and what was measured; both are kept for when a run goes on."""
        place, probe = place_of(method, budget, seed), self.scored_on(seed)
        plan, kept = self.options.results / "plans" / self.name / f"{place}.json", self.work / place / "facts.json"
        if plan.exists() and ldpruner.Plan.load(plan).probe == self.original.completed(probe):
            made, seconds = apply(self.original, ldpruner.Plan.load(plan)), None
        else:
            kept.unlink(missing_ok=True)
            began, way = time.monotonic(), WAYS[method]
            made = prune(
                self.original,
                {"latency": budget},
                probe=probe,
                run=self.run_folder(method, seed),
                method=way.scorer,
                selection=way.selection,
                priors=way.priors,
                repair="closed-form",
            )
            seconds = time.monotonic() - began
            made.plan.save(plan)
        if not kept.exists():
            facts: Facts = {
                **made.summary(),
                "selection": made.plan.selection,
                "latency": asdict(made.latency.ratio),
                "operators": {edit.operator: edit.replacement for edit in made.plan.edits},
                "seconds_pruning": seconds,
            }
            write_json(kept, facts)
        return made, json.loads(kept.read_text(encoding="utf-8"))

    def scored_on(self, seed: int) -> Probe:
        return Probe(samples=self.options.score_samples, num_inference_steps=self.options.score_steps, seed=1_000 * seed)

    def taught(self, student: Pipeline, place: str, seed: int, facts: Facts) -> tuple[Pipeline, Facts]:
        """A student at the end of its distillation; of the first seed's, what its average was like on the way too."""
        folder, began = self.own_folder(place), time.monotonic()
        made = distil(
            student,
            self.teacher,
            work=folder,
            settings=self.distillation(seed),
            data=self.data,
            probe=Probe(samples=self.options.distil_latents, num_inference_steps=20, seed=FIRST_SEED),
            guide=self.guide,
        )
        spent, course = time.monotonic() - began, []
        for steps in (0, *self.options.milestones) if seed == 0 else ():
            then = self.original.around(averaged(student.denoiser, folder, steps))
            course.append({"steps": steps, "figures": self.figures(then, self.options.few_samples)})
        learnt = self.original.around(made.denoiser)
        return learnt, {**facts, "distillation": made.record, "seconds_distilling": spent, "course": course}

    @functools.cached_property
    def teacher(self) -> Pipeline:
        return self.asked_often(self.original.denoiser)

    @functools.cached_property
    def guide(self) -> Pipeline | None:
        """A worse model than the original, one for all students: a plan at a harder budget, the paper's if no method is named.

        It is made once and kept: measured latencies, and with them plans, differ a little from one time to the next.
        """
        if self.options.guide_budget is None:
            return None
        file = self.options.guides / f"{self.name}.json"
        if not file.exists():
            method, _, budget = self.options.guide_budget.rpartition(" at ")
            self.pruned(method or "ld-pruner", budget, 0)[0].plan.save(file)
        return self.asked_often(apply(self.original, ldpruner.Plan.load(file)).denoiser)

    def asked_often(self, denoiser: nn.Module) -> Pipeline:
        """A pipeline with a denoiser that remembers its answers, unless features are compared, which takes more than these."""
        return self.original.around(denoiser if self.options.feature_weight else remembering(denoiser, self.work / "answers"))

    def distillation(self, seed: int) -> Distillation:
        return Distillation(
            max_train_steps=self.options.distil_steps,
            train_batch_size=self.options.distil_batch,
            learning_rate=self.options.learning_rate,
            lr_scheduler="cosine",
            lr_warmup_steps=self.options.warmup_steps,
            task_weight=self.options.task_weight,
            output_weight=self.options.output_weight,
            feature_weight=self.options.feature_weight,
            autoguidance_scale=self.options.autoguidance_scale,
            use_ema=True,
            ema_decay=self.options.ema_decay,
            seed=seed,
            checkpointing_steps=self.options.milestones[0] if self.options.milestones else 100,
            resume_from_checkpoint="latest",
        )

    def own_folder(self, place: str) -> Path:
        """A folder for one student's checkpoints, that shares what is computed of the teacher with those of the others."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        folder = self.work / place / f"distil-{digest[:6]}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("generated", "conditions"):
            shared = self.work / name
            shared.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to(shared.resolve(), target_is_directory=True)
        return folder

    def one(self, key: Key, make: Callable[[], tuple[Pipeline, Facts]], *, few: bool = False) -> None:
        """Make one result, measure it, write it down; nothing where it is known."""
        if self.known(key):
            return
        print(f"{time.strftime('%H:%M:%S')} {self.name} {' '.join(map(str, key.values()))}", file=sys.stderr, flush=True)
        model, facts = make()
        began = time.monotonic()
        counts = [self.options.few_samples] if few else [self.options.samples, self.options.few_samples]
        figures = {str(count): self.figures(model, count) for count in counts}
        if not few:
            figures[str(self.options.samples)] |= self.of_unseen_captions(model)
        shown = None if few or key.get("seed") else show(model, self.options.page.parent / "evidence", self.picture(key))
        line = {
            "identity": self.identity(key),
            "pipeline": self.name,
            **key,
            "figures": figures,
            **facts,
            "shown": shown,
            "seconds_measuring": time.monotonic() - began,
            "settings": self.settings,
            "environment": environment(self.original.denoiser),
            "commit": commit(),
        }
        append_json_line(self.results, line)

    def figures(self, model: Pipeline, samples: int) -> Figures:
        """Every metric of some samples, once for a model: a student begins its course as the repaired model that was measured."""
        key = (weights_digest(model.denoiser), samples)
        if key not in self.known_figures:
            self.known_figures[key] = self.measured_figures(model, samples)
        return dict(self.known_figures[key])

    def measured_figures(self, model: Pipeline, samples: int) -> Figures:
        found = self.measured(model, Probe(samples=samples, num_inference_steps=self.options.steps, seed=20_000))
        figures = {figure.metric: {"value": figure.value, "error": figure.error} for figure in found.figures[0]}
        if self.data:
            distance = distance_to(self.data, model, found.probe, batch_size=self.options.batch_size, cache=self.cache)
            figures["latent-frechet-to-data"] = {"value": distance, "error": None}
        return figures

    def of_unseen_captions(self, model: Pipeline) -> Figures:
        """How well captions are met that no training picture has; the usual prompts are mostly those of training pictures."""
        if not self.unseen:
            return {}
        probe = Probe(samples=len(self.unseen), num_inference_steps=self.options.steps, seed=20_000, prompts=self.unseen)
        found = self.measured(model, probe).figures[0]
        return {UNSEEN + each.metric: {"value": each.value, "error": each.error} for each in found if each.metric in OF_CAPTIONS}

    def measured(self, model: Pipeline, probe: Probe) -> Evaluation:
        return evaluate(model, self.original, probe=probe, batch_size=self.options.batch_size, cache=self.cache)

    def picture(self, key: Key) -> str:
        """A name that lines of other settings do not share."""
        return "-".join([self.name, *map(str, key.values()), self.identity(key)[:6]])

    def known(self, key: Key) -> bool:
        wanted = self.identity(key)
        return any(line["identity"] == wanted for line in read_json_lines(self.results))

    def identity(self, key: Key) -> str:
        whole = json.dumps({"pipeline": self.name, **key, **self.settings}, sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def run_folder(self, method: str, seed: int) -> Path:
        return self.work / f"scores-{WAYS[method].scorer}-{seed}"


def commit() -> str | None:
    """The commit that runs, with `-dirty` where code differs from it (results do as they come); none outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    folder = Path(__file__).parent
    try:
        head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", "*.py", "../src")
    except OSError:  # no git here
        return None
    return f"{head}-dirty" if head and changed else head or None


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="fashion, emoji, digits; all of them by default")
    parser.add_argument("--data", type=Path, help="the folder of the zoo's training data; the teacher's generations by default")
    parser.add_argument("--model", help="another pipeline in the place of zoo:NAME")
    parser.add_argument("--methods", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="METHOD", help=", ".join(WAYS))
    parser.add_argument("--budgets", nargs="+", default=["65%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--from-random", action=argparse.BooleanOptionalAction, default=True, help="the first network, untrained")
    parser.add_argument("--taught-again", type=int, default=2, help="more seeds of distillation for the first plan")
    parser.add_argument("--samples", type=int, default=2000, help="generated for the figures of what is finished")
    parser.add_argument("--few-samples", type=int, default=500, help="generated for figures on the way")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--score-samples", type=int, default=16)
    parser.add_argument("--score-steps", type=int, default=6)
    parser.add_argument("--distil-steps", type=int, help="0: none; this and what has no default: see recipes.py")
    parser.add_argument("--milestones", nargs="*", type=int, help="multiples of the first, after which seed 0 is measured")
    parser.add_argument("--distil-batch", type=int, default=32)
    parser.add_argument("--distil-latents", type=int, default=1000, help="generations of the teacher, where no data is given")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--task-weight", type=float)
    parser.add_argument("--output-weight", type=float, default=1.0)
    parser.add_argument("--feature-weight", type=float, default=0.0)
    parser.add_argument("--guide-budget", help="latency of the worse model that students answer away from, or `METHOD at LATENCY`")
    parser.add_argument("--autoguidance-scale", type=float, help="how far away")
    parser.add_argument("--ema-decay", type=float, default=0.99)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--guides", type=Path, default=Path(__file__).parent / "guides", help="plans of guides, made where missing")
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
