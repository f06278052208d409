"""How much of the joint latent shift repair leaves, and how many samples it takes to see that.

    python evidence/shifts.py                  # the default's plans at latency 65 %, of all pipelines: a quarter of an hour each
    python evidence/shifts.py digits --plans laptop-diff-65-0 --samples 1000

Two models that answer alike on average still differ on each sample, so the means and the standard deviations of a few samples lie
apart by chance, by a distance that shrinks with the square root of their number. This generates many with the original, with the
plan as it is and after repair, from the same noise, and compares all of them, each half, each quarter. It adds to
`evidence/results/shifts/NAME.json`, which `python evidence/page.py` shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ldpruner
from ldpruner.environment import environment
from ldpruner.files import write_json
from ldpruner.fitting import fit_pointwise, pointwise_wanted
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Plan
from ldpruner.probes import Probe
from ldpruner.scoring.latent import latent_shift
from ldpruner.surgery import pruned_view

RESULTS = Path(__file__).parent / "results"
PARTS = (4, 2, 1)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    written = []
    for name in options.names or sorted(folder.name for folder in (options.results / "plans").iterdir()):
        file = options.results / "shifts" / f"{name}.json"
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        original = ldpruner.load(options.model or f"zoo:{name}")
        probe = original.varied(Probe(samples=options.samples, num_inference_steps=options.steps, seed=20_000))
        reference = original.latents(probe, batch_size=options.batch_size)
        for plan in sorted(path for kind in options.plans for path in (options.results / "plans" / name).glob(f"{kind}.json")):
            models = before_and_after(original, Plan.load(plan))
            made = [model.latents(probe, batch_size=options.batch_size) for model in models]
            rows = [{"samples": len(reference) // parts, **by_parts(reference, made, parts)} for parts in PARTS]
            found[plan.stem] = {"rows": rows, "steps": options.steps, "environment": environment(original.denoiser)}
            print(f"{name} {plan.stem}: {rows}", file=sys.stderr, flush=True)
            write_json(file, found)
        written.append(file)
    json.dump({"written": list(map(str, written))}, sys.stdout)
    print()


def before_and_after(original: Pipeline, plan: Plan) -> tuple[Pipeline, Pipeline]:
    """The plan with stand-ins that were fitted one by one, and after repair."""
    assert plan.probe is not None
    alone = fit_pointwise(original, pointwise_wanted(plan.edits), plan.probe)
    pruned = pruned_view(original.denoiser, plan.edits, alone)
    return original.around(pruned), original.around(ldpruner.apply(original, plan).denoiser)


def by_parts(reference: Tensor, made: Sequence[Tensor], parts: int) -> dict[str, float]:
    """The joint latent shift before and after repair, the mean over equal parts of the samples."""
    size = len(reference) // parts
    before, after = (
        statistics.mean(latent_shift(reference[at : at + size], latents[at : at + size]) for at in range(0, size * parts, size))
        for latents in made
    )
    return {"pruned": before, "repaired": after}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="fashion, emoji, digits; all of which there are plans by default")
    parser.add_argument("--plans", nargs="+", default=["ld-pruner-sweep-65-*"], help="names of files in results/plans/NAME")
    parser.add_argument("--model", help="another pipeline in the place of zoo:NAME")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
