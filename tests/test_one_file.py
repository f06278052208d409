"""A checkpoint of one file, in the layout that Stable Diffusion was first given out in, loads as the pipeline that it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import ldpruner
from conftest import Command, tiny_stable_diffusion
from hub_stand_in import Repo, go_online, stand_in
from ldpruner.errors import PipelineError
from ldpruner.single_files import config_for
from one_file import PROBE, in_first_layout, small_plan
from refusing import the_line

SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def place(original: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as a folder without weights, and its weights in one file."""
    place = tmp_path_factory.mktemp("one-file")
    original.save_pretrained(place / "config")
    for weights in (place / "config").rglob("*.safetensors"):
        weights.unlink()
    save_file(in_first_layout(original), place / "tiny.safetensors")
    return place


@pytest.fixture
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_file_has_the_names_that_it_was_first_given(place: Path) -> None:
    names = load_file(place / "tiny.safetensors").keys()
    assert {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.middle_block.2.in_layers.2.weight",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        "model.diffusion_model.output_blocks.3.0.skip_connection.weight",
        "first_stage_model.decoder.up.0.block.1.conv1.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    } <= names
    assert not [name for name in names if "down_blocks" in name or "resnets" in name]


def test_it_loads_bit_for_bit(place: Path, original: StableDiffusionPipeline) -> None:
    loaded = ldpruner.load(place / "tiny.safetensors", config=place / "config")
    assert type(loaded.pipe) is StableDiffusionPipeline
    assert all(same(getattr(loaded.pipe, part), getattr(original, part)) for part in ("unet", "vae", "text_encoder"))
    assert torch.equal(loaded.latents(PROBE), ldpruner.Pipeline(original, source="original").latents(PROBE))
    assert loaded.folder is None
    half = ldpruner.load(place / "tiny.safetensors", config=place / "config", dtype=torch.float16)
    assert half.denoiser.dtype == torch.float16  # type: ignore[comparison-overlap]


@pytest.mark.usefixtures("in_place")
def test_the_command_line_prunes_one(command: Command, original: StableDiffusionPipeline, tmp_path: Path) -> None:
    plan = small_plan(original)
    plan.save(tmp_path / "plan.json")
    asked = ("--config", "config", "--plan", tmp_path / "plan.json", "--out", tmp_path / "out", "--json")
    code, out, err = command("prune", "tiny.safetensors", *asked)
    assert code == 0, err
    assert json.loads(out)["edits"] == len(plan.edits)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "from `tiny.safetensors`:" in " ".join(card.split())
    assert "pipeline_tag: text-to-image" in card
    assert type(ldpruner.load(tmp_path / "out").pipe) is StableDiffusionPipeline


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # what diffusers asks huggingface_hub for
def test_without_a_configuration_the_usual_one_comes_from_the_hub(
    place: Path, original: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with stand_in() as hub:
        go_online(monkeypatch, hub.url, tmp_path / "hub")
        hub.repos[SD1] = Repo()
        files = {path.relative_to(place / "config").as_posix(): path for path in (place / "config").rglob("*") if path.is_file()}
        hub.repos[SD1].commit("main", {name: path.read_bytes() for name, path in files.items()}, "configuration")
        loaded = ldpruner.load(place / "tiny.safetensors")
    assert same(loaded.denoiser, original.unet)


MARKS = {
    "model.diffusion_model.output_blocks.8.1.transformer_blocks.0.norm3.weight": SD1,
    "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": "stabilityai/stable-diffusion-xl-base-1.0",
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": "black-forest-labs/FLUX.1-schnell",
}


@pytest.mark.parametrize("name", MARKS)
def test_the_model_is_told_from_the_names(name: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors")
    assert config_for(str(tmp_path / "x.safetensors"), None) == MARKS[name]


def test_a_model_that_cannot_be_told_wants_a_configuration(tmp_path: Path) -> None:
    name = "joint_blocks.0.context_block.adaLN_modulation.1.bias"  # Stable Diffusion 3's, whose size is told by another tensor
    save_file({name: torch.zeros(9216)}, tmp_path / "x.safetensors")
    with pytest.raises(PipelineError, match=r"is of no model that diffusers tells by its names\. Give config, or --config\."):
        ldpruner.load(tmp_path / "x.safetensors")


def lacking(place: Path, part: str, out: Path) -> Path:
    weights = {name: value for name, value in load_file(place / "tiny.safetensors").items() if part not in name}
    save_file(weights, out / "lacking.safetensors")
    return out / "lacking.safetensors"


REFUSED: dict[str, tuple[Any, str]] = {
    "a pickle": (
        lambda _, out: out / "model.ckpt",
        "is a pickle, which can run any code when it is read, and is refused. Give the",
    ),
    "no file": (lambda _, out: out / "gone.safetensors", "no such file."),
    "lacks weights": (lambda place, out: lacking(place, "middle_block", out), "CONFIG (weights are missing). Name another with"),
    "lacks a part": (
        lambda place, out: lacking(place, "cond_stage", out),
        "CONFIG (Failed to load CLIPTextModel. Weights for this component appear to be missing in the checkpoint). Name another",
    ),
    "damaged": (lambda _, out: out / "damaged.safetensors", "is truncated or damaged, or no safetensors file. Copy or download it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_line(case: str, place: Path, command: Command, tmp_path: Path) -> None:
    made, message = REFUSED[case]
    for name in ("model.ckpt", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00." * 20)
    file = made(place, tmp_path)
    code, out, err = command("inspect", file, *(() if case == "a pickle" else ("--config", place / "config")))
    assert (code, out) == (2, "")
    message = message.replace("CONFIG", f"cannot be loaded with the configuration of {place / 'config'}")
    assert the_line(err).startswith(f"{file}: {message}")


@pytest.mark.usefixtures("in_place")
def test_options_that_go_with_something_else(command: Command, ldm_folder: Path) -> None:
    for arguments, message in {
        (ldm_folder, "--config", "config"): "--config goes with a checkpoint in one .safetensors file. Leave it out.",
        (
            "tiny.safetensors",
            "--config",
            "config",
            "--variant",
            "fp16",
        ): "tiny.safetensors: is one file, and has no variants. Leave",
        (
            "tiny.safetensors",
        ): f"tiny.safetensors: cannot be loaded with the configuration of {SD1} (HF_HUB_OFFLINE is set, and it is",
        ("tiny.safetensors", "--config", "nowhere"): "tiny.safetensors: cannot be loaded with the configuration of nowhere (",
    }.items():
        code, out, err = command("inspect", *arguments)
        assert (code, out) == (2, "")
        assert the_line(err).startswith(message)
    with pytest.raises(PipelineError, match=r"has a configuration; another one is for checkpoints of one \.safetensors file"):
        ldpruner.load(ldm_folder, config="config")
