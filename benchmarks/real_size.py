"""Prune denoisers of real size on a small machine: what they cost, the memory at most, the time beside the model's own.

    python benchmarks/real_size.py sd15      # Stable Diffusion 1.5's denoiser, 859.5 M random weights: the whole way
    python benchmarks/real_size.py sdxl      # SDXL's, 2.57 B random weights, for pictures of 512 x 512: the whole way
    python benchmarks/real_size.py counts    # both, and BK-SDM's, counted without weights

Weights are random, so nothing is said of quality: scores are magnitudes, which need no generation. The rest is what a user runs:
inspect, a timed table of operators, a plan for 65 % of the latency, prune, save, load, one generation step. One sample goes through
the denoiser at once, and nothing measured before is in the cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import ldpruner
from ldpruner.environment import environment
from ldpruner.files import write_json
from ldpruner.operators import Call, discover, meta_copy
from ldpruner.operators.discovery import with_times
from ldpruner.operators.tracing import count_macs, on_meta
from ldpruner.plans import Plan
from ldpruner.probes import Probe
from ldpruner.published import BKSDM, bk_sdm
from ldpruner.scoring import score
from ldpruner.surgery import pruned_view

SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # the rest are the class's defaults; stable-diffusion-v1-5, unet/config.json
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # stable-diffusion-xl-base-1.0, unet/config.json
UNETS: dict[str, dict[str, Any]] = {"sd15": SD15, "sdxl": SDXL}
CALLS: dict[str, dict[str, Any]] = {"sd15": {}, "sdxl": {"height": 512, "width": 512}}  # what is said of the pipeline's call


def write_folder(size: str, folder: Path) -> None:
    """Write a pipeline whose denoiser has that size and random weights; its text encoders and its decoder are small."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)

    def text(width: int) -> CLIPTextConfig:
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        return CLIPTextConfig(vocab_size=len(words), hidden_size=width, num_hidden_layers=1, projection_dim=width, **ends)

    down, up = ((f"{way}{end}Block2D",) * 4 for way, end in (("Down", "Encoder"), ("Up", "Decoder")))
    vae = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=down, up_block_types=up, latent_channels=4)
    parts: dict[str, Any] = {"vae": vae, "tokenizer": tokenizer, "text_encoder": CLIPTextModel(text(768))}
    parts["unet"], parts["scheduler"] = UNet2DConditionModel(**UNETS[size]), PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    if size == "sdxl":
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModelWithProjection(text(1280))}
        pipe: Any = StableDiffusionXLPipeline(**parts)
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **nothing)
    pipe.save_pretrained(folder, max_shard_size="1GB")


class Watch:
    """Seconds of each stage, those of them inside the denoiser, and the most memory, with the files that are read in it."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.inside = (0.0, 0.0)
        self.peak = 0.0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, memory())
            time.sleep(0.02)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began, inside, self.peak = clocks(), self.inside, memory()
        yield
        wall, processor = (now - before for now, before in zip(clocks(), began, strict=True))
        within, within_processor = (now - before for now, before in zip(self.inside, inside, strict=True))
        self.peak = max(self.peak, memory())
        self.stages[name] = {
            "seconds": wall,
            "seconds_beside_the_model": wall - within,
            "processor_seconds_beside_the_model": processor - within_processor,
            "peak_bytes": self.peak,
        }
        beside = f"{wall - within:.1f} s ({processor - within_processor:.1f} s of a processor) of them beside the model"
        print(f"{name}: {wall:.1f} s, {beside}, at most {self.peak / 1e9:.2f} GB", flush=True)

    def follow(self, denoiser: nn.Module) -> None:
        """Count the time of calls of this denoiser and of views of it, not of copies that hold no numbers."""
        began: list[tuple[float, float]] = []

        def enter(module: nn.Module, _: Any) -> None:
            began.append(clocks())

        def leave(module: nn.Module, *_: Any) -> None:
            wall, processor = (now - before for now, before in zip(clocks(), began.pop(), strict=True))
            if not on_meta(module):
                self.inside = self.inside[0] + wall, self.inside[1] + processor

        denoiser.register_forward_pre_hook(enter)
        denoiser.register_forward_hook(leave)


def clocks() -> tuple[float, float]:
    """Seconds of the clock on the wall, and of this process on all processors."""
    return time.perf_counter(), time.process_time()


def memory() -> float:
    """Bytes that this process holds, pages of files that it reads among them."""
    return float(psutil.Process().memory_info().rss)


def whole_way(folder: Path, out: Path, rounds: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Everything from loading to a generation step with the pruned model, watched."""
    watch, empty = Watch(), memory()
    probe = Probe(samples=2, num_inference_steps=1, guidance_scale=1.0, prompts=("a cat", "a dog"), call=asked)
    with watch.stage("load"):
        pipeline = ldpruner.load(folder)
    watch.follow(pipeline.denoiser)
    parts = (part for part in pipeline.pipe.components.values() if isinstance(part, nn.Module))
    weights = float(sum(parameter.nbytes for part in parts for parameter in part.parameters()))
    loaded, call = memory(), pipeline.call(probe)
    with watch.stage("one call"), torch.no_grad():
        call.run(pipeline.denoiser)
    limit = {"before": empty, "weights": weights, "activations": watch.peak - max(loaded, empty + weights)}
    with watch.stage("inspect"):
        operators = discover(pipeline.denoiser, call, timing_repeats=0)
    with watch.stage("timed table"):
        operators = with_times(operators, pipeline.denoiser, call, repeats=1)
    with watch.stage("score"):
        run = score(
            pipeline,
            probe,
            method="magnitude",
            replacements=("identity", "zero", "shortcut"),
            operators=operators,
            out=out / "run",
            batch_size=1,
        )
    with watch.stage("plan"):
        plan = ldpruner.plan(pipeline, run, {"latency": "65%"}, selection="order", rounds=rounds, batch_size=1).plan
    with watch.stage("prune"):
        pruned = ldpruner.prune(pipeline, plan=plan, batch_size=1)
    with watch.stage("save"):
        pruned.save_pretrained(out / "pruned")
    limit["sum_and_5_percent"] = sum(limit.values()) * 1.05
    figures = {**pruned.summary(), "operators": len(operators.operators), "pairs": len(operators.pairs())}
    del pipeline, pruned
    gc.collect()
    with watch.stage("load again"):
        pipeline = ldpruner.load(out / "pruned")
    watch.follow(pipeline.denoiser)
    with watch.stage("one generation step"):
        latents = pipeline.latents(replace(probe, samples=1))
    assert bool(torch.isfinite(latents).all())
    return {"stages": watch.stages, "limit": limit, "environment": environment(pipeline.denoiser), **figures}


