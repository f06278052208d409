"""Tiny pipelines with random weights, built from configs, and the settings that make tests quiet and repeatable."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AudioDiffusionPipeline,
    AutoencoderKL,
    DDIMScheduler,
    LDMPipeline,
    Mel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import ldpruner
from distilling import CHOSEN, FEW, SHORT, pruned
from ldpruner import calibration, cli, fitting, planning
from ldpruner.evaluation.base import Stream
from ldpruner.operators import discover
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators
from ldpruner.probes import Probe
from ldpruner.recovery import Distilled, activations, distil
from refusing import Refused, everything_in, the_line

torch.set_num_threads(1)
diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()

Command = Callable[..., tuple[int, str, str]]

PROBE = Probe(samples=3, num_inference_steps=2)
PROBING = ("--samples", str(PROBE.samples), "--steps", str(PROBE.num_inference_steps))
BY_PAPER = (*PROBING, "--method", "paper")  # as the run of `place` was scored


def tiny_unet(*, size: int | tuple[int, int], channels: int, layers: int = 1) -> UNet2DModel:
    """A denoiser of square latents, with residual blocks, shortcuts and attention."""
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=layers,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def small_unet(*, size: int | tuple[int, int], channels: int) -> UNet2DModel:
    """A denoiser of square latents with a third of the operators, for what asks after all of them several times."""
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


def tiny_ldm(*, small: bool = False) -> LDMPipeline:
    """An unconditional pipeline with residual blocks, shortcuts and attention, some 100 operators and 4x4 latents."""
    torch.manual_seed(0)
    unet = (small_unet if small else tiny_unet)(size=4, channels=4)
    vqvae = VQModel(
        in_channels=1, out_channels=1, block_out_channels=(8,), latent_channels=4, norm_num_groups=4, num_vq_embeddings=16
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return LDMPipeline(vqvae=vqvae.eval(), unet=unet.eval(), scheduler=scheduler)


def letter_tokenizer(length: int) -> CLIPTokenizer:
    """A tokenizer of CLIP's form that knows single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=length)


def tiny_stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    """A text-to-image pipeline with cross-attention and a tokenizer that knows single letters."""
    torch.manual_seed(0)
    tokenizer = letter_tokenizer(length=8)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=1,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_audio(*, small: bool = False) -> AudioDiffusionPipeline:
    """An unconditional pipeline whose 16x16 pictures are mel spectrograms of a quarter of a second."""
    torch.manual_seed(0)
    unet = (small_unet if small else tiny_unet)(size=(8, 8), channels=2)
    vqvae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=2,
        norm_num_groups=4,
    )
    mel = Mel(x_res=16, y_res=16, sample_rate=8000, n_fft=256, hop_length=128, top_db=60, n_iter=4)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return AudioDiffusionPipeline(vqvae=vqvae.eval(), unet=unet.eval(), mel=mel, scheduler=scheduler)


@functools.cache
def ldm_operators() -> Operators:
    """The operators of `tiny_ldm`, which is the same each time it is built."""
    pipeline = Pipeline(tiny_ldm(), source="tiny-ldm")
    return discover(pipeline.denoiser, pipeline.call(PROBE), timing_repeats=1)


@pytest.fixture
def operators() -> Operators:
    return ldm_operators()


@pytest.fixture
def ldm() -> Pipeline:
    return Pipeline(tiny_ldm(), source="tiny-ldm")


@pytest.fixture
def text_to_image(tmp_path: Path) -> Pipeline:
    return Pipeline(tiny_stable_diffusion(tmp_path), source="tiny-sd")


@pytest.fixture
def audio() -> Pipeline:
    return Pipeline(tiny_audio(), source="tiny-audio")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests come first: a worker that begins with one last leaves the other without work."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


USUAL = fitting.TRAJECTORIES, activations.CALLS, activations.STEPS, planning.RANKED_ON, planning.JUDGED_ON, calibration.CALIBRATING


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins are fitted on trajectories of two and three steps, and on few of them, which saves most of a test's time."""
    monkeypatch.setattr(fitting, "TRAJECTORIES", (2, 3))
    monkeypatch.setattr(activations, "CALLS", 4)
    monkeypatch.setattr(activations, "STEPS", (2, 3))
    monkeypatch.setattr(planning, "RANKED_ON", 2)
    monkeypatch.setattr(planning, "JUDGED_ON", 8)
    monkeypatch.setattr(calibration, "CALIBRATING", 0)
    monkeypatch.setattr(planning, "IMPROVED_ON", 4)
    monkeypatch.setattr(planning, "EVALUATIONS", 2)
    monkeypatch.setattr(planning, "MORE", 1)


