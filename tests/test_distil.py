"""A pruned student learns from its teacher: what it learns, on what, and what is left alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import PROBE, ldm_operators, tiny_ldm, tiny_stable_diffusion
from distilling import FEW, SHORT, captioned_folder, changed_weights, equal, log_of, pruned
from ldpruner import discover
from ldpruner.datasets import signed
from ldpruner.errors import PipelineError, RunError
from ldpruner.operators.tracing import weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators
from ldpruner.recovery import Distilled, distil
from ldpruner.recovery import rows as kept
from ldpruner.recovery.conditioning import Caller
from ldpruner.recovery.latents import encode
from ldpruner.recovery.losses import feature_error, guided
from ldpruner.recovery.noising import Noising
from ldpruner.recovery.taps import find_taps
from ldpruner.sound import write_wav


@pytest.fixture(scope="module")
def text_operators(tmp_path_factory: pytest.TempPathFactory) -> Operators:
    pipeline = Pipeline(tiny_stable_diffusion(tmp_path_factory.mktemp("sd")), source="tiny-sd")
    return discover(pipeline.denoiser, pipeline.call(PROBE), timing_repeats=1)


@pytest.fixture
def text_student(text_to_image: Pipeline, text_operators: Operators) -> Pipeline:
    return pruned(text_to_image, {"down_blocks.0.attentions.0": "identity"}, text_operators)


# What is learnt


def test_a_pruned_student_comes_closer_to_its_teacher(ldm: Pipeline, student: Pipeline, learn: Callable[..., Distilled]) -> None:
    learnt = learn(max_train_steps=60, train_batch_size=8, task_weight=0.0)  # which an untrained teacher cannot teach
    call = ldm.call(PROBE, samples=8)
    with torch.no_grad():
        wanted = call.run(ldm.denoiser).sample
        before, after = ((call.run(each).sample - wanted).square().mean() for each in (student.denoiser, learnt.denoiser))
    assert after < 0.5 * before
    losses = learnt.record["losses"]
    assert losses["last"]["feature"] < 0.85 * losses["first"]["feature"]


def test_the_models_that_were_given_stay_as_they_were(ldm: Pipeline, student: Pipeline, learn: Callable[..., Distilled]) -> None:
    before = [weights_digest(each.denoiser) for each in (student, ldm)]
    learnt = learn()
    assert [weights_digest(each.denoiser) for each in (student, ldm)] == before
    assert all(parameter.requires_grad for parameter in ldm.denoiser.parameters())
    assert learnt.pipeline is student
    assert not equal(learnt.denoiser, student.denoiser)


def test_every_step_logs_every_loss_that_has_a_weight(learn: Callable[..., Distilled], tmp_path: Path) -> None:
    learn(task_weight=0.5, output_weight=2.0)
    for number, entry in enumerate(log_of(tmp_path / "work"), 1):
        assert entry["step"] == number
        assert entry["loss"] == pytest.approx(0.5 * entry["task"] + 2 * entry["output"] + entry["feature"], rel=1e-5)
        assert set(entry) == {"step", "task", "output", "feature", "loss", "lr", "seconds"}


def test_the_rate_warms_up_from_the_first_step_and_falls(learn: Callable[..., Distilled], tmp_path: Path) -> None:
    learn(max_train_steps=6, lr_warmup_steps=2, lr_scheduler="linear", learning_rate=4e-4)
    assert [entry["lr"] for entry in log_of(tmp_path / "work")] == pytest.approx([2e-4, 4e-4, 4e-4, 3e-4, 2e-4, 1e-4])


@pytest.mark.parametrize("weights", ["trained", "random"])
def test_a_student_from_which_nothing_was_removed_learns_without_features(ldm: Pipeline, tmp_path: Path, weights: str) -> None:
    whole = Pipeline(tiny_ldm(), source="whole")
    if weights == "random":
        torch.manual_seed(5)
        whole.pipe.unet = UNet2DModel.from_config(ldm.denoiser.config)
    learnt = distil(whole, ldm, work=tmp_path, settings=SHORT, probe=FEW)
    assert learnt.record["taps"] == []
    assert log_of(tmp_path)[0].keys() == {"step", "task", "output", "loss", "lr", "seconds"}
    assert (log_of(tmp_path)[0]["output"] < 1e-9) == (weights == "trained")


def test_the_result_with_a_moving_average_is_the_average(learn: Callable[..., Distilled], tmp_path: Path) -> None:
    learnt = learn(use_ema=True)
    stored = load_file(tmp_path / "work" / "checkpoint-4" / "training.safetensors")
    names = [name.removeprefix("average.") for name in stored if name.startswith("average.")]
    assert len(names) > 50
    assert all(torch.equal(learnt.denoiser.get_parameter(name), stored[f"average.{name}"]) for name in names)
    assert not all(torch.equal(stored[f"average.{name}"], stored[f"student.{name}"]) for name in names)


def test_weights_that_no_loss_reaches_are_left_alone(student: Pipeline, learn: Callable[..., Distilled], tmp_path: Path) -> None:
    """Nothing reads the attention of the zeroed layer: its weights would only decay, and processes would wait for them."""
    learnt = learn()
    stored = load_file(tmp_path / "work" / "checkpoint-4" / "training.safetensors")
    idle = "up_blocks.0.attentions.0.to_v.weight"
    assert f"student.{idle}" not in stored
    assert idle not in changed_weights(student.denoiser, learnt.denoiser)


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "train_batch_size": 2}])
def test_saving_memory_changes_nothing_that_is_learnt(
    learn: Callable[..., Distilled], tmp_path: Path, option: dict[str, Any]
) -> None:
    learn("plain")
    learn("thrifty", **option)
    plain, thrifty = ([entry["loss"] for entry in log_of(tmp_path / work)] for work in ("plain", "thrifty"))
    assert thrifty == pytest.approx(plain, rel=1e-4)


def test_mixed_precision_is_another_s_business_afterwards(learn: Callable[..., Distilled], tmp_path: Path) -> None:
    half = learn("half", mixed_precision="bf16")
    assert {parameter.dtype for parameter in half.denoiser.parameters()} == {torch.float32}
    learn("full")
    losses = [[entry["loss"] for entry in log_of(tmp_path / work)] for work in ("half", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


# Where they are compared


@pytest.mark.parametrize(
    ("chosen", "taps"),
    [
        ({"mid_block.attentions.0": "identity"}, ("mid_block",)),
        ({"down_blocks.0.resnets.0.conv1": "zero"}, ("down_blocks.0.resnets.0",)),
        ({"down_blocks.1.resnets.0": "shortcut"}, ("down_blocks.1",)),
        ({"mid_block": "identity"}, ("mid_block",)),
        ({"mid_block.resnets.0.conv2": "zero", "mid_block.resnets.0.norm1": "identity"}, ("mid_block.resnets.0",)),
        ({}, ()),
    ],
    ids=["block", "layer", "block of a tuple", "nothing around it", "two of one block", "no edit"],
)
def test_features_are_compared_around_what_was_removed(ldm: Pipeline, chosen: dict[str, str], taps: tuple[str, ...]) -> None:
    student = pruned(ldm, chosen, ldm_operators()) if chosen else ldm
    assert find_taps(student.denoiser, ldm.denoiser, ldm.call(PROBE)) == taps


def test_a_feature_s_error_does_not_depend_on_how_large_its_numbers_are() -> None:
    teacher, student = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 2, 4)
    errors = {scale: [feature_error({"a": size * student}, {"a": size * teacher}, scale) for size in (1, 10)] for scale in
              ("teacher", "none")}  # fmt: skip
    torch.testing.assert_close(errors["teacher"][1], errors["teacher"][0])
    torch.testing.assert_close(errors["none"][1], 100 * errors["none"][0])
    by_hand = torch.stack([(s - t).square().mean() / t.square().mean() for s, t in zip(student, teacher, strict=True)]).mean()
    torch.testing.assert_close(errors["teacher"][0], by_hand)


# What should be answered


def with_scheduler(pipeline: Pipeline, scheduler: Any) -> Pipeline:
    pipe = copy.copy(pipeline.pipe)
    pipe.scheduler = scheduler
    return Pipeline(pipe, source="tiny")


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (*(torch.randn(4, 2, 3, 3, generator=generator) for _ in range(2)), torch.tensor([0, 10, 500, 999]))


@pytest.mark.parametrize("sampler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_the_scheduler_s_own_whichever_sampler_it_is(
    ldm: Pipeline, drawn: tuple[Tensor, Tensor, Tensor], sampler: Any, prediction: str
) -> None:
    clean, noise, at = drawn
    noising = Noising.of(with_scheduler(ldm, sampler(prediction_type=prediction, beta_schedule="scaled_linear")))
    reference = DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")
    targets = {"epsilon": noise, "sample": clean, "v_prediction": reference.get_velocity(clean, noise, at)}
    torch.testing.assert_close(noising.noisy(clean, noise, at), reference.add_noise(clean, noise, at))
    torch.testing.assert_close(noising.target(clean, noise, at), targets[prediction])


def test_flow_matching_learns_the_way_from_latents_to_noise(ldm: Pipeline, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    clean, noise, at = drawn
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noising = Noising.of(with_scheduler(ldm, scheduler))
    torch.testing.assert_close(noising.noisy(clean, noise, at), scheduler.scale_noise(clean, noising.timesteps[at], noise))
    assert torch.equal(noising.target(clean, noise, at), noise - clean)


def test_a_teacher_of_another_prediction_type_is_refused(ldm: Pipeline, student: Pipeline, tmp_path: Path) -> None:
    other = with_scheduler(student, DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(PipelineError, match="predicts epsilon and tiny v_prediction"):
        distil(other, ldm, work=tmp_path, settings=SHORT, probe=FEW)


# What it learns on


def test_without_data_it_learns_on_the_teacher_s_generations_which_are_made_once(
    ldm: Pipeline, learn: Callable[..., Distilled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn()
    (file,) = (tmp_path / "work" / "generated").rglob("*.safetensors")
    torch.testing.assert_close(load_file(file)["latents"], ldm.latents(FEW))
    monkeypatch.setattr(Pipeline, "latents", lambda *_, **__: pytest.fail("generated again"))
    learn(resume_from_checkpoint="latest", max_train_steps=4)


def test_a_damaged_part_of_what_was_kept_is_made_anew(
    learn: Callable[..., Distilled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "PART", 4)
    one = learn()
    files = sorted((tmp_path / "work" / "generated").rglob("*.safetensors"))
    assert len(files) == 2
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:50])
    learn(resume_from_checkpoint="latest")
    assert files[1].read_bytes() == whole
    assert one.record["data"] == "6 generations of tiny-ldm"


def test_captioned_pictures_are_encoded_once_and_their_split_is_kept(
    text_to_image: Pipeline, text_student: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, work = captioned_folder(tmp_path / "data"), tmp_path / "work"
    learnt = distil(text_student, text_to_image, work=work, settings=SHORT, data=data, caption="{text} {style}")
    (file,) = (work / "encoded").rglob("*.safetensors")
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert learnt.record["data"] == "4 files of data"
    torch.testing.assert_close(load_file(file)["latents"][1:2], encode(text_to_image.pipe.vae, red))
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *_, **__: pytest.fail("encoded again"))
    distil(text_student, text_to_image, work=work, settings=replace(SHORT, resume_from_checkpoint="latest"), data=data,
           caption="{text} {style}")  # fmt: skip


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_are_what_pipelines_decode(shift: float | None) -> None:
    autoencoder = tiny_stable_diffusion(Path()).vae
    autoencoder.register_to_config(shift_factor=shift)
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = encode(autoencoder, pictures)
    with torch.no_grad():
        decoded = autoencoder.decode(latents / autoencoder.config.scaling_factor + (shift or 0.0)).sample
        torch.testing.assert_close(decoded, autoencoder(signed(pictures)).sample)


def test_recordings_are_learnt_from_as_spectrograms(audio: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        write_wav(tmp_path / "data" / f"{number}.wav", np.sin(np.arange(2100) * 0.1 * (number + 1)).astype(np.float32), 8000)
    learnt = distil(audio, audio, work=tmp_path / "work", settings=SHORT, data=tmp_path / "data")
    (file,) = (tmp_path / "work" / "encoded").rglob("*.safetensors")
    assert learnt.record["data"] == "3 files of data"
    assert load_file(file)["latents"].shape == (3, 2, 8, 8)


def test_latents_may_be_given_and_are_learnt_from_as_they_are(learn: Callable[..., Distilled], tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(5, 4, 4, 4)}, tmp_path / "latents.safetensors")
    learnt = learn(data=tmp_path / "latents.safetensors", feature_weight=0.0)
    assert learnt.record["data"] == "5 latents of latents.safetensors"


def test_prompts_become_what_the_pipeline_makes_of_them(text_to_image: Pipeline) -> None:
    caller = Caller.of(text_to_image)
    made = caller.conditioning(text_to_image, ["a b", "", "c"])
    wanted = text_to_image.pipe.encode_prompt(["a b", "", "c"], "cpu", 1, False)[0]
    assert [tensor.shape for tensor in made.values()] == [wanted.shape]
    torch.testing.assert_close(next(iter(made.values())), wanted)
    noisy, at = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    with torch.no_grad():
        answer = caller.call(noisy, at, made).run(text_to_image.denoiser)[0]
        torch.testing.assert_close(answer, text_to_image.denoiser(noisy, at, wanted).sample)


def test_dropped_prompts_and_guided_predictions(text_to_image: Pipeline, text_student: Pipeline, tmp_path: Path) -> None:
    """With every prompt dropped, conditional and unconditional predictions are one, and so are guided and plain errors."""
    for name, dropout in (("all", 1.0), ("none", 0.0)):
        settings = replace(SHORT, max_train_steps=1, guidance_weight=1.0, guidance_scale=5.0, prompt_dropout=dropout)
        distil(text_student, text_to_image, work=tmp_path / name, settings=settings, probe=replace(FEW, prompts=("a", "b c")))
    dropped, kept_prompts = (log_of(tmp_path / name)[0] for name in ("all", "none"))
    assert dropped["guidance"] == pytest.approx(dropped["output"], rel=1e-3)
    assert kept_prompts["guidance"] != pytest.approx(kept_prompts["output"], rel=1e-3)
    assert guided(torch.tensor(1.0), torch.tensor(2.0), 3.0) == 4


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_answers_are_moved_away_from_those_of_a_guide(
    learn: Callable[..., Distilled], student: Pipeline, ldm: Pipeline, tmp_path: Path, scale: float
) -> None:
    """A student that is its own guide g is off by |g + s (t - g) - g|^2 = s^2 |t - g|^2 at first."""
    learn("plain", max_train_steps=1)
    settings = replace(SHORT, max_train_steps=1, autoguidance_scale=scale)
    learnt = distil(student, ldm, guide=student, work=tmp_path / "guided", settings=settings, probe=FEW)
    plain, moved = (log_of(tmp_path / name)[0] for name in ("plain", "guided"))
    assert moved["output"] == pytest.approx(scale**2 * plain["output"], rel=1e-4)
    assert {name: moved[name] for name in ("task", "feature")} == {name: plain[name] for name in ("task", "feature")}
    assert learnt.record["guide"] == "student"
    with pytest.raises(RunError, match=r"checkpoint-1: was made with guide=[0-9a-f]+, and this run has None"):
        learn("guided", max_train_steps=1, autoguidance_scale=scale, resume_from_checkpoint="latest")


# What may be left alone


def test_frozen_parts_stay_as_they_are_to_the_bit(student: Pipeline, learn: Callable[..., Distilled]) -> None:
    changed = changed_weights(student.denoiser, learn(freeze=("mid_block", "conv_in.weight")).denoiser)
    assert {"conv_in.bias", "conv_out.weight", "down_blocks.0.resnets.0.conv1.weight"} <= changed
    assert not {name for name in changed if name.startswith("mid_block") or name == "conv_in.weight"}


def test_what_runs_before_the_first_edit_can_be_frozen(student: Pipeline, learn: Callable[..., Distilled]) -> None:
    changed = changed_weights(student.denoiser, learn(freeze_before_first_edit=True).denoiser)
    assert not {name for name in changed if name.startswith(("conv_in", "time_embedding", "down_blocks.0"))}
    assert {"down_blocks.1.resnets.0.conv_shortcut.weight", "down_blocks.1.attentions.0.to_q.weight", "conv_out.bias"} <= changed


def test_low_rank_additions_end_in_weights_of_the_usual_names(student: Pipeline, learn: Callable[..., Distilled]) -> None:
    learnt = learn(lora_rank=2, freeze=("mid_block",))
    assert type(learnt.denoiser) is UNet2DModel
    assert list(learnt.denoiser.state_dict()) == list(student.denoiser.state_dict())
    before = dict(student.denoiser.named_parameters())
    changed = changed_weights(student.denoiser, learnt.denoiser)
    assert {"conv_in.weight", "down_blocks.1.attentions.0.to_q.weight"} <= changed
    assert not {name for name in changed if name.startswith("mid_block") or ".norm" in name or name.endswith("bias")}
    moved = (
        learnt.denoiser.get_parameter("down_blocks.1.attentions.0.to_q.weight") - before["down_blocks.1.attentions.0.to_q.weight"]
    )
    assert torch.linalg.matrix_rank(moved.detach(), rtol=1e-3) == 2
    assert learnt.record["learning_parameters"] < sum(tensor.numel() for tensor in before.values()) / 2


def test_without_peft_an_error_names_the_extra(learn: Callable[..., Distilled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match=r"pip install 'ldpruner\[recover\]'"):
        learn(lora_rank=2)
