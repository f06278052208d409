"""How the cost of scoring grows with operators, samples and steps, and what a UNet of Stable Diffusion 1.5's size would cost.

    python benchmarks/scoring_growth.py --model zoo:digits --out growth

One of the three is varied while the others stay: denoiser passes of one sample (a backward pass as two) and processor seconds of
the paper's way and of the fast way, counted and timed in this run. The paper's way costs the same for each edit, so what one
costs is measured and multiplied. `growth` holds, for each curve, the slope of a line through it where both axes are logarithmic:
1 is in proportion. Stable Diffusion's UNet is built from its configuration on the meta device, without weights: its edits are
found and counted there. The paper's way is a product; of the fast way it is the most that it may spend. Guidance doubles both.

`growth.json` and `growth.png` are written to the folder `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

import ldpruner
from ldpruner.environment import environment
from ldpruner.files import write_json
from ldpruner.fitting import fit_pointwise, pointwise_wanted
from ldpruner.operators import discover
from ldpruner.operators.tracing import Call
from ldpruner.plans import Edit, Operators
from ldpruner.probes import Probe
from ldpruner.scoring import SCORERS, Asked
from ldpruner.scoring.fast import FastScorer
from ldpruner.scoring.latent import PaperScorer
from ldpruner.scoring.ledger import Ledger

sys.path.insert(0, str(Path(__file__).parent))
from scoring import SHARES, measured, papers_cost

WAYS = ("paper", "fast")
SHAPES = ((1, 4, 64, 64), (1,), (1, 77, 768))  # latents, timestep, text of Stable Diffusion 1.5 at 512 x 512


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    pipeline = ldpruner.load(options.model)
    base = Probe(samples=options.samples, num_inference_steps=options.steps)
    operators = discover(pipeline.denoiser, pipeline.call(base))
    edits = edits_of(operators)[:: options.every]
    asked = Asked(
        pipeline=pipeline,
        edits=edits,
        probe=pipeline.completed(base),
        fitted=fit_pointwise(pipeline, pointwise_wanted(edits), base),
        operators=operators,
        targets=tuple({"latency": share} for share in SHARES),
    )
    whole = point(asked)  # the end of every curve
    points = {
        name: [*(point(each) for each in varied(asked, name, options.halvings)), whole]
        for name in ("operators", "samples", "steps")
    }
    result = {
        "model": options.model,
        "points": points,
        "growth": {name: {way: slope(curve, way) for way in WAYS} for name, curve in points.items()},
        "stable_diffusion_1_5": stable_diffusion(base) if options.size else None,
        "environment": environment(pipeline.denoiser),
    }
    write_json(options.out / "growth.json", result)
    draw(points, options.out / "growth.png")
    print(f"Written to {options.out}.")


def edits_of(operators: Operators) -> list[Edit]:
    return [Edit(operator=o.name, replacement=c.replacement, options=c.options) for o, c in operators.pairs()]


def varied(asked: Asked, name: str, halvings: int) -> list[Asked]:
    """The question with a half of one thing, a quarter of it, and so on; the least first."""
    made = []
    for part in (2**number for number in range(halvings, 0, -1)):
        probe = asked.probe
        if name == "operators":
            made.append(replace(asked, edits=asked.edits[::part]))
        elif name == "samples":
            made.append(replace(asked, probe=replace(probe, samples=max(2, probe.samples // part))))
        else:
            made.append(replace(asked, probe=replace(probe, num_inference_steps=max(1, probe.num_inference_steps // part))))
    return made


def point(asked: Asked) -> dict[str, Any]:
    """What one question costs by either way; what was measured for another is not known to it."""
    asked = replace(asked, ledger=Ledger())
    with measured(asked.pipeline) as fast:
        list(SCORERS["fast"]().scores(asked))
    about = {"edits": len(asked.edits), "samples": asked.probe.samples, "steps": asked.probe.num_inference_steps}
    return {**about, "paper": papers_cost(asked), "fast": fast}


def place(entry: dict[str, Any], name: str) -> float:
    return float(entry["edits" if name == "operators" else name])


def slope(curve: Sequence[dict[str, Any]], way: str) -> dict[str, float]:
    """Of passes and processor seconds over what was varied, both as logarithms."""
    name = next(key for key in ("edits", "samples", "steps") if len({entry[key] for entry in curve}) > 1)
    x = np.log([entry[name] for entry in curve])
    return {of: float(np.polyfit(x, np.log([entry[way][of] for entry in curve]), 1)[0]) for of in ("passes", "processor_seconds")}


def stable_diffusion(probe: Probe, **smaller: Any) -> dict[str, Any]:
    """Edits of a UNet of that size, or of one that differs from it, and denoiser passes of one sample to score them."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **smaller).eval()
        call = Call(tuple(torch.ones(shape) for shape in SHAPES), {})
    operators = discover(denoiser, call, timing_repeats=0)
    edits = len(operators.pairs())
    return {
        "parameters": operators.total.params,
        "operators": len([operator for operator in operators.operators if operator.candidates]),
        "edits": edits,
        "samples": probe.samples,
        "steps": probe.num_inference_steps,
        "paper": PaperScorer().cost(edits, probe),
        "fast_at_most": FastScorer().cost(edits, probe),
    }


def draw(points: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Denoiser passes over each of the three, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(points), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, (name, curve) in zip(axes, points.items(), strict=True):
        for way in WAYS:
            axis.plot([place(entry, name) for entry in curve], [entry[way]["passes"] for entry in curve], "o-", label=f"{way} way")
        axis.set(xscale="log", yscale="log", xlabel="operator x replacement" if name == "operators" else name)
        axis.set_xticks([place(entry, name) for entry in curve], [f"{place(entry, name):g}" for entry in curve])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("denoiser passes of one sample")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:digits")
    parser.add_argument("--out", type=Path, required=True, help="where the figures and the plot go")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", action=argparse.BooleanOptionalAction, default=True, help="count Stable Diffusion 1.5's UNet")
    parser.add_argument("--every", type=int, default=1, help="of the replacements, one in so many")
    parser.add_argument("--halvings", type=int, default=3, help="how often each of the three is halved")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
