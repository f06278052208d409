"""What scoring costs at real size: a UNet of Stable Diffusion 1.5's configuration, with random weights, scored the fast way.

    python benchmarks/scoring_size.py --out scoring-size.json

Random weights cost what trained ones do. The text encoder and the decoder are tiny: the text is encoded once, and nothing is
decoded. On a GPU in half precision. Told are: seconds of a denoiser call by samples; what channels-last and compiled blocks make
of it; a generation's time to that of its denoiser calls alone, which is the loop's own; what one replacement takes by the paper's
way; and the fast way for all of them, from fitting to the last score. Latency is not timed operator by operator: scores are for
budgets of MACs. The file is written anew after each part, so that what was measured stays.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldpruner.arrangements import blocks_of, channels_last_ratio, compiled_ratio
from ldpruner.environment import environment, peak_since_reset, reset_peak
from ldpruner.files import write_json
from ldpruner.operators import discover
from ldpruner.operators.timing import device_of, seconds
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.remembering import encoding_once
from ldpruner.scoring import score
from ldpruner.trajectories import counted, record_calls

WIDTH = 768  # of text embeddings
TOKENS = 77
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROUNDS = 3


def main() -> None:
    options = arguments()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline = built(device, options)
    probe = pipeline.completed(
        Probe(samples=options.samples, num_inference_steps=options.steps, guidance_scale=1.0, prompts=("a", "b"))
    )
    result: dict[str, Any] = {"probe": probe.to_json(), "environment": environment(pipeline.denoiser)}
    parts: tuple[Callable[..., dict[str, Any]], ...] = (calls, loop, papers_way, fast_way, *([compiled] if options.compile else []))
    for part in parts:
        result |= part(pipeline, probe, options)
        write_json(options.out, result)
    print(f"Written to {options.out}.")


def built(device: torch.device, options: argparse.Namespace) -> Pipeline:
    """A pipeline of the real one's class around a denoiser of its size."""
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=12,
        num_hidden_layers=1,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    attending = len(options.channels) - 1  # stages: all but the innermost
    with device:
        denoiser = UNet2DConditionModel(
            sample_size=options.size,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            layers_per_block=options.layers,
            block_out_channels=tuple(options.channels),
            down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=denoiser.eval(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Pipeline(pipe.to(device, torch.float16 if device.type == "cuda" else torch.float32), source="random weights")


def calls(pipeline: Pipeline, probe: Probe, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a denoiser call of so many samples."""
    sizes = itertools.takewhile(lambda size: size <= options.batch_size, (2**power for power in itertools.count()))
    taken = {size: taken_by(pipeline, probe, size) for size in sizes}
    parameters = sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
    laid = channels_last_ratio(pipeline.denoiser, pipeline.call(probe, samples=options.batch_size))
    return {"parameters": parameters, "seconds_of_a_call": taken, "channels_last_to_usual": laid}


def taken_by(pipeline: Pipeline, probe: Probe, samples: int) -> float:
    call = pipeline.call(probe, samples=samples)
    with torch.inference_mode():
        return min(timed(lambda: call.run(pipeline.denoiser), pipeline) for _ in range(2 * ROUNDS))


def timed(run: Callable[[], object], pipeline: Pipeline) -> float:
    return seconds(run, device_of(pipeline.denoiser))


@torch.inference_mode()
def loop(pipeline: Pipeline, probe: Probe, options: argparse.Namespace) -> dict[str, Any]:
    """A generation's time to that of its denoiser calls alone, in each of some rounds."""
    few = replace(probe, samples=options.batch_size)
    with encoding_once(pipeline):
        recorded = record_calls(pipeline, few)
        whole = [timed(lambda: pipeline.latents(few), pipeline) for _ in range(ROUNDS)]
        alone = [timed(lambda: [call.run(pipeline.denoiser) for call in recorded], pipeline) for _ in range(ROUNDS)]
    return {"generation_to_its_calls": [one / other for one, other in zip(whole, alone, strict=True)]}


@torch.inference_mode()
def papers_way(pipeline: Pipeline, probe: Probe, options: argparse.Namespace) -> dict[str, Any]:
    """What one replacement takes: all of the probe's generations."""
    with counted(pipeline.denoiser) as passes, encoding_once(pipeline):
        taken = timed(lambda: pipeline.latents(probe, batch_size=options.batch_size), pipeline)
    return {"papers_way_each": {"seconds": taken, "passes": passes.count}}


def fast_way(pipeline: Pipeline, probe: Probe, options: argparse.Namespace) -> dict[str, Any]:
    """All replacements, from fitting to the last score; finding them is timed apart."""
    began, told = time.perf_counter(), list[str]()
    operators = discover(pipeline.denoiser, pipeline.call(probe), timing_repeats=0)
    found = time.perf_counter() - began
    watched = reset_peak(device_of(pipeline.denoiser))
    with counted(pipeline.denoiser) as passes:
        began = time.perf_counter()
        run = score(pipeline, probe, method="fast", operators=operators, batch_size=options.batch_size, tell=told.append)
        taken = time.perf_counter() - began
    return {
        "fast_way": {
            "seconds_to_find_operators": found,
            "edits": len(run.scores),
            "seconds": taken,
            "passes": passes.count,
            "peak_bytes": peak_since_reset(device_of(pipeline.denoiser)) if watched else None,
            "judged": Counter(str(entry.judged) for entry in run.scores),
            "told": told,
        }
    }


def compiled(pipeline: Pipeline, probe: Probe, options: argparse.Namespace) -> dict[str, Any]:
    """A call with its blocks compiled by PyTorch's own compiler, to one without, and the seconds that compiling took."""
    call, before = pipeline.call(probe, samples=options.batch_size), taken_by(pipeline, probe, options.batch_size)
    ratio, spent = compiled_ratio(pipeline.denoiser, blocks_of(pipeline.denoiser), call, before)
    return {"compiled_to_usual": ratio, "seconds_to_compile": spent}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--size", type=int, default=64, help="of latents")
    parser.add_argument("--channels", type=int, nargs="+", default=(320, 640, 1280, 1280), help="of the UNet's stages")
    parser.add_argument("--layers", type=int, default=2, help="in each of its stages")
    return parser.parse_args()


if __name__ == "__main__":
    main()
