"""Every method side by side, on the pipelines that ship: the same operators, budgets, repair, distillation and judge.

    python evidence/run.py                                        # all of it: hours of CPU, in pieces, resumable
    python evidence/run.py fashion --methods ld-pruner random --budgets 65% --seeds 0

One line a result goes to `evidence/results.jsonl`, as it comes: the original, the original fine-tuned for as many steps (the
control), and for each method, budget and seed the pruned model as it is, after repair, and after distillation. A result that is
there with the same settings is not made again. `docs/evidence.md` is written from the lines.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import ldpruner
from ldpruner.environment import environment
from ldpruner.evaluation import evaluate
from ldpruner.files import append_json_line, read_json_lines, write_text
from ldpruner.pipelines import Pipeline
from ldpruner.plans import corrected
from ldpruner.recovery import FIRST_SEED, Distillation, distil
from ldpruner.selection import Priors
from ldpruner.workflow import Pruned, apply, prune

sys.path.insert(0, str(Path(__file__).parent))
from page import rendered

NAMES = ("fashion", "emoji", "digits")
STAGES = ("pruned", "repaired", "distilled")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a method comes to its plan."""

    scorer: str
    selection: str = "order"
    priors: Priors = field(default_factory=Priors)


WAYS = {
    "ld-pruner": Way(scorer="paper"),  # the paper's: lowest score first
    "ld-pruner, ratio": Way(scorer="paper", selection="ratio"),
    "ld-pruner, spread": Way(scorer="paper", priors=Priors(apart=1)),
    "ld-pruner, ends kept": Way(scorer="paper", priors=Priors(protect_ends=1)),
    "random": Way(scorer="random"),
    "magnitude": Way(scorer="magnitude"),
    "taylor": Way(scorer="taylor"),
    "diff-pruning": Way(scorer="diff-pruning"),
    "block-influence": Way(scorer="block-influence"),
    "laptop-diff": Way(scorer="output-mse", selection="ratio"),  # rises that add up, in a knapsack
    "bk-sdm": Way(scorer="bk-sdm"),
    "ends-and-spread": Way(scorer="ends-and-spread"),
}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    for name in options.names:
        for _ in Bench(name, options).results():
            write_text(options.page, rendered(list(read_json_lines(options.results))))
    json.dump({"results": str(options.results), "page": str(options.page)}, sys.stdout)
    print()


