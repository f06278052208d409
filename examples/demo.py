"""The whole job on a pipeline that ships: score, plan under a latency budget, prune, save, load with plain diffusers, look.

Run it with `make demo`, or `make demo TASK=emoji` for text-to-image and `TASK=digits` for sound. It writes to `demo/TASK/`:
the scores (kept, so that a second run is quick), the pruned pipeline, a picture with the same seeds, original above pruned,
and for sound the WAV files of both.
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
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

import ldpruner
from ldpruner import artifacts, reporting
from ldpruner.plans import Score

LATENCY = {"fashion": "65%", "emoji": "80%", "digits": "65%"}  # what each task bears without recovery


def main() -> None:
    options = arguments()
    out: Path = options.out or Path("demo") / options.task
    latency = options.latency or LATENCY[options.task]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    began = time.monotonic()

    original = ldpruner.load(options.model or f"zoo:{options.task}")
    print(f"1. {original}, {original.task}")

    print(f"2. Score every operator: {options.samples} samples x {options.steps} steps for each replacement that fits.")
    probe = ldpruner.Probe(samples=options.samples, num_inference_steps=options.steps)
    budget = {"latency": latency}
    run = ldpruner.score(original, probe, budget=budget, out=out / "run", progress=bar)
    print("   " + reporting.operators_line(run.operators))

    print(f"3. Plan for latency {latency}, prune, measure.")
    pruned = ldpruner.prune(original, budget=budget, probe=probe, run=out / "run")
    kinds = [edit.replacement if edit.reason == "chosen" else "dead" for edit in pruned.plan.edits]
    removed = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"   {len(kinds)} operators are replaced ({removed}). Joint latent shift: {pruned.latent_shift:.3f}")

    pruned.save_pretrained(out / "pruned")
    print(reporting.printed(reporting.comparison_table(pruned.record())))

    look = original.completed(ldpruner.Probe(samples=8, num_inference_steps=20))
    rows = {"original": original.images(look), "pruned": reloaded(out / "pruned").images(look)}
    print(f"4. Same seeds, original above pruned, no fine-tuning: {show(original, rows, out)}\n")
    print("Load it anywhere with plain diffusers, nothing else to install:\n")
    print(artifacts.loading_lines(str(out / "pruned"), "portable"))
    print(f"\n{time.monotonic() - began:.0f} s in all.")


def show(pipeline: ldpruner.Pipeline, rows: dict[str, list[Image.Image]], out: Path) -> str:
    """Write what was generated, of sound its spectrograms and WAV files, and say where it is."""
    picture = out / "original-above-pruned.png"
    if pipeline.mel is None:
        reporting.grid(list(rows.values()), labels=list(rows)).save(picture)
        return str(picture)
    for label, spectrograms in rows.items():
        reporting.save_sounds(pipeline, spectrograms, out / f"sounds-{label}", first_seed=0)
    upright = [[reporting.upright_spectrogram(each) for each in spectrograms] for spectrograms in rows.values()]
    reporting.grid(upright, labels=list(rows)).save(picture)
    return f"{picture}, and to listen to: {out}/sounds-original, {out}/sounds-pruned"


def reloaded(folder: Path) -> ldpruner.Pipeline:
    """What plain diffusers makes of the saved folder."""
    return ldpruner.Pipeline(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True), source=str(folder))


def bar(scores: Iterable[Score], done: int, total: int) -> Iterable[Score]:
    """A progress bar with the time left."""
    progress: Iterable[Score] = tqdm(scores, initial=done, total=total, desc="scoring", unit="candidate", mininterval=1)
    return progress


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", nargs="?", default="fashion", choices=list(LATENCY))
    parser.add_argument("--model", help="another pipeline than the task's")
    parser.add_argument("--latency", help=", ".join(f"{share} for {task}" for task, share in LATENCY.items()).replace("%", "%%"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
