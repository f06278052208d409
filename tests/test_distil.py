"""A pruned student learns from its teacher: what it learns, on what, in how many processes, and what happens when it is stopped."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
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
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ldpruner
from conftest import PROBE, Command, ldm_operators, tiny_ldm, tiny_stable_diffusion
from ldpruner import Distillation, Edit, Plan, discover
from ldpruner.datasets import signed
from ldpruner.errors import ArtifactError, LDPrunerError, PipelineError, RunError
from ldpruner.operators.tracing import architecture, weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators
from ldpruner.probes import Probe
from ldpruner.recovery import Distilled, distil
from ldpruner.recovery import rows as kept
from ldpruner.recovery.batches import Draw
from ldpruner.recovery.checkpoints import Checkpoints
from ldpruner.recovery.conditioning import Caller
from ldpruner.recovery.latents import FIRST_SEED, encode
from ldpruner.recovery.losses import feature_error, guided
from ldpruner.recovery.noising import Noising
from ldpruner.recovery.taps import find_taps
from ldpruner.sound import write_wav
from ldpruner.surgery import prune

CHOSEN = {
    "down_blocks.1.resnets.0": "shortcut",
    "mid_block.attentions.0": "identity",
    "up_blocks.0.attentions.0.to_out.0": "zero",
}
SHORT = Distillation(max_train_steps=4, train_batch_size=4, learning_rate=1e-3, lr_warmup_steps=1, checkpointing_steps=2)
FEW = Probe(samples=6, num_inference_steps=2, seed=FIRST_SEED)
FLAGS = {"--samples": 6, "--steps": 2, "--max_train_steps": 4, "--train_batch_size": 4, "--learning_rate": 1e-3,
         "--lr_warmup_steps": 1, "--checkpointing_steps": 2}  # fmt: skip


def flags(**changed: Any) -> list[str]:
    """The command line of `SHORT` and `FEW`, and what is changed of it."""
    given = FLAGS | {f"--{name}": value for name, value in changed.items()}
    return [str(word) for pair in given.items() for word in pair]


def pruned(pipeline: Pipeline, chosen: dict[str, str], operators: Operators) -> Pipeline:
    """The pipeline around a denoiser without these operators."""
    edits = tuple(
        Edit(operator=name, replacement=replacement, options=operators[name].candidate(replacement).options)
        for name, replacement in chosen.items()
    )
    plan = Plan(model=architecture(pipeline.denoiser), denoiser=type(pipeline.denoiser).__name__, edits=edits)
    pipe = copy.copy(pipeline.pipe)
    setattr(pipe, pipeline.component, prune(pipeline.denoiser, plan))
    return Pipeline(pipe, source="student")


@pytest.fixture(scope="module")
def text_operators(tmp_path_factory: pytest.TempPathFactory) -> Operators:
    pipeline = Pipeline(tiny_stable_diffusion(tmp_path_factory.mktemp("sd")), source="tiny-sd")
    return discover(pipeline.denoiser, pipeline.call(PROBE), timing_repeats=1)


@pytest.fixture
def text_student(text_to_image: Pipeline, text_operators: Operators) -> Pipeline:
    return pruned(text_to_image, {"down_blocks.0.attentions.0": "identity"}, text_operators)


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


def log_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return weights_digest(one) == weights_digest(other)


def changed_weights(before: nn.Module, after: nn.Module) -> set[str]:
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, old), new in pairs if not torch.equal(old, new)}


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


def captioned_folder(folder: Path) -> Path:
    """Six pictures: four of split `train`, red or blue, and two of split `test`."""
    folder.mkdir()
    lines = []
    for number in range(6):
        colour = (255, 0, 0) if number % 2 else (0, 0, 255)
        Image.new("RGB", (9, 12), colour).save(folder / f"{number}.png")
        entry = {"file_name": f"{number}.png", "text": "red" if number % 2 else "blue", "style": "flat"}
        lines.append(json.dumps(entry | {"split": "train" if number < 4 else "test"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


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


# The same wherever and however often it is computed


def test_a_draw_depends_on_seed_step_and_sample_alone() -> None:
    def draw(seed: int, step: int, sample: int) -> Draw:
        return Draw.of(seed, step, sample, rows=1000, times=1000, dropout=0.5, shape=(2, 3))

    reference = draw(1, 2, 3)
    assert torch.equal(draw(1, 2, 3).noise, reference.noise)
    for other in (draw(0, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 3, 2)):
        assert not torch.equal(other.noise, reference.noise)
        assert (other.row, other.at) != (reference.row, reference.at)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The student and its teacher on disk."""
    place, teacher = tmp_path_factory.mktemp("folders"), Pipeline(tiny_ldm(), source="tiny-ldm")
    teacher.pipe.save_pretrained(place / "teacher")
    denoiser = pruned(teacher, CHOSEN, ldm_operators()).denoiser
    ldpruner.save(teacher, denoiser, None, place / "student", record={"latent_shift": 1.5})
    return place / "student", place / "teacher"