class Bench:
    """One pipeline: what is done to it, in which order, and what is known already."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.work: Path = options.work / name
        self.original = ldpruner.load(options.model or f"zoo:{name}")
        self.probe = ldpruner.Probe(samples=options.samples, num_inference_steps=options.steps, seed=20_000)
        names = (
            "samples",
            "steps",
            "score_samples",
            "score_steps",
            "distil_steps",
            "distil_batch",
            "distil_latents",
            "learning_rate",
        )
        self.settings = {setting: getattr(options, setting) for setting in names}

    def results(self) -> Iterator[dict[str, Any]]:
        """Every result that was asked for and is not there yet, made one after the other and written down."""
        yield from self.one({"stage": "original"}, lambda: (self.original, {}))
        for seed in self.options.seeds:
            for budget in self.options.budgets:
                for method in self.options.methods:
                    yield from self.of_method(method, budget, seed)
        if self.options.distil_steps:
            yield from self.one({"stage": "fine-tuned", "seed": 0}, lambda: self.distilled(self.original, "original", 0))

    def of_method(self, method: str, budget: str, seed: int) -> Iterator[dict[str, Any]]:
        key = {"method": method, "budget": budget, "seed": seed}
        place = f"{method}-{budget}-{seed}".replace("%", "").replace(", ", "-").replace(" ", "-")
        keys = {stage: {"stage": stage, **key} for stage in STAGES[: 2 + bool(self.options.distil_steps)]}
        if all(self.known(each) for each in keys.values()):
            return
        began = time.monotonic()
        pruned = self.pruned(method, budget, seed, self.work / place)
        spent = {"pruning": time.monotonic() - began}
        yield from self.one(keys["pruned"], lambda: (_handle(pruned), {**_of(pruned), "spent": spent}))
        began = time.monotonic()
        run = ldpruner.Run.load(self.run_folder(method, seed))
        plan = replace(pruned.plan, edits=corrected(pruned.plan.edits, run.operators), repair="closed-form")
        repaired = apply(self.original, plan)
        spent = {**spent, "repair": time.monotonic() - began}
        yield from self.one(keys["repaired"], lambda: (_handle(repaired), {**_of(repaired), "spent": spent}))
        if "distilled" in keys:
            yield from self.one(keys["distilled"], lambda: self.distilled(_handle(repaired), place, seed, _of(repaired)))

    def run_folder(self, method: str, seed: int) -> Path:
        return self.work / f"scores-{WAYS[method].scorer}-{seed}"

    def pruned(self, method: str, budget: str, seed: int, place: Path) -> Pruned:
        """The method's plan at a measured latency; a plan that an earlier run left there is kept."""
        way, file = WAYS[method], place / "plan.json"
        if file.exists():
            return apply(self.original, ldpruner.Plan.load(file))
        probe = ldpruner.Probe(samples=self.options.score_samples, num_inference_steps=self.options.score_steps, seed=1_000 * seed)
        made = prune(
            self.original,
            {"latency": budget},
            probe=probe,
            run=self.run_folder(method, seed),
            method=way.scorer,
            selection=way.selection,
            priors=way.priors,
        )
        made.plan.save(file)
        return made

    def distilled(
        self, student: Pipeline, place: str, seed: int, facts: dict[str, Any] | None = None
    ) -> tuple[Pipeline, dict[str, Any]]:
        settings = Distillation(
            max_train_steps=self.options.distil_steps,
            train_batch_size=self.options.distil_batch,
            learning_rate=self.options.learning_rate,
            use_ema=True,
            ema_decay=0.999,
            seed=seed,
            checkpointing_steps=250,
            checkpoints_total_limit=1,
            resume_from_checkpoint="latest",
        )
        began = time.monotonic()
        made = distil(
            student,
            self.original,
            work=self.own_folder(place),
            settings=settings,
            data=self.options.data,
            probe=ldpruner.Probe(samples=self.options.distil_latents, num_inference_steps=self.options.steps, seed=FIRST_SEED),
        )
        facts = {**(facts or {}), "distillation": made.record, "seconds_distilling": time.monotonic() - began}
        return Pipeline(_with(student, made.denoiser), source=self.original.source), facts

    def own_folder(self, place: str) -> Path:
        """A folder for one student's checkpoints, that shares the teacher's generations with those of the others."""
        folder, shared = self.work / place / "distil", self.work / "generated"
        folder.mkdir(parents=True, exist_ok=True)
        shared.mkdir(exist_ok=True)
        if not (folder / "generated").exists():
            (folder / "generated").symlink_to(shared.resolve(), target_is_directory=True)
        return folder

    def known(self, key: dict[str, Any]) -> bool:
        wanted = self.identity(key)
        return any(line["identity"] == wanted for line in read_json_lines(self.options.results))

    def identity(self, key: dict[str, Any]) -> str:
        whole = json.dumps({"pipeline": self.name, **key, **self.settings}, sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def one(self, key: dict[str, Any], make: Any) -> Iterator[dict[str, Any]]:
        """Make one result, measure it, write it down; nothing where it is known."""
        if self.known(key):
            return
        print(f"{self.name} {' '.join(map(str, key.values()))}", file=sys.stderr, flush=True)
        model, facts = make()
        found = evaluate(model, self.original, probe=self.probe, batch_size=self.options.batch_size, cache=self.work / "cache")
        figures = {figure.metric: {"value": figure.value, "error": figure.error} for figure in found.figures[0]}
        line = {
            "identity": self.identity(key),
            "pipeline": self.name,
            **key,
            "figures": figures,
            **facts,
            "settings": self.settings,
            "environment": environment(self.original.denoiser),
        }
        append_json_line(self.options.results, line)
        yield line


def _handle(pruned: Pruned) -> Pipeline:
    return Pipeline(pruned.pipe, source=pruned.pipeline.source)


def _with(pipeline: Pipeline, denoiser: Any) -> Any:
    pipe = copy.copy(pipeline.pipe)
    setattr(pipe, pipeline.component, denoiser)
    return pipe


def _of(pruned: Pruned) -> dict[str, Any]:
    """What a plan took away, and what that saves."""
    return {**pruned.summary(), "latency": asdict(pruned.latency.ratio), "operators": [e.operator for e in pruned.plan.edits]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="fashion, emoji, digits; all of them by default")
    parser.add_argument("--model", help="another pipeline in the place of zoo:NAME")
    parser.add_argument("--methods", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="METHOD", help=", ".join(WAYS))
    parser.add_argument("--budgets", nargs="+", default=["65%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--score-samples", type=int, default=16)
    parser.add_argument("--score-steps", type=int, default=6)
    parser.add_argument("--distil-steps", type=int, default=1000, help="0: none")
    parser.add_argument("--distil-batch", type=int, default=32)
    parser.add_argument("--distil-latents", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--data", type=Path, help="what to distil on; the teacher's own generations by default")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