@pytest.fixture
def usual_calls(few_calls: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins are fitted as a user's are, and as what another process or an earlier fixture made was."""
    monkeypatch.setattr(fitting, "TRAJECTORIES", USUAL[0])
    monkeypatch.setattr(activations, "CALLS", USUAL[1])
    monkeypatch.setattr(activations, "STEPS", USUAL[2])
    monkeypatch.setattr(planning, "RANKED_ON", USUAL[3])
    monkeypatch.setattr(planning, "JUDGED_ON", USUAL[4])
    monkeypatch.setattr(calibration, "CALIBRATING", USUAL[5])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own, and none touches the user's."""
    monkeypatch.setenv("LDPRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ldm_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-ldm"
    tiny_ldm().save_pretrained(folder)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run one command in this process; its exit code, stdout and stderr."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the command line sets them: put back what was there

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldpruner", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        with warnings.catch_warnings():
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code
        return code, *capsys.readouterr()

    return run


def stream(tensor: Tensor | np.ndarray[Any, Any], size: int = 37) -> Stream:
    """A tensor in uneven parts."""
    whole = torch.as_tensor(tensor)
    return lambda: iter(torch.split(whole, size))


class Means(nn.Module):
    """A feature net: every channel's mean and spread, and those of two halves."""

    num_features = 6

    def forward(self, pictures: Tensor) -> Tensor:
        values = pictures.double()
        half = values.shape[2] // 2
        parts = (values, values[:, :, :half], values[:, :, half:])
        return torch.cat([torch.stack([part.mean((1, 2, 3)), part.std((1, 2, 3))], 1) for part in parts], 1)


def real_pictures(folder: Path, count: int, size: int = 4) -> Path:
    """A folder of noise, the same every time."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        array = random.integers(0, 255, (size, size)).astype(np.uint8)
        Image.fromarray(array).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def student(ldm: Pipeline) -> Pipeline:
    return pruned(ldm, CHOSEN, ldm_operators())


@pytest.fixture
def learn(ldm: Pipeline, student: Pipeline, tmp_path: Path) -> Callable[..., Distilled]:
    """Distil the tiny student for a few steps."""

    def run(work: str = "work", data: Path | None = None, **changed: Any) -> Distilled:
        probe = None if data else FEW
        return distil(student, ldm, work=tmp_path / work, settings=replace(SHORT, **changed), data=data, probe=probe)

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines, a finished run with a plan, a folder that holds nothing and a file that says nothing."""
    place = tmp_path_factory.mktemp("place")
    tiny_ldm().save_pretrained(place / "ldm")
    tiny_stable_diffusion(place).save_pretrained(place / "sd")
    pipeline = ldpruner.load(place / "ldm")
    run = ldpruner.score(pipeline, PROBE, method="paper", out=place / "run")
    ldpruner.plan(pipeline, run, {"macs": "75%"}).plan.save(place / "plan.json")
    (place / "empty").mkdir()
    (place / "file").write_text("nothing", encoding="utf-8")
    return place


@pytest.fixture
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture
def refused(command: Command, place: Path) -> Refused:
    """Run one command that has to fail, and give its message."""

    def run(*arguments: Any) -> str:
        before = everything_in(place)
        code, out, err = command(*arguments)
        assert everything_in(place) == before, "something was written"
        assert (code, out) == (2, "")
        return the_line(err)

    return run


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What users stack things on: a pruned pipeline of each family, see `stacking`."""
    from stacking import FAMILIES, build

    return {family: build(family, tmp_path_factory.mktemp("stacked") / family) for family in FAMILIES}


@pytest.fixture(params=["sd", "sdxl"])
def stacked(request: pytest.FixtureRequest, families: dict[str, Any]) -> Any:
    return families[request.param]


@pytest.fixture
def sd(families: dict[str, Any]) -> Any:
    return families["sd"]
