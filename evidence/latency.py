"""The latency of every plan once more, one after the other, with nothing else running.

    python evidence/latency.py                 # all pipelines, some minutes
    python evidence/latency.py fashion --rounds 61

Plans are measured when they are made, hours apart and often beside another run. This measures those in `evidence/results/plans/`
against the original in one run, and writes `evidence/results/latencies/NAME.json`, which `python evidence/page.py` shows. Beside it
stands what the times of operators predicted; how far that is off, as a share of what is measured, is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ldpruner
from ldpruner.benchmarking import compare_calls
from ldpruner.environment import environment
from ldpruner.files import write_json
from ldpruner.fitting import blank
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Plan
from ldpruner.surgery import pruned_view

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    written, off = [], dict[str, dict[str, float]]()
    for name in options.names or sorted(folder.name for folder in (options.results / "plans").iterdir()):
        original, found = ldpruner.load(options.model or f"zoo:{name}"), dict[str, Any]()
        for file in sorted((options.results / "plans" / name).glob("*.json")):
            found[file.stem] = ratio(original, Plan.load(file), rounds=options.rounds)
            print(f"{name} {file.stem}: {found[file.stem]['value']:.3f}", file=sys.stderr, flush=True)
        written.append(options.results / "latencies" / f"{name}.json")
        how = {"rounds": options.rounds, "threads": options.threads, "environment": environment(original.denoiser)}
        write_json(written[-1], {"ratios": found, **how})
        off[name] = prediction_error(found.values())
    json.dump({"written": list(map(str, written)), "prediction_error": off}, sys.stdout)
    print()


def ratio(original: Pipeline, plan: Plan, *, rounds: int) -> dict[str, Any]:
    """Pruned / original, of one call as large as the plan's own measurement was, and as it was predicted."""
    assert plan.probe is not None
    pruned = pruned_view(original.denoiser, plan.edits, blank(plan.edits))
    measured = compare_calls(original.denoiser, pruned, original.call(plan.probe), rounds=rounds).ratio
    return {**asdict(measured), "predicted": plan.predicted["latency"]}


def prediction_error(ratios: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The median and the worst of |predicted - measured| / measured."""
    errors = [abs(ratio["predicted"] - ratio["value"]) / ratio["value"] for ratio in ratios]
    return {"median": statistics.median(errors), "worst": max(errors)}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="fashion, emoji, digits; all of which there are plans by default")
    parser.add_argument("--model", help="another pipeline in the place of zoo:NAME")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
