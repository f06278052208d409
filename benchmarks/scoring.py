"""What scores cost and what they are worth: the paper's way and the fast way on one pipeline, in one run.

    python benchmarks/scoring.py --model zoo:fashion --work scoring-fashion

Both score every replacement of every operator. What is compared: denoiser passes of one sample (rows of its batches, so that
guidance counts twice; a backward pass counts as two), processor and wall seconds, memory, and what is decided by the scores: their
rank correlation and, for latency 80, 65 and 50 % as the operators' times predict it, the sets that the paper's order takes and
the joint latent shift of each on other samples. Few samples that turn into other pictures can make up most of that; what samples
move by in the geometric mean stands beside it. An edit that is in one set only counts as agreed on where its score lies within
the noise of the paper's score of the cut: two standard deviations between two seeds, told by scoring those near the cut again;
and again with other prompts, where there are some: those of a probe are as much a draw as its noise.
Beside the paper's order by either scores stand plans by the fast scores that are chosen by joint shift, and their passes.

Scores of the paper's way are kept in the folder `--work`: a run that stopped goes on there. Each of them costs the same, so what
one costs is measured in this run and multiplied; `seconds_told` is the sum of what each took when it was scored. The fast way runs
whole.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import ldpruner
from ldpruner.arrangements import sharing_pays
from ldpruner.environment import environment, peak_since_reset, release_memory, reset_peak
from ldpruner.improving import improve
from ldpruner.judging import JointShift
from ldpruner.operators.timing import device_of
from ldpruner.pipelines import Pipeline
from ldpruner.planning import JUDGED_ON
from ldpruner.plans import Edit, Quantity, Score
from ldpruner.probes import Probe
from ldpruner.scoring import SCORERS, Asked, Run, score
from ldpruner.scoring.latent import distances, latent_shift
from ldpruner.selection import SWEEP, choice_of, choose, chosen_in, selections_of
from ldpruner.selection.choice import Chosen
from ldpruner.surgery import pruned_view
from ldpruner.trajectories import counted

SHARES = (0.80, 0.65, 0.50)
IMPROVED_AT = 0.65  # where plans are improved too, if that is asked for: some hundred sets are measured
APART = 5_000  # from the seeds that score to those that judge
SEED = 10_000  # of the second opinion

Key = tuple[str, str]
Moves = tuple[float, float]  # the joint latent shift of a plan, and what samples move by in the geometric mean


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    pipeline = ldpruner.load(options.model)
    probe = Probe(samples=options.samples, num_inference_steps=options.steps)
    paper, paper_cost = papers_way(pipeline, probe, options.work / "paper")
    fast, fast_cost = fast_way(pipeline, probe, options.work / "fast", paper)
    result = {
        "model": options.model,
        "samples": options.samples,
        "steps": options.steps,
        "edits": len(paper.scores),
        "paper": paper_cost,
        "fast": fast_cost,
        "times_fewer_passes": paper_cost["passes"] / fast_cost["passes"],
        "times_less_wall_time": paper_cost["wall_seconds"] / fast_cost["wall_seconds"],
        "times_less_processor_time": paper_cost["processor_seconds"] / fast_cost["processor_seconds"],
        "judged": {
            kind: sum(entry.judged == kind for entry in fast.scores) for kind in sorted({str(e.judged) for e in fast.scores})
        },
        "spearman": float(spearmanr([e.score for e in paper.scores], [e.score for e in fast.scores])[0]),
        **decisions(pipeline, paper, fast, options),
        "environment": environment(pipeline.denoiser),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


@contextmanager
def measured(pipeline: Pipeline) -> Iterator[dict[str, Any]]:
    """Passes, seconds and the most memory of a block, once it has ended; what earlier runs have kept is not there for it."""
    cost: dict[str, Any] = {}
    release_memory()
    watched = reset_peak(device_of(pipeline.denoiser))
    with no_cache(), counted(pipeline.denoiser) as passes:
        wall, processor = time.perf_counter(), time.process_time()
        yield cost
        cost |= {"wall_seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    cost["passes"] = passes.count
    cost["peak_bytes"] = peak_since_reset(device_of(pipeline.denoiser)) if watched else None


@contextmanager
def no_cache() -> Iterator[None]:
    """An empty cache, for as long as the block runs."""
    before = os.environ.get("LDPRUNER_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LDPRUNER_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["LDPRUNER_CACHE"]
            else:
                os.environ["LDPRUNER_CACHE"] = before


def papers_way(pipeline: Pipeline, probe: Probe, work: Path) -> tuple[Run, dict[str, Any]]:
    """The paper's scores and what they cost: that of one edit, measured here, for each; every edit costs the same passes."""
    run = score(pipeline, probe, method="paper", out=work)
    asked = Asked(pipeline=pipeline, edits=run.edits(), probe=run.probe, fitted=run.fitted)
    return run, papers_cost(asked) | {"seconds_told": sum(entry.seconds for entry in run.scores)}


