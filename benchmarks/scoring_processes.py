"""How much sooner scores are there when several processes share the edits: one process against more, one thread each, in turn.

    python benchmarks/scoring_processes.py --model zoo:fashion --processes 2

Both are started by torchrun, load the pipeline, find the operators, and wait for each other; then the paper's scores of every edit
that needs no fitting are timed, until all processes have all of them. What counts is the ratio of the medians. `ideal` is how much
faster two processes are that do not know of each other, each with half of the edits: what the machine itself allows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

import ldpruner
from ldpruner.environment import environment
from ldpruner.operators import discover
from ldpruner.processes import Crew
from ldpruner.scoring import score

REPLACEMENTS = ["identity", "zero", "shortcut"]


def main() -> None:
    options = arguments()
    if options.timed:
        timed(options)
        return
    taken: dict[int, list[float]] = {1: [], options.processes: []}
    for _ in range(options.rounds):
        for processes, seconds in taken.items():
            seconds.append(started(options, processes))
    one, more = (statistics.median(seconds) for seconds in taken.values())
    ideal = [apart(options) for _ in range(options.rounds)]
    pipeline = ldpruner.load(options.model)
    result = {
        "model": options.model,
        "processes": options.processes,
        "seconds": {str(processes): seconds for processes, seconds in taken.items()},
        "times_faster": one / more,
        "ideal": one / statistics.median(ideal),
        "environment": environment(pipeline.denoiser),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def command(options: argparse.Namespace, *words: str) -> list[str]:
    own = [__file__, "--timed", "--model", options.model, "--samples", str(options.samples), "--steps", str(options.steps)]
    return [*words, *own, "--every", str(options.every)]


def started(options: argparse.Namespace, processes: int) -> float:
    """The seconds that so many processes need."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = [sys.executable, *several]
    printed = subprocess.run(command(options, *words), env=alone(), capture_output=True, text=True, check=True).stdout
    return float(json.loads(printed.strip().splitlines()[-1])["seconds"])


def apart(options: argparse.Namespace) -> float:
    """The seconds of the slowest of as many single processes at once, each of which scores its share."""
    words = [[sys.executable], ["--share", str(options.processes)]]
    runs = [
        subprocess.Popen([*command(options, *words[0]), *words[1], str(number)], env=alone(), stdout=subprocess.PIPE, text=True)
        for number in range(options.processes)
    ]
    return max(float(json.loads(run.communicate()[0].strip().splitlines()[-1])["seconds"]) for run in runs)


def alone() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def timed(options: argparse.Namespace) -> None:
    """What every started process does; the first prints the seconds."""
    torch.set_num_threads(1)
    pipeline = ldpruner.load(options.model)
    probe = ldpruner.Probe(samples=options.samples, num_inference_steps=options.steps)
    operators = discover(pipeline.denoiser, pipeline.call(probe), timing_repeats=0)
    kept = operators.operators[:: options.every]
    if options.share:
        of, number = options.share
        kept = kept[number::of]
    crew = Crew.joined(cpu=True)
    crew.gathered({})  # all are ready
    began = time.perf_counter()
    some = type(operators)(**{**vars(operators), "operators": kept})
    score(pipeline, probe, method="paper", operators=some, replacements=REPLACEMENTS, crew=crew)
    seconds = time.perf_counter() - began
    crew.leave()
    if crew.leads:
        print(json.dumps({"seconds": seconds}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:fashion")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="of the operators, one in so many")
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, metavar=("OF", "NUMBER"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
