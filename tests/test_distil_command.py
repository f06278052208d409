"""Distillation as it is run: in several processes, stopped and gone on, from the command line, and what goes wrong."""

from __future__ import annotations

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

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
)
from safetensors.torch import load_file, save_file

import ldpruner
from conftest import Command, ldm_operators, tiny_ldm
from distilling import CHOSEN, FEW, SHORT, captioned_folder, equal, flags, log_of, pruned
from ldpruner import Edit, Plan
from ldpruner.errors import ArtifactError, LDPrunerError, RunError
from ldpruner.operators.tracing import architecture
from ldpruner.pipelines import Pipeline
from ldpruner.recovery import Distilled, distil
from ldpruner.recovery.batches import Draw
from ldpruner.recovery.checkpoints import Checkpoints
from ldpruner.surgery import prune

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


@pytest.mark.exhaustive
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
