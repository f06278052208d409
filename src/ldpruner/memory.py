"""How much a device holds at once: tried, and halved where its memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ldpruner.errors import PipelineError
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe

log = logging.getLogger(__name__)
T = TypeVar("T")


def within_memory(run: Callable[[int], T], size: int) -> T:
    """`run(size)`, or with half of it, and half again, until memory does not run out. Raises what `run` raises at 1."""
    while True:
        try:
            return run(size)
        except (RuntimeError, PipelineError) as error:
            if size == 1 or not ran_out(error):
                raise
        clear_device_cache(garbage_collection=True)
        size = (size + 1) // 2
        log.info("memory ran out: %d samples in one denoiser call from here on", size)


def ran_out(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that memory ran out."""
    causes = (each for each in (error, error.__cause__) if isinstance(each, Exception))
    return any(should_reduce_batch_size(each) for each in causes)


def samples_at_once(pipeline: Pipeline, probe: Probe) -> int:
    """How many of the probe's samples, halved from all of them, go through one denoiser call on this device."""

    def tried(size: int) -> int:
        call = pipeline.call(probe, samples=size)
        with torch.inference_mode():
            call.run(pipeline.denoiser)
        return size

    return within_memory(tried, probe.samples)
