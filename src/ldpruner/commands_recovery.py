"""The command `distil`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ldpruner.errors import DataError
from ldpruner.options import FOLDER, as_json, loading, own_device, pipeline_of, probe_of, prompting, stacked, typed
from ldpruner.printing import print_json
from ldpruner.recovery.settings import PRECISIONS, SCHEDULES, Distillation

OF_GENERATIONS = {"samples", "num_inference_steps", "prompts", "prompts_file"}
OF_DATA = {"split", "caption"}
DEFAULT = Distillation()


def _number(name: str, help: str, least: float | None = None) -> Any:
    """An option for a number of `Distillation`, under its name and with its default."""
    default = getattr(DEFAULT, name)
    kind: Any = click.IntRange(least) if least is not None else float  # type: ignore[arg-type]
    return click.option("--" + name.replace("_", "-"), default=default, type=kind, show_default=default is not None, help=help)


learning = stacked(
    _number("max_train_steps", "How often the weights move.", 1),
    _number("train_batch_size", "Samples of one forward pass in one process.", 1),
    _number("gradient_accumulation_steps", "Forward passes of one step.", 1),
    _number("learning_rate", "Of AdamW, at its height."),
    click.option("--lr-scheduler", default=DEFAULT.lr_scheduler, show_default=True, help=f"{', '.join(SCHEDULES)}."),
    _number("lr_warmup_steps", "Steps over which the rate rises.", 0),
    _number("weight_decay", "Of AdamW."),
    _number("max_grad_norm", "Gradients are cut to this norm."),
    click.option("--use-ema", is_flag=True, help="The moving average of the weights is the result."),
    _number("ema_decay", "Its limit; it begins lower."),
    click.option(
        "--mixed-precision", default="no", show_default=True, envvar="ACCELERATE_MIXED_PRECISION", type=click.Choice(PRECISIONS)
    ),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time."),
    _number("seed", "Decides every draw.", 0),
)
lessons = stacked(
    _number("task_weight", "Weight of the error against the scheduler's own target."),
    _number("output_weight", "Weight of the error against the teacher's output."),
    _number("feature_weight", "Weight of the error against the teacher's features around what was removed."),
    click.option(
        "--feature-scale",
        default="teacher",
        show_default=True,
        type=click.Choice(["teacher", "none"]),
        help="What a feature's error is divided by: the teacher's feature, or nothing.",
    ),
    _number("guidance_weight", "Weight of the error of guided predictions; text pipelines only."),
    click.option("--guide", metavar="MODEL", help="A worse model, such as the teacher pruned further: answer away from it."),
    _number("autoguidance_scale", "How far away; 1: as the teacher answers."),
    _number("prompt_dropout", "The share of prompts that are left empty."),
    _number("lora_rank", "Learn additions of this rank, which are merged at the end, instead of all weights.", 1),
    click.option("--freeze", multiple=True, metavar="PATH", help="Keep this part of the denoiser as it is; several may be given."),
    click.option("--freeze-before-first-edit", is_flag=True, help="Keep all that runs before the first removed operator."),
)
keeping = stacked(
    click.option("--work", type=FOLDER, help="Checkpoints, log and computed latents; OUT-training by default."),
    _number("checkpointing_steps", "Steps between checkpoints.", 1),
    _number("checkpoints_total_limit", "Keep this many; all by default.", 1),
    click.option("--resume-from-checkpoint", metavar="latest|PATH", help="Go on from there; `latest` begins where there is none."),
    click.option("--report-to", help="A tracker of accelerate, such as tensorboard; log.jsonl is written anyway."),
)
learnt_from = stacked(
    click.option("--data", type=FOLDER, help="Pictures or recordings in a folder or zip, or latents in a .safetensors file."),
    click.option("--split", default="train", show_default=True, help="Which split of the data."),
    click.option("--caption", default="{text}", show_default=True, help="The prompt, from a line of metadata.jsonl."),
    click.option("--samples", default=1000, show_default=True, type=click.IntRange(1), help="Without data: teacher's generations."),
    click.option("--num-inference-steps", "--steps", default=20, show_default=True, help="Denoising steps of these."),
    prompting,
)


@click.command()
@click.argument("student", metavar="STUDENT")
@click.option("--teacher", metavar="MODEL", required=True, help="The original.")
@click.option("--out", type=FOLDER, required=True, help="Where to write the student that has learnt.")
@click.option("--form", help="How to save: portable, plugin or dense; the student's own by default.")
@learnt_from
@learning
@lessons
@keeping
@as_json
@loading
def distil(
    student: str,
    teacher: str,
    out: Path,
    form: str | None,
    data: Path | None,
    split: str,
    caption: str,
    work: Path | None,
    guide: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train STUDENT, a pruned pipeline or another, to answer as its teacher; under torchrun or accelerate on several processes."""
    _refuse_unread(data)
    if guide is None and typed("autoguidance_scale"):
        raise DataError("--autoguidance_scale goes with --guide. Leave it out.")
    from ldpruner import artifacts, recovery
    from ldpruner.files import check_writable

    if form:
        artifacts.check_form(form)
    chosen = Distillation(**{name: settings[name] for name in vars(DEFAULT)})
    probe = probe_of(settings | {"seed": recovery.FIRST_SEED})
    settings["device"] = settings["device"] or own_device()
    check_writable(out)
    distilled = recovery.distil(
        pipeline_of(student, settings),
        pipeline_of(teacher, settings),
        work=work or out.with_name(out.name + "-training"),
        settings=chosen,
        data=data,
        split=split,
        caption=caption,
        probe=probe,
        guide=pipeline_of(guide, settings) if guide else None,
    )
    if recovery.leave_processes():
        saved = artifacts.save_distilled(distilled, out, form=form)
        _tell(distilled.record, out, artifacts.loading_lines(str(out), saved), as_json)


def _refuse_unread(data: Path | None) -> None:
    """Raise where an option was typed that nothing would read."""
    context = click.get_current_context()
    guided = data is None or context.params["guidance_weight"]  # then something reads the guidance scale
    unread = OF_DATA if data is None else OF_GENERATIONS | ({"guidance_scale"} if not guided else set())
    for parameter in context.command.params:
        if parameter.name in unread and typed(parameter.name):
            asked = "goes with --data" if data is None else "is about the teacher's generations, and --data takes their place"
            raise DataError(f"{parameter.opts[0]} {asked}. Leave it out.")


def _tell(record: dict[str, Any], out: Path, loading_lines: str, as_json: bool) -> None:
    if as_json:
        names = ("data", "steps", "seconds", "losses", "taps", "learning_parameters")
        print_json({"out": str(out), **{name: record[name] for name in names}})
        return
    losses = record["losses"]
    print(f"{record['steps']} steps on {record['data']} in {record['seconds']:.0f} s; losses, first and last:")
    for name, first in losses["first"].items():
        print(f"  {name:<10} {first:10.4g} {losses['last'][name]:10.4g}")
    print(f"Written to {out}; load it with\n\n{loading_lines}")
