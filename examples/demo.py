"""The whole job on a pipeline that ships: score, plan under a latency budget, prune, save, load with plain diffusers, look.

Run it with `make demo`. It writes to `demo/`: the scores (kept, so that a second run is quick), the pruned pipeline, and a
picture with the same seeds, original above pruned.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm

import ldpruner
from ldpruner import artifacts, reporting
from ldpruner.plans import Score


def main() -> None:
    options = arguments()
    out: Path = options.out
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    diffusers_logging.disable_progress_bar()
    began = time.monotonic()

    original = ldpruner.load(options.model)
    print(f"1. {original}")

    print(f"2. Score every operator: {options.samples} samples x {options.steps} steps for each replacement that fits.")
    probe = ldpruner.Probe(samples=options.samples, num_inference_steps=options.steps)
    run = ldpruner.score(original, probe, out=out / "run", progress=bar)
    print("   " + reporting.operators_line(run.operators))

    print(f"3. Plan for latency {options.latency}, prune, measure.")
    pruned = ldpruner.prune(original, budget={"latency": options.latency}, probe=probe, run=out / "run")
    kinds = [edit.replacement if edit.reason == "chosen" else "dead" for edit in pruned.plan.edits]
    removed = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"   {len(kinds)} operators are replaced ({removed}). Joint latent shift: {pruned.latent_shift:.3f}")

    pruned.save_pretrained(out / "pruned")
    print(reporting.printed(reporting.comparison_table(pruned.record())))

    look = ldpruner.Probe(samples=8, num_inference_steps=20)
    rows = [original.images(look), reloaded(out / "pruned").images(look)]
    reporting.grid(rows, labels=["original", "pruned"]).save(out / "original-above-pruned.png")
    print(f"4. Same seeds, original above pruned, no fine-tuning: {out / 'original-above-pruned.png'}\n")
    print("Load it anywhere with plain diffusers, nothing else to install:\n")
    print(artifacts.loading_lines(str(out / "pruned"), "portable"))
    print(f"\n{time.monotonic() - began:.0f} s in all.")


def reloaded(folder: Path) -> ldpruner.Pipeline:
    """What plain diffusers makes of the saved folder."""
    return ldpruner.Pipeline(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True), source=str(folder))


def bar(scores: Iterable[Score], done: int, total: int) -> Iterable[Score]:
    """A progress bar with the time left."""
    progress: Iterable[Score] = tqdm(scores, initial=done, total=total, desc="scoring", unit="candidate", mininterval=1)
    return progress


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:fashion")
    parser.add_argument("--latency", default="65%")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
