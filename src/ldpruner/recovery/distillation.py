"""Distillation: a student learns to answer as its teacher does, on as many processes as there are.

Sample j of step s draws its row, noise, timestep and dropped prompt from a counter-based generator (Philox) at (seed, s, j),
so no state of any generator is kept: a resumed run sees what an unbroken one sees, to the bit, and the samples of a step
are the same however processes and gradient accumulation cut them up. Both networks run in evaluation mode: dropout would
draw from a global generator, and a teacher's answer has no noise to average out.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ldpruner.environment import environment
from ldpruner.errors import ArtifactError, PipelineError, RunError
from ldpruner.files import append_json_line, read_json_lines, write_text
from ldpruner.operators.tracing import Call, dry_run, weights_digest
from ldpruner.pipelines import Model, Pipeline, as_pipeline
from ldpruner.probes import Probe
from ldpruner.recovery.batches import Batches
from ldpruner.recovery.checkpoints import Checkpoint, Checkpoints
from ldpruner.recovery.conditioning import NO_PROMPT, Caller, first_tensor, kept_conditions
from ldpruner.recovery.latents import GENERATED, Examples, distinct, from_data, generated
from ldpruner.recovery.launching import started
from ldpruner.recovery.learning import Learning
from ldpruner.recovery.losses import Lesson
from ldpruner.recovery.noising import Noising
from ldpruner.recovery.rows import Maker
from ldpruner.recovery.settings import Distillation
from ldpruner.recovery.taps import find_taps
from ldpruner.recovery.trainable import Learner

LOG = "log.jsonl"
ENDS = 50  # steps over which the first and the last losses of the record are averaged


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A student that has learnt, and how."""

    pipeline: Pipeline  # the student as it was given, untouched
    denoiser: nn.Module  # float32, of the student's class and parameter names
    record: dict[str, Any]


def distil(
    student: Model,
    teacher: Model,
    *,
    work: str | os.PathLike[str],
    settings: Distillation | None = None,
    data: str | os.PathLike[str] | None = None,
    split: str = "train",
    caption: str = "{text}",
    probe: Probe | None = None,
    guide: Model | None = None,
) -> Distilled:
    """Teach a student, pruned or not, to answer as its teacher; the models that were given stay as they were.

    It learns on `data`: a folder or zip of pictures or recordings, or latents in a .safetensors file; without it on the
    teacher's own generations for `probe`. `caption` makes prompts of the entries of `metadata.jsonl`. A `guide` is a worse
    model of the same kind, such as the teacher pruned further: the teacher's answers, moved away from the guide's by
    `autoguidance_scale`, can make better samples than its own (arXiv 2406.02507), and the student learns these. What is computed
    on the way, checkpoints and `log.jsonl` lie in `work`. Raises `LDPrunerError` with what to do.
    """
    settings, work = settings or Distillation(), Path(work)
    pupil, master = as_pipeline(student), as_pipeline(teacher)
    worse = as_pipeline(guide) if guide is not None else None
    if worse is not None and not (settings.output_weight or settings.guidance_weight):
        raise RunError("a guide moves what output and guidance loss compare with: both have weight 0. Give one of them a weight.")
    checkpoints = Checkpoints(work=work)
    start = checkpoints.chosen(settings.resume_from_checkpoint)
    with started(settings, pupil, work) as accelerator:
        _prepare(work, checkpoints, accelerator)
        master.pipe.to(accelerator.device)
        if worse is not None:
            worse.denoiser.to(accelerator.device)
        maker = Maker(work=work, accelerator=accelerator, batch_size=settings.train_batch_size)
        if data is None:
            examples = generated(master, probe or GENERATED, maker=maker)
        else:
            examples = from_data(Path(data), master, split=split, caption=caption, maker=maker)
        made_with = settings.learnt_by(accelerator.num_processes) | {
            "student": weights_digest(pupil.denoiser),
            "teacher": weights_digest(master.denoiser),
            "data": examples.digest,
            "guide": weights_digest(worse.denoiser) if worse is not None else None,
        }
        batches = _batches(master, examples, settings, maker)
        learner, learning = _learning(pupil, master, worse, settings, batches, accelerator, probe)
        seconds = _run(learning, checkpoints, start, made_with)
        learning.finish()
        record = {
            "teacher": master.source,
            "student": pupil.source,
            "guide": worse.source if worse is not None else None,
            "data": examples.source,
            "processes": accelerator.num_processes,
            "seconds": round(seconds, 1),
            **_learnt(learning, accelerator.num_processes),
            "losses": _losses(work / LOG),
        }
        denoiser = learner.finished()
        return Distilled(pipeline=pupil, denoiser=denoiser, record=record | {"environment": environment(denoiser)})


def _learnt(learning: Learning, processes: int) -> dict[str, Any]:
    """What was learnt, and by which settings."""
    settings = learning.settings
    return {
        "settings": settings.to_json(),
        "samples_per_step": settings.samples_per_step(processes),
        "steps": settings.max_train_steps,
        "taps": list(learning.lesson.taps),
        "learning_parameters": sum(parameter.numel() for parameter in learning.parameters.values()),
    }


