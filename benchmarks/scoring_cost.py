"""What scoring costs beyond the denoiser's own work: forwards per second inside `score` against a bare loop, and memory.

    python benchmarks/scoring_cost.py --model zoo:fashion

Both loops make the same forwards (same batch, same edits in place) and take turns, candidate by candidate, in one run;
the ratio of the two is what counts. Memory is the process's resident size after every candidate, and the highest that it
ever was: neither should grow while candidates are scored. Fitted stand-ins are held from the start, and they do grow with
the number of operators: `fitted_bytes`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time

import torch

import ldpruner
from ldpruner.environment import environment, peak_since_reset, reset_peak, resident_bytes
from ldpruner.fitting import fit_pointwise, pointwise_wanted
from ldpruner.operators.timing import device_of
from ldpruner.plans import Edit
from ldpruner.scoring import SCORERS, Asked
from ldpruner.surgery import trial


def main() -> None:
    options = arguments()
    pipeline = ldpruner.load(options.model)
    probe = ldpruner.Probe(samples=options.samples, num_inference_steps=options.steps)
    operators = ldpruner.discover(pipeline.denoiser, pipeline.call(probe), timing_repeats=0)
    pairs = operators.pairs()[:: options.every]
    edits = [Edit(operator=o.name, replacement=c.replacement, options=c.options) for o, c in pairs]
    fitted = fit_pointwise(pipeline, pointwise_wanted(edits), probe)
    call = pipeline.call(probe, samples=probe.samples)
    scores = SCORERS["paper"]().scores(Asked(pipeline=pipeline, edits=edits, probe=probe, fitted=fitted))

    watched = reset_peak(device_of(pipeline.denoiser))
    inside, bare, resident, peak = [], [], [], []
    for edit in edits:
        began = time.perf_counter()
        next(scores)
        inside.append(time.perf_counter() - began)
        with trial(pipeline.denoiser, [edit], fitted=fitted), torch.no_grad():
            began = time.perf_counter()
            for _ in range(probe.num_inference_steps):
                call.run(pipeline.denoiser)
            bare.append(time.perf_counter() - began)
        gc.collect()
        resident.append(resident_bytes())
        peak.append(peak_since_reset(device_of(pipeline.denoiser)) if watched else None)

    inside, bare, resident, peak = inside[2:], bare[2:], resident[2:], peak[2:]  # the first also makes the reference
    third = max(1, len(resident) // 3)
    latents = pipeline.latents(probe)
    result = {
        "model": options.model,
        "candidates": len(inside),
        "forwards": len(inside) * probe.num_inference_steps,
        "samples": probe.samples,
        "forwards_per_second_in_score": len(inside) * probe.num_inference_steps / sum(inside),
        "forwards_per_second_bare": len(bare) * probe.num_inference_steps / sum(bare),
        "score_to_bare_throughput": statistics.median(b / a for a, b in zip(inside, bare, strict=True)),
        "model_bytes": sum(p.nbytes for p in pipeline.denoiser.parameters()),
        "latents_bytes": latents.nbytes,
        "fitted_bytes": sum(weight.nbytes + bias.nbytes for weight, bias in fitted.values()),
        "peak_after_first_third_bytes": peak[third - 1],
        "peak_at_the_end_bytes": peak[-1],
        "resident_first_third_bytes": statistics.median(resident[:third]),
        "resident_last_third_bytes": statistics.median(resident[-third:]),
        "environment": environment(pipeline.denoiser),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:fashion")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--every", type=int, default=4, help="score every n-th candidate")
    return parser.parse_args()


if __name__ == "__main__":
    main()