def counted(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters and MACs of a denoiser that has no weights, and what BK-SDM's published models have."""
    with init_empty_weights():
        denoiser = UNet2DConditionModel(**config)
    call = call_of(config)
    began = time.perf_counter()
    found = {"params": parameters(denoiser), "macs": count_macs(denoiser, call), "seconds": time.perf_counter() - began}
    found["macs_but_for_attention"] = found["macs"] - attention_macs(denoiser, call)
    sizes = get_args(BKSDM) if config is SD15 else ()
    return found | {f"bk-sdm-{size}": after(denoiser, bk_sdm(denoiser, call, size), call) for size in sizes}


def after(denoiser: nn.Module, plan: Plan, call: Call) -> dict[str, int]:
    """What a plan leaves."""
    view = pruned_view(denoiser, plan.edits, {})
    macs = count_macs(view, call)
    return {"params": parameters(view), "macs": macs, "macs_but_for_attention": macs - attention_macs(view, call)}


def call_of(config: dict[str, Any]) -> Call:
    """One sample's call, with the 77 tokens of CLIP."""
    size, width = config["sample_size"], config["cross_attention_dim"]
    kwargs: dict[str, Any] = {"sample": torch.zeros(1, 4, size, size), "timestep": torch.tensor(1)}
    kwargs["encoder_hidden_states"] = torch.zeros(1, 77, width)
    if "addition_embed_type" in config:
        kwargs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    return Call((), kwargs)


def parameters(denoiser: nn.Module) -> int:
    return sum(parameter.numel() for parameter in denoiser.parameters())


def attention_macs(denoiser: nn.Module, call: Call) -> int:
    """Products of queries with keys and of weights with values: published counts of Stable Diffusion leave them out."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call.to("meta").run(meta_copy(denoiser))
    flops = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in flops.items() if operation is torch.ops.aten.bmm) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune denoisers of real size on a small machine.")
    parser.add_argument("what", choices=[*UNETS, "counts"])
    parser.add_argument("--work", type=Path, default=Path("runs/real-size"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real-size"))
    parser.add_argument("--rounds", type=int, default=3, help="Readings of each plan's latency.")
    given = parser.parse_args()
    if given.what == "counts":
        found = {"stable-diffusion-1.5": counted(SD15), "stable-diffusion-xl": counted(SDXL)}
        write_json(given.out / "counts.json", found)
        print(json.dumps(found, indent=1))
        return
    work = given.work / given.what
    folder = work / "original"
    if not (folder / "model_index.json").is_file():  # by another process: what it takes does not count here
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import real_size; from pathlib import Path; "
        code += f"real_size.write_folder({given.what!r}, Path({str(folder)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LDPRUNER_CACHE"] = cache
        found = whole_way(folder, work, given.rounds, CALLS[given.what])
    write_json(given.out / f"{given.what}.json", found)
    print(json.dumps({name: value for name, value in found.items() if name != "stages"}, indent=1))


if __name__ == "__main__":
    main()