def _prepare(work: Path, checkpoints: Checkpoints, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{work}: cannot be made ({error.strerror}). Name another folder with --work.") from error
        checkpoints.clear_partial()
    accelerator.wait_for_everyone()


def _batches(teacher: Pipeline, examples: Examples, settings: Distillation, maker: Maker) -> Batches:
    device = maker.accelerator.device
    caller = Caller.of(teacher)
    shape = examples.latents.shapes["latents"]
    if shape != caller.sample_shape:
        raise PipelineError(
            f"{examples.source}: are latents of {shape}, and the denoiser of {teacher.source} takes {caller.sample_shape}."
        )
    if settings.guidance_weight and not (examples.prompts and caller.conditions):
        raise PipelineError(f"guidance_weight: {teacher.source} takes no prompts, so there is no guidance. Leave it out.")
    prompts, prompt_of = distinct(examples.prompts, NO_PROMPT)
    return Batches(
        latents=examples.latents,
        prompt_of=prompt_of,
        conditions=kept_conditions(caller, teacher, prompts, maker=maker),
        caller=caller.to(device),
        noising=Noising.of(teacher).to(device),
        seed=settings.seed,
        dropout=settings.prompt_dropout,
        batch_size=settings.train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        with_unconditional=bool(settings.guidance_weight),
        device=device,
    )


def _learning(
    pupil: Pipeline,
    master: Pipeline,
    worse: Pipeline | None,
    settings: Distillation,
    batches: Batches,
    accelerator: Accelerator,
    probe: Probe | None,
) -> tuple[Learner, Learning]:
    call = batches.probing().call
    for each in (pupil, worse) if worse is not None else (pupil,):
        batches.noising.check_same(Noising.of(each).to(accelerator.device), (master.source, each.source))
        _check_answers(each.denoiser, call, batches.caller.sample_shape, (master.source, each.source))
    denoiser: Any = copy.deepcopy(pupil.denoiser).float().to(accelerator.device).eval()
    usual = master.guidance_scale(probe or GENERATED)
    lesson = Lesson(
        teacher=master.denoiser.eval(),
        taps=find_taps(denoiser, master.denoiser, call) if settings.feature_weight else (),
        settings=settings,
        guidance_scale=usual if settings.guidance_scale is None else settings.guidance_scale,
        accelerator=accelerator,
        guide=worse.denoiser.eval() if worse is not None else None,
    )
    if not lesson.weights():
        raise RunError("only features are to be compared, and nothing was removed from this student: give another loss a weight.")
    learner = Learner(denoiser, settings, call)
    if settings.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    with accelerator.autocast():
        learner.leave_unreached(lambda: lesson.terms(denoiser, batches.probing())["loss"])
    return learner, Learning(learner, settings, lesson=lesson, batches=batches, accelerator=accelerator)


def _check_answers(student: Any, call: Call, shape: tuple[int, ...], sources: tuple[str, str]) -> None:
    """Raise `PipelineError` where a student cannot answer its teacher's calls."""
    try:
        answer = first_tensor(dry_run(student, call))
    except Exception as error:  # whatever the denoiser's own code raises
        raise PipelineError(f"{sources[1]}: does not take what {sources[0]} gives its denoiser ({error}).") from error
    if tuple(answer.shape[1:]) != shape:
        raise PipelineError(f"{sources[1]}: answers with {tuple(answer.shape[1:])} to latents of {shape}, which is not supported.")


def _run(learning: Learning, checkpoints: Checkpoints, start: Checkpoint | None, made_with: Mapping[str, Any]) -> float:
    """Take every step that is left; the seconds that all steps took, those before a checkpoint included."""
    settings, accelerator = learning.settings, learning.accelerator
    first, spent, log = 0, 0.0, checkpoints.work / LOG
    if start is not None:
        start.check_made_with(made_with)
        if start.step > settings.max_train_steps:
            raise RunError(f"{start.folder}: is beyond max_train_steps={settings.max_train_steps}.")
        learning.go_on_from(start)
        first, spent = start.step, float(start.facts()["seconds"])
    if accelerator.is_main_process:
        _cut_log(log, first)
    began = time.monotonic() - spent
    bar = tqdm(
        range(first, settings.max_train_steps),
        initial=first,
        total=settings.max_train_steps,
        desc="distilling",
        unit="step",
        mininterval=1,
        disable=not accelerator.is_main_process or first == settings.max_train_steps,
    )
    for step in bar:
        losses = learning.step(step)
        seconds = time.monotonic() - began
        accelerator.log(losses, step=step + 1)
        if accelerator.is_main_process:
            bar.set_postfix({"loss": f"{losses['loss']:.4f}"}, refresh=False)
            append_json_line(log, {"step": step + 1, **losses, "seconds": round(seconds, 3)})
        if (step + 1) % settings.checkpointing_steps == 0 or step + 1 == settings.max_train_steps:
            if accelerator.is_main_process:
                facts = {"made_with": made_with, "seconds": seconds, **learning.facts()}
                checkpoints.save(step + 1, learning.tensors(), facts, limit=settings.checkpoints_total_limit)
            accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return time.monotonic() - began if first < settings.max_train_steps else spent


def _cut_log(log: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run goes on from."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    kept = [line for line, entry in zip(lines, read_json_lines(log), strict=False) if entry["step"] <= step]
    write_text(log, "".join(kept))


def _losses(log: Path) -> dict[str, Any]:
    """Every loss, averaged over the first and the last steps."""
    entries = read_json_lines(log)
    count = max(1, min(ENDS, len(entries) // 2))
    if not entries:
        return {}
    names = [name for name in entries[0] if name not in ("step", "lr", "seconds")]

    def means(some: list[dict[str, Any]]) -> dict[str, float]:
        return {name: math.fsum(entry[name] for entry in some) / len(some) for name in names}

    return {"first": means(entries[:count]), "last": means(entries[-count:]), "steps_averaged": count}