def papers_cost(asked: Asked) -> dict[str, Any]:
    """What the paper's way costs for all edits: that of one, measured here, for each; every edit costs the same passes."""
    costs = []
    for count in (1, 3):
        with measured(asked.pipeline) as cost:
            list(SCORERS["paper"]().scores(replace(asked, edits=asked.edits[:count])))
        costs.append(cost)
    each = {name: (costs[1][name] - costs[0][name]) / 2 for name in ("passes", "processor_seconds", "wall_seconds")}
    whole = {name: costs[0][name] + (len(asked.edits) - 1) * each[name] for name in each}
    return {**whole, "passes": round(whole["passes"]), "peak_bytes": costs[1]["peak_bytes"]}


def fast_way(pipeline: Pipeline, probe: Probe, work: Path, paper: Run) -> tuple[Run, dict[str, Any]]:
    """The fast scores, and what they cost from nothing; stand-ins and operators' times are those of the paper's run."""
    work.mkdir(parents=True, exist_ok=True)
    scorer = SCORERS["fast"]()
    asked = Asked(
        pipeline=pipeline,
        edits=paper.edits(),
        probe=paper.probe,
        fitted=paper.fitted,
        operators=paper.operators,
        targets=tuple({"latency": share} for share in SHARES),
        edits_at_once=edits_at_once(pipeline, scorer.few_samples(paper.probe), paper.probe),
    )
    with measured(pipeline) as cost:
        scores = tuple(scorer.scores(asked))
    cost["edits_at_once"] = asked.edits_at_once
    (work / "scores.jsonl").write_text("".join(json.dumps(vars(entry)) + "\n" for entry in scores), encoding="utf-8")
    return replace(paper, method="fast", scores=scores), cost


def edits_at_once(pipeline: Pipeline, few: int, probe: Probe) -> int:
    """How many edits share a denoiser call, as scoring tries it before it begins."""
    times = probe.samples // few
    small, large = (pipeline.call(probe, samples=samples) for samples in (few, few * times))
    with no_cache():
        pays = times > 1 and sharing_pays(pipeline.denoiser, small, large, tell=lambda line: print(line, file=sys.stderr))
    return times if pays else 1


def decisions(pipeline: Pipeline, paper: Run, fast: Run, options: argparse.Namespace) -> dict[str, Any]:
    """What each way's scores make of the same budgets."""
    noises = noises_of(pipeline, paper, options.noise)
    judge = replace(pipeline.varied(paper.probe), samples=options.judged, seed=paper.probe.seed + APART)
    reference = pipeline.latents(judge, batch_size=options.batch_size)

    def moved(edits: Sequence[Edit]) -> Moves:
        """The joint latent shift, and the geometric mean of what samples move by, in which no single one counts for much."""
        with torch.inference_mode(), pipeline.with_denoiser(pruned_view(pipeline.denoiser, edits, paper.fitted)):
            latents = pipeline.latents(judge, batch_size=options.batch_size)
        return latent_shift(reference, latents), float(distances(reference, latents).clamp(min=1e-12).log().mean().exp())

    budgets = [budget(share, paper, fast, noises, moved) for share in SHARES]
    for entry in budgets if options.sweep else ():
        share = entry["latency"]
        improved_on = options.improved if share == IMPROVED_AT else 0
        chooser = Chooser(pipeline=pipeline, run=fast, share=share, improved_on=improved_on)
        entry["chosen_jointly"] = chooser.compared(moved, entry["joint_shifts"][0])
    return {"noise_of_a_logarithm": noises, "budgets": budgets}


