"""Schedulers: those that need few steps, in the place of a pipeline's own, and the samples that one gives on its way."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from ldpruner.errors import PipelineError
from ldpruner.registry import Registry

SOLVERS: Registry[Any] = Registry("solver")
SOLVERS.register("ddim")(DDIMScheduler)  # Song et al., arXiv 2010.02502
SOLVERS.register("dpm++")(DPMSolverMultistepScheduler)  # Lu et al., arXiv 2211.01095
SOLVERS.register("unipc")(UniPCMultistepScheduler)  # Zhao et al., arXiv 2302.04867


@contextmanager
def solving_by(pipe: Any, name: str | None) -> Iterator[None]:
    """While the block runs, a diffusers pipeline samples by another solver of the same noise schedule; by its own for None.

    Raises `PipelineError` where diffusers does not hold the two for exchangeable.
    """
    if name is None:
        yield
        return
    solver, own = SOLVERS[name], pipe.scheduler
    if solver not in (*getattr(own, "compatibles", ()), type(own)):
        raise PipelineError(f"solver {name}: does not go with {type(own).__name__}. Leave it out.")
    pipe.scheduler = solver.from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own


@contextmanager
def watching(scheduler: Any, last: list[Tensor] | None) -> Iterator[None]:
    """Keep in `last`, if there is one, the sample that the scheduler's latest step gave."""
    if last is None:
        yield
        return
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        last[:] = [output[0]]
        return output

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step
