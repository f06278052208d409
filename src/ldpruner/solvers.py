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


class HostTimesteps:
    """A scheduler's timesteps on the host, copied once for each schedule."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.copied: tuple[Any, Any] = (None, None)

    def of(self, timestep: Any) -> Any:
        """The timestep on the host, without waiting for the device, where it is one of the schedule's own; else as it is."""
        place = place_in(getattr(self.scheduler, "timesteps", None), timestep)
        if place is None or timestep.device.type == "cpu":
            return timestep
        if self.copied[0] is not self.scheduler.timesteps:
            self.copied = (self.scheduler.timesteps, self.scheduler.timesteps.cpu())
        return self.copied[1][place]


def place_in(whole: Any, part: Any) -> int | None:
    """Which element of a tensor `(n,)` another, of no dimension, is: told by where it lies in memory, not by its value."""
    if not (isinstance(whole, Tensor) and isinstance(part, Tensor)) or whole.ndim != 1 or part.ndim or whole.dtype != part.dtype:
        return None
    if whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return None
    place, left = divmod(int(part.storage_offset() - whole.storage_offset()), whole.stride(0))
    return place if not left and 0 <= place < len(whole) else None


@contextmanager
def watching(scheduler: Any, last: list[Tensor] | None) -> Iterator[None]:
    """Keep in `last`, if there is one, the sample that the scheduler's latest step gave.

    Steps are told their timestep on the host, where many schedulers look it up: asked of a GPU, each step would wait for it.
    """
    if last is None:
        yield
        return
    step, host = scheduler.step, HostTimesteps(scheduler)

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if "timestep" in kwargs:
            kwargs["timestep"] = host.of(kwargs["timestep"])
        output = step(*(host.of(each) if place == 1 else each for place, each in enumerate(args)), **kwargs)
        last[:] = [output[0]]
        return output

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step