def budget(
    share: float, paper: Run, fast: Run, noises: Mapping[str, float], moved: Callable[[Sequence[Edit]], Moves]
) -> dict[str, Any]:
    """What the paper's order takes for one share of the latency, by the scores of each way."""
    mine, other = (choose(paper.operators, run.scores, {"latency": share}) for run in (paper, fast))
    sets = [{(e.operator, e.replacement) for e in choice.edits if e.reason == "chosen"} for choice in (mine, other)]
    shifts, movements = zip(*(moved(choice.edits) for choice in (mine, other)), strict=True)
    return {
        "latency": share,
        "edits": [len(each) for each in sets],
        "joint_shifts": shifts,
        "fast_to_paper": shifts[1] / shifts[0],
        "geometric_mean_movements": movements,
        "fast_to_paper_by_movement": movements[1] / movements[0],
        "agreed": {
            name: agreed(sets[0], sets[1], {entry.key: entry for entry in paper.scores}, noise) for name, noise in noises.items()
        },
    }


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """Plans from the fast scores that are chosen by their joint shift, for one share of the latency as operators' times predict it.

    As planning has it, but that no latency is measured: a plan by each ranking and objective, of which the one that shifts least
    is taken (`sweep`); and that plan improved, where `improved_on` says on how many samples. Judges see none of the samples that
    the plans are compared on here.
    """

    pipeline: Pipeline
    run: Run
    share: float
    improved_on: int

    def compared(self, moved: Callable[[Sequence[Edit]], Moves], papers: float) -> dict[str, Any]:
        """Each joint shift, beside that of the plan by the paper's scores and order, and the passes that it took to choose."""
        result: dict[str, Any] = {}
        with counted(self.pipeline.denoiser) as passes:
            name, edits = self.swept()
        result["sweep"] = {"selection": name, **self.figures(moved, edits, papers), "passes": passes.count}
        if self.improved_on:
            with counted(self.pipeline.denoiser) as passes:
                edits = self.improved(edits)
            result["improved"] = {**self.figures(moved, edits, papers), "passes": passes.count}
        return result

    def figures(self, moved: Callable[[Sequence[Edit]], Moves], edits: Sequence[Edit], papers: float) -> dict[str, Any]:
        shift, movement = moved(edits)
        chosen = sum(edit.reason == "chosen" for edit in edits)
        return {"edits": chosen, "joint_shift": shift, "to_paper": shift / papers, "geometric_mean_movement": movement}

    def judge(self, samples: int, apart: int, edits: Sequence[Edit]) -> JointShift:
        seed = self.run.probe.seed + apart
        judge = JointShift.on(self.pipeline, self.run.probe, samples=samples, seed=seed, batch_size=None)
        return judge.tamed(edits, self.run.fitted)

    def swept(self) -> tuple[str, Sequence[Edit]]:
        plans: dict[str, Sequence[Edit]] = {}
        for name in selections_of(SWEEP, self.run.scores):
            edits = choose(self.run.operators, self.run.scores, self.targets, selection=name).edits
            if edits not in plans.values():
                plans[name] = edits
        judge = self.judge(JUDGED_ON, 3 * APART, next(iter(plans.values())))
        best = min(plans, key=lambda name: judge.of(plans[name], self.run.fitted))
        return best, plans[best]

    def improved(self, edits: Sequence[Edit]) -> Sequence[Edit]:
        operators, scores, judge = self.run.operators, self.run.scores, self.judge(self.improved_on, 2 * APART, edits)

        def shift(chosen: Chosen) -> float:
            return judge.of(choice_of(chosen, operators, scores, {}).edits, self.run.fitted)

        found = improve(chosen_in(edits, operators), operators, scores, self.targets, judge=shift)
        return choice_of(found.chosen, operators, scores, {}).edits

    @property
    def targets(self) -> dict[Quantity, float]:
        return {"latency": self.share}


def agreed(mine: set[Key], other: set[Key], scores: Mapping[Key, Score], noise: float) -> float:
    """The share of edits in either set that are in both, or lie within the noise of the highest score that is taken.

    Where such an edit takes the place of another replacement of its operator, that one is in one set only for the same reason.
    """
    cut = math.log(max(scores[key].score for key in mine))
    near = {key for key in mine ^ other if abs(math.log(scores[key].score) - cut) <= 2 * noise}
    ties = {(operator, name) for operator, name in mine ^ other if operator in {operator for operator, _ in near}}
    either = mine | other
    return len((mine & other) | ties) / len(either) if either else 1.0


def noises_of(pipeline: Pipeline, paper: Run, count: int) -> dict[str, float]:
    """The standard deviation of one score's logarithm, of `count` edits nearest to the cuts, from other samples to others.

    From seed to seed; and, where a pipeline takes prompts, with the next of its own prompts as well.
    """
    others = [replace(paper.probe, seed=SEED)]
    if paper.probe.prompts:
        samples, prompts = paper.probe.samples, pipeline.varied(paper.probe).prompts
        others.append(replace(others[0], prompts=prompts[samples : 2 * samples] or prompts))
    by_key = {entry.key: math.log(max(entry.score, 1e-12)) for entry in paper.scores}
    choices = [choose(paper.operators, paper.scores, {"latency": share}) for share in SHARES]
    cuts = [math.log(max(edit.score or 1e-12 for edit in choice.edits)) for choice in choices]
    near = sorted(paper.edits(), key=lambda edit: min(abs(by_key[edit.operator, edit.replacement] - cut) for cut in cuts))[:count]
    noises = {}
    for name, probe in zip(("seeds", "seeds and prompts"), others, strict=False):
        asked = Asked(pipeline=pipeline, edits=near, probe=probe, fitted=paper.fitted)
        ratios = [math.log(max(entry.score, 1e-12)) - by_key[entry.key] for entry in SCORERS["paper"]().scores(asked)]
        noises[name] = statistics.stdev(ratios) / math.sqrt(2)
    return noises


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:fashion")
    parser.add_argument("--work", type=Path, required=True, help="where scores are kept")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--judged", type=int, default=256, help="other samples that judge the plans")
    parser.add_argument("--noise", type=int, default=16, help="edits that are scored with a second seed")
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True, help="choose plans by joint shift too")
    parser.add_argument("--improved", type=int, default=0, help="samples on which the plan of 65 %% is improved too")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
