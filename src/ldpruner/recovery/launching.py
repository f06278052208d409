"""Where a distillation runs: one process or several, which device, who is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from ldpruner.errors import RunError
from ldpruner.operators.timing import device_of
from ldpruner.pipelines import Pipeline
from ldpruner.processes import PATIENCE, check_launch
from ldpruner.recovery.settings import Distillation


@contextmanager
def started(settings: Distillation, pipeline: Pipeline, work: Path) -> Iterator[Accelerator]:
    """The processes of this run, told by accelerate; its settings are its own again afterwards.

    Raises `RunError` where a precision or a tracker is not to be had here.
    """
    check_launch("distil")
    fresh = not AcceleratorState._shared_state  # accelerate keeps the first precision of a process for all its Accelerators
    try:
        yield _accelerator(settings, pipeline, work)
    finally:
        if fresh:
            AcceleratorState._reset_state()


def _accelerator(settings: Distillation, pipeline: Pipeline, work: Path) -> Accelerator:
    try:
        accelerator = Accelerator(
            cpu=device_of(pipeline.denoiser).type == "cpu",
            mixed_precision=settings.mixed_precision,
            log_with=settings.report_to,
            project_config=ProjectConfiguration(project_dir=str(work), logging_dir=str(work / "tracking")),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],  # one may still encode while others wait
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise RunError(
            f"mixed_precision={settings.mixed_precision}, report_to={settings.report_to}: "
            f"cannot be had here ({' '.join(str(error).split())})."
        ) from error
    if settings.mixed_precision == "fp16" and accelerator.scaler is None:
        raise RunError("mixed_precision=fp16: small gradients vanish, for nothing scales the loss on a CPU. Take bf16 or no.")
    if settings.report_to and not accelerator.log_with:
        raise RunError(
            f"report_to={settings.report_to}: is not installed. Install it, or leave it out: log.jsonl is written anyway."
        )
    if settings.report_to:
        accelerator.init_trackers(
            "ldpruner-distil",
            config={
                name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.to_json().items()
            },
        )
    return accelerator


def leave_processes() -> bool:
    """End this process's part in what several compute; whether it is the one that saves and prints."""
    state = PartialState()
    main = bool(state.is_main_process)
    state.destroy_process_group()
    return main