def started(*words: Any, processes: int = 1) -> subprocess.Popen[str]:
    """`ldpruner distil` in processes of its own."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, "ldpruner", "distil", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )


def test_two_processes_see_what_one_sees_with_twice_the_batch(
    learn: Callable[..., Distilled], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    learn("one", train_batch_size=4)
    out = tmp_path / "two"
    child = started(folders[0], "--teacher", folders[1], "--out", out, "--json", *flags(train_batch_size=2), processes=2)
    printed, complaints = child.communicate(timeout=120)
    assert child.returncode == 0, complaints
    assert json.loads(printed)["steps"] == 4  # one of them prints
    one, two = (log_of(work) for work in (tmp_path / "one", tmp_path / "two-training"))
    for name in ("task", "output", "feature", "loss"):
        assert [entry[name] for entry in two] == pytest.approx([entry[name] for entry in one], rel=1e-4)


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(
    ldm: Pipeline, student: Pipeline, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    long = replace(SHORT, max_train_steps=2000, lr_scheduler="constant", use_ema=True, checkpoints_total_limit=2)
    words = flags(max_train_steps=2000, lr_scheduler="constant", checkpoints_total_limit=2)
    child = started(*folders[:1], "--teacher", folders[1], "--out", tmp_path / "broken", "--use_ema", *words)
    work = tmp_path / "broken-training"
    deadline = time.monotonic() + 90
    while not (work / "checkpoint-4").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    reached = Checkpoints(work=work).all()[-1].step
    assert 0 < reached < 2000
    assert not (tmp_path / "broken").exists()
    goal = replace(long, max_train_steps=reached + 3)
    teacher, pupil = (ldpruner.load(folder, device="cpu") for folder in reversed(folders))
    going_on = distil(pupil, teacher, work=work, settings=replace(goal, resume_from_checkpoint="latest"), probe=FEW)
    unbroken = distil(student, ldm, work=tmp_path / "unbroken", settings=goal, probe=FEW)
    assert equal(going_on.denoiser, unbroken.denoiser)
    assert [entry["loss"] for entry in log_of(work)] == [entry["loss"] for entry in log_of(tmp_path / "unbroken")]
    assert [checkpoint.step for checkpoint in Checkpoints(work=work).all()][1:] == [reached + 3]


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


# The command


def test_the_command_writes_a_folder_that_plain_diffusers_loads_with_the_learnt_weights(
    command: Command, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, _ = command("distil", folders[0], "--teacher", folders[1], "--out", out, "--json", *flags())
    assert code == 0
    told = json.loads(printed)
    assert told["steps"] == 4
    learnt = load_file(tmp_path / "out-training" / "checkpoint-4" / "training.safetensors")
    loaded = DiffusionPipeline.from_pretrained(out, trust_remote_code=True).unet
    assert loaded.config["quantization_config"]["operators"].keys() == CHOSEN.keys()
    names = [name.removeprefix("student.") for name in learnt if name.startswith("student.")]
    assert len(names) > 50
    assert all(torch.equal(loaded.get_parameter(name), learnt[f"student.{name}"]) for name in names)
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert record["distillation"]["losses"] == told["losses"]
    assert record["distillation"]["settings"]["max_train_steps"] == 4
    assert (record["base"], record["form"], record["latent_shift_before_distillation"]) == ("tiny-ldm", "portable", 1.5)


def test_a_plan_goes_where_its_student_goes(ldm: Pipeline, tmp_path: Path) -> None:
    ldm.pipe.save_pretrained(tmp_path / "teacher")
    operator = ldm_operators()["mid_block.attentions.0"]
    edit = Edit(operator=operator.name, replacement="identity", options=operator.candidate("identity").options)
    plan = Plan(model=architecture(ldm.denoiser), denoiser="UNet2DModel", edits=(edit,))
    ldpruner.save(ldm, prune(ldm.denoiser, plan), plan, tmp_path / "student", form="plugin")
    learnt = ldpruner.distil(tmp_path / "student", tmp_path / "teacher", work=tmp_path / "work", settings=SHORT, probe=FEW)
    assert ldpruner.save_distilled(learnt, tmp_path / "out") == "plugin"
    assert Plan.load(tmp_path / "out" / "pruning_plan.json") == Plan.load(tmp_path / "student" / "pruning_plan.json")
    assert equal(ldpruner.load(tmp_path / "out", device="cpu").denoiser, learnt.denoiser)
    with pytest.raises(ArtifactError, match="Save as portable"):
        ldpruner.save_distilled(learnt, tmp_path / "dense", form="dense")


def test_an_ordinary_student_is_saved_as_an_ordinary_pipeline(ldm: Pipeline, tmp_path: Path) -> None:
    ldm.pipe.save_pretrained(tmp_path / "teacher")
    learnt = distil(tmp_path / "teacher", tmp_path / "teacher", work=tmp_path / "work", settings=SHORT, probe=FEW)
    assert ldpruner.save_distilled(learnt, tmp_path / "out") == "dense"
    assert not (tmp_path / "out" / "pruning_plan.json").exists()
    assert equal(DiffusionPipeline.from_pretrained(tmp_path / "out").unet, learnt.denoiser)


# What goes wrong


def refused(command: Command, folders: tuple[Path, Path], out: Path, *words: Any) -> str:
    """The one line that a command which has to fail ends with; progress bars may stand before it."""
    code, printed, complaints = command("distil", folders[0], "--teacher", folders[1], "--out", out, *words)
    assert (code, printed) == (2, "")
    assert not out.exists()
    lines = [line for line in complaints.replace("\r", "\n").splitlines() if line.startswith("ldpruner: ")]
    assert complaints.rstrip().endswith(lines[-1])
    assert len(lines) == 1
    return lines[0]


def test_a_work_folder_with_checkpoints_is_gone_on_from_only_when_asked_and_with_equal_settings(
    command: Command, folders: tuple[Path, Path], learn: Callable[..., Distilled], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    distil(folders[0], folders[1], work=work, settings=SHORT, probe=FEW)
    out = tmp_path / "out"
    assert "holds checkpoint-4. Go on from it with --resume_from_checkpoint latest" in refused(
        command, folders, out, "--work", work, *flags()
    )
    again = ("--work", work, "--resume_from_checkpoint")
    assert "was made with learning_rate=0.001, and this run has 0.002" in refused(
        command, folders, out, *again, "latest", *flags(learning_rate=2e-3)
    )
    assert "was made with samples_per_step=4, and this run has 8" in refused(
        command, folders, out, *again, "latest", *flags(train_batch_size=8)
    )
    assert "is no checkpoint-<step> folder" in refused(command, folders, out, *again, "checkpoint-9", *flags())
    weights = work / "checkpoint-4" / "training.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "checkpoint-4: cannot be read" in refused(command, folders, out, *again, "latest", *flags())
    assert command("distil", folders[0], "--teacher", folders[1], "--out", out, *again, "checkpoint-2", *flags())[0] == 0
    assert [checkpoint.step for checkpoint in Checkpoints(work=work).all()] == [2, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder."),
        (["--data", "pictures", "--split", "val"], "has no split 'val'. It has: test, train."),
        (["--data", "latents.safetensors"], "are latents of (4, 2, 2), and the denoiser of"),
        (["--data", "damaged.safetensors"], "damaged.safetensors: holds no latents that can be read"),
        (["--data", "nan.safetensors"], "nan.safetensors: gives latents that are not finite"),
        (["--data", "pictures", "--samples", "3"], "--samples is about the teacher's generations"),
        (["--split", "test"], "--split goes with --data. Leave it out."),
        (["--guidance_weight", "1"], "takes no prompts, so there is no guidance"),
        (["--autoguidance_scale", "2"], "--autoguidance_scale goes with --guide. Leave it out."),
        (["--guide", "zoo:fashion", "--output_weight", "0"], "a guide moves what output and guidance loss compare with"),
        (["--guide", "nowhere"], "nowhere: no such folder."),
        (["--freeze", "mid_blok"], "freeze 'mid_blok': is no part of this UNet2DModel: did you mean mid_block"),
        (["--lr_scheduler", "linaer"], "lr_scheduler='linaer' is unknown: did you mean linear?"),
        (["--max_grad_norm", "nan"], "max_grad_norm=nan: a number from 0 up is needed."),
        (["--report_to", "nobody"], "report_to=nobody: cannot be had here"),
        (["--mixed_precision", "fp16"], "mixed_precision=fp16: small gradients vanish"),
        (["--task_weight", "0", "--output_weight", "0", "--feature_weight", "0"], "every loss has weight 0"),
        (["--form", "flat"], "form 'flat' is unknown"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    command: Command, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    captioned_folder(tmp_path / "pictures")
    save_file({"latents": torch.zeros(5, 4, 2, 2)}, "latents.safetensors")
    save_file({"latents": torch.full((5, 4, 4, 4), torch.nan)}, "nan.safetensors")
    Path("damaged.safetensors").write_bytes(b"nothing")
    given = flags()[4:] if "--data" in words else flags()
    assert message in refused(command, folders, tmp_path / "out", *given, *words)


def test_a_loss_that_is_not_finite_names_its_step_and_leaves_the_last_checkpoint(
    learn: Callable[..., Distilled], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"step \d+: the (loss|gradient) is (nan|inf); the checkpoints before it are kept"):
        learn(max_train_steps=40, learning_rate=1e18, max_grad_norm=1e30, checkpointing_steps=1, lr_scheduler="constant")
    checkpoints = Checkpoints(work=tmp_path / "work").all()
    assert checkpoints[-1].step == len(log_of(tmp_path / "work"))
    assert checkpoints[-1].facts()["made_with"]["learning_rate"] == 1e18


def test_a_full_disk_keeps_the_checkpoint_before(
    learn: Callable[..., Distilled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    learn(max_train_steps=4, lr_scheduler="constant")
    monkeypatch.setattr("ldpruner.recovery.checkpoints.save_file", full)
    with pytest.raises(ArtifactError, match="checkpoint-6: cannot be written"):
        learn(max_train_steps=6, lr_scheduler="constant", resume_from_checkpoint="latest")
    assert sorted(path.name for path in (tmp_path / "work").glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_text_pipeline_wants_captions(text_to_image: Pipeline, tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(5, 4, 8, 8)}, tmp_path / "latents.safetensors")
    with pytest.raises(LDPrunerError, match="has no captions, and StableDiffusionPipeline takes prompts"):
        distil(text_to_image, text_to_image, work=tmp_path / "work", settings=SHORT, data=tmp_path / "latents.safetensors")


def test_accelerate_that_starts_one_process_where_several_were_asked_for_is_refused(
    learn: Callable[..., Distilled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RunError, match="torchrun --nproc_per_node N"):
        learn()
