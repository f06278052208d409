"""How well a plan's latency is predicted: by operators' own times alone, and as plans that were measured correct them.

    python benchmarks/latency_model.py --model zoo:fashion

Random plans are measured and correct the times, as planning has it on a new device; nothing that the cache holds is used. Then
other random plans are predicted, and measured twice each: an error is the difference from the mean of both readings, as a share
of it. `repeat` is how far the two readings are apart, as such a share: where it is large, so are all errors, whatever predicts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import ldpruner
from ldpruner.calibration import CALIBRATING, ROUNDS, Bench
from ldpruner.environment import environment
from ldpruner.latencies import Readings, Times, random_plans
from ldpruner.operators.discovery import DeadCode


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    pipeline = ldpruner.load(options.model)
    call = pipeline.call(ldpruner.Probe())
    operators = ldpruner.discover(pipeline.denoiser, call)
    dead_code = DeadCode(pipeline.denoiser, call, operators)
    bench = Bench.of(pipeline, call, operators, dead_code, readings=Readings())

    began = time.perf_counter()
    bench.calibrate(count=options.calibration)
    took = time.perf_counter() - began
    times = bench.times()

    plans = []
    for drawn in random_plans(operators, options.plans, seed=options.seed):
        edits = dead_code.completed(drawn)
        taken = [bench.measure(edits, rounds=options.rounds).value for _ in range(2)]
        by_hooks = Times(operators=operators).latency(edits, {})
        plans.append(compared(by_hooks, times.latency(edits, bench.relaid(edits)), taken) | {"edits": len(edits)})
    result = {
        "model": options.model,
        "calibration": {"plans": len(bench.readings.held), "rounds": ROUNDS, "seconds": took},
        "rounds": options.rounds,
        "errors": {name: summary([plan[name] for plan in plans]) for name in ("error_of_hooks", "error", "repeat")},
        "plans": plans,
        "environment": environment(pipeline.denoiser),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def compared(by_hooks: float, predicted: float, taken: Sequence[float]) -> dict[str, Any]:
    """Two predictions beside the mean of two readings, and how far each is off as a share of that."""
    measured = statistics.mean(taken)
    return {
        "predicted_by_hooks": by_hooks,
        "predicted": predicted,
        "measured": measured,
        "error_of_hooks": abs(by_hooks - measured) / measured,
        "error": abs(predicted - measured) / measured,
        "repeat": abs(taken[0] - taken[1]) / measured,
    }


def summary(errors: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(errors), "worst": max(errors)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:fashion")
    parser.add_argument("--plans", type=int, default=24, help="that are predicted, then measured")
    parser.add_argument("--calibration", type=int, default=CALIBRATING, help="plans that are measured before")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="of the plans that are predicted; those before have 0")
    return parser.parse_args()


if __name__ == "__main__":
    main()
