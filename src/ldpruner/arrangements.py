"""How a denoiser's weights lie in memory fastest on this device: measured, before it runs many thousand times."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ldpruner.environment import environment
from ldpruner.errors import ArtifactError
from ldpruner.files import cache_folder, write_json
from ldpruner.operators.timing import device_of, seconds
from ldpruner.operators.tracing import Call, architecture, tensors_in
from ldpruner.processes import Crew

log = logging.getLogger(__name__)

ROUNDS = 3  # in each of which either arrangement is timed, `CALLS` calls in a row
CALLS = 3
WORTH_IT = 0.97  # of the time as it is: a smaller saving is not told from noise

Tell = Callable[[str], None]


@contextmanager
def fastest(denoiser: nn.Module, call: Call, crew: Crew, tell: Tell) -> Iterator[None]:
    """While the block runs, convolutions' weights lie channels-last where calls are faster so; `tell` is told what was measured.

    It is measured once on a device, and kept: what the arrangements compute differs in the last bits, so that a run is to go on
    as it began. For the same reason the first process of a crew decides for all.
    """
    if not arranges(denoiser):
        yield
        return
    ratio = crew.leaders(_kept_ratio(denoiser, call) if crew.leads else None)
    change = ratio <= WORTH_IT
    saying = "scoring runs so" if change else "scoring runs as it is"
    tell(f"Measured: with channels last a denoiser call takes {ratio * 100:.0f}% of its time; {saying}.")
    _lay(denoiser, torch.channels_last if change else torch.contiguous_format)
    try:
        yield
    finally:
        _lay(denoiser, torch.contiguous_format)


def _lay(denoiser: nn.Module, memory_format: torch.memory_format) -> None:
    denoiser.to(memory_format=memory_format)  # type: ignore[call-overload]  # PyTorch's stubs lack it


def arranges(denoiser: nn.Module) -> bool:
    """Whether there is a choice: convolutions whose weights are laid the usual way, all of them."""
    grids = [parameter for parameter in denoiser.parameters() if parameter.ndim == 4 and parameter[0, 0].numel() > 1]
    return bool(grids) and all(grid.is_contiguous() for grid in grids)


def channels_last(denoiser: nn.Module) -> bool:
    """Whether some weights lie so."""
    return any(parameter.ndim == 4 and not parameter.is_contiguous() for parameter in denoiser.parameters())


def _kept_ratio(denoiser: nn.Module, call: Call) -> float:
    """The ratio that the cache holds for this device and these shapes; measured, and kept if that can be, where it holds none."""
    where = environment(denoiser)
    same = {key: where[key] for key in ("device", "threads", "dtype", "torch")}
    shapes = [list(tensor.shape) for tensor in tensors_in((call.args, call.kwargs))]
    question = json.dumps([architecture(denoiser), same, shapes], sort_keys=True)
    path = cache_folder() / "arrangements" / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["channels_last"])
    except (OSError, ValueError, KeyError, TypeError):
        ratio = channels_last_ratio(denoiser, call)
    try:
        write_json(path, {"channels_last": ratio})
    except ArtifactError as error:
        log.info("not kept for the next run: %s", error)
    return ratio


@torch.inference_mode()
def channels_last_ratio(denoiser: nn.Module, call: Call) -> float:
    """The time of a call with weights channels-last, to that as it is: the median of the rounds' ratios; left as it was."""
    ratios = []
    for _ in range(ROUNDS):
        taken = []
        for memory_format in (torch.channels_last, torch.contiguous_format):
            _lay(denoiser, memory_format)
            taken.append(min(seconds(lambda: call.run(denoiser), device_of(denoiser)) for _ in range(CALLS)))
        ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)
