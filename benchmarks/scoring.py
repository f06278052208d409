"""What scores cost and what they are worth: the paper's way and the fast way on one pipeline, in one run.

    python benchmarks/scoring.py --model zoo:fashion --work scoring-fashion

Both score every replacement of every operator. What is compared: denoiser passes of one sample (rows of its batches, so that
guidance counts twice; a backward pass counts as two), processor and wall seconds, memory, and what is decided by the scores: their
rank correlation and, for latency 80, 65 and 50 % as the operators' times predict it, the sets that the paper's order takes and
the joint latent shift of each on other samples. Few samples that turn into other pictures can make up most of that, so a ratio of
either half of the samples stands beside it, and what samples move by in the geometric mean. An edit that is in one set only counts
as agreed on where its score lies within the noise of the paper's score of the cut: two standard
deviations between two seeds, told by scoring those near the cut again; and again with other prompts, where there are some: those
of a probe are as much a draw as its noise. What the paper's order takes by these scores instead tells how far apart two runs of
the paper's way are. Beside the order stand plans by either scores that are chosen by joint shift, and their passes.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import ldpruner
from ldpruner.arrangements import sharing_pays
from ldpruner.environment import environment, peak_since_reset, release_memory, reset_peak
from ldpruner.operators.timing import device_of
from ldpruner.pipelines import Pipeline
from ldpruner.planning import APART
from ldpruner.plans import Edit, Score
from ldpruner.probes import Probe
from ldpruner.scoring import SCORERS, Asked, Run, score
from ldpruner.selection import choose
from ldpruner.trajectories import counted

sys.path.insert(0, str(Path(__file__).parent))
from choosing import Chooser, Judge, Moves

SHARES = (0.80, 0.65, 0.50)
SEED = 10_000  # of the second opinion

Key = tuple[str, str]


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
    again = scored_again(pipeline, paper, options.noise)
    noises = {name: noise(paper, scores) for name, scores in again.items()}
    probe = replace(pipeline.varied(paper.probe), samples=options.judged, seed=paper.probe.seed + APART)
    judge = Judge.on(pipeline, probe, paper.fitted, options.batch_size)
    budgets = [budget(share, paper, fast, again, noises, judge, options) for share in SHARES]
    return {"noise_of_a_logarithm": noises, "budgets": budgets}


def budget(
    share: float,
    paper: Run,
    fast: Run,
    again: Mapping[str, Mapping[Key, Score]],
    noises: Mapping[str, float],
    judge: Judge,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Plans for one share of the latency, each beside that of the paper's scores in the paper's order."""
    drawn_again = {f"paper, other {name}": with_scores(paper, scores) for name, scores in again.items()}
    ordered = {
        f"{name}, order": choose(paper.operators, run.scores, {"latency": share}).edits
        for name, run in {"paper": paper, **drawn_again, "fast": fast}.items()
    }
    first = judge.moves(ordered["paper, order"])
    plans = {name: told(edits, judge, first) for name, edits in ordered.items()}
    for name, run in {"paper": paper, "fast": fast}.items() if options.sweep else ():
        chooser = Chooser(pipeline=judge.pipeline, run=run, share=share)
        selection, edits, passes = chooser.swept()
        plans[f"{name}, sweep"] = {**told(edits, judge, first), "selection": selection, "passes": passes}
        if name == "fast" and share in options.improved:
            edits, shifts, passes = chooser.improved(edits)
            plans["fast, improved"] = {**told(edits, judge, first), "shifts_on_the_way": shifts, "passes": passes}
    mine, other = (chosen(ordered[f"{name}, order"]) for name in ("paper", "fast"))
    scores = {entry.key: entry for entry in paper.scores}
    return {
        "latency": share,
        "plans": plans,
        "agreed": {name: agreed(mine, other, scores, noise) for name, noise in noises.items()},
    }


def told(edits: Sequence[Edit], judge: Judge, first: Moves) -> dict[str, Any]:
    return {"edits": len(chosen(edits)), **judge.moves(edits).beside(first)}


def chosen(edits: Sequence[Edit]) -> set[Key]:
    return {(edit.operator, edit.replacement) for edit in edits if edit.reason == "chosen"}


def with_scores(run: Run, scores: Mapping[Key, Score]) -> Run:
    return replace(run, scores=tuple(scores.get(entry.key, entry) for entry in run.scores))


def agreed(mine: set[Key], other: set[Key], scores: Mapping[Key, Score], noise: float) -> float:
    """The share of edits in either set that are in both, or lie within the noise of the highest score that is taken.

    Where such an edit takes the place of another replacement of its operator, that one is in one set only for the same reason.
    """
    cut = math.log(max(scores[key].score for key in mine))
    near = {key for key in mine ^ other if abs(math.log(scores[key].score) - cut) <= 2 * noise}
    ties = {(operator, name) for operator, name in mine ^ other if operator in {operator for operator, _ in near}}
    either = mine | other
    return len((mine & other) | ties) / len(either) if either else 1.0


def scored_again(pipeline: Pipeline, paper: Run, count: int) -> dict[str, dict[Key, Score]]:
    """The paper's scores of `count` edits nearest to the cuts, of other samples: what differs from the first is in the name.

    Other seeds; and, where a pipeline takes prompts, the next of its own prompts as well.
    """
    others = [replace(paper.probe, seed=SEED)]
    if paper.probe.prompts:
        samples, prompts = paper.probe.samples, pipeline.varied(paper.probe).prompts
        others.append(replace(others[0], prompts=prompts[samples : 2 * samples] or prompts))
    by_key = {entry.key: math.log(max(entry.score, 1e-12)) for entry in paper.scores}
    choices = [choose(paper.operators, paper.scores, {"latency": share}) for share in SHARES]
    cuts = [math.log(max(edit.score or 1e-12 for edit in choice.edits)) for choice in choices]
    near = sorted(paper.edits(), key=lambda edit: min(abs(by_key[edit.operator, edit.replacement] - cut) for cut in cuts))[:count]
    found = {}
    for name, probe in zip(("seeds", "seeds and prompts"), others, strict=False):
        asked = Asked(pipeline=pipeline, edits=near, probe=probe, fitted=paper.fitted)
        found[name] = {entry.key: entry for entry in SCORERS["paper"]().scores(asked)}
    return found


def noise(paper: Run, again: Mapping[Key, Score]) -> float:
    """The standard deviation of one score's logarithm from samples to others."""
    pairs = ((entry.score, again[entry.key].score) for entry in paper.scores if entry.key in again)
    return statistics.stdev(math.log(max(other, 1e-12) / max(score, 1e-12)) for score, other in pairs) / math.sqrt(2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:fashion")
    parser.add_argument("--work", type=Path, required=True, help="where scores are kept")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--judged", type=int, default=256, help="other samples that judge the plans")
    parser.add_argument("--noise", type=int, default=16, help="edits that are scored on other samples too")
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True, help="choose plans by joint shift too")
    parser.add_argument("--improved", nargs="*", type=float, default=[], choices=SHARES, help="where that plan is improved too")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
