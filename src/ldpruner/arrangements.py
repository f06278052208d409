"""How a denoiser runs fastest on this device: measured, before it runs many thousand times."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ldpruner.environment import environment
from ldpruner.errors import ArtifactError
from ldpruner.files import cache_folder, write_json
from ldpruner.operators.timing import device_of, seconds
from ldpruner.operators.tracing import Call, architecture
from ldpruner.operators.watching import tensors_in
from ldpruner.processes import Crew

log = logging.getLogger(__name__)

ROUNDS = 3  # in each of which either arrangement is timed, `CALLS` calls in a row
CALLS = 3
LONG_S = 2.0  # of calls after which no other begins: what takes seconds is told apart without
WORTH_IT = 0.97  # of the time as it is: a smaller saving is not told from noise
SHARED = 0.8  # of the time of calls of their own: replacements that share one run the operators that they replace as well
COMPILED_S = 1800.0  # of calls below which compiling, which takes minutes, is not tried
COMPILING: dict[str, Any] = {}  # how: as PyTorch has it by default
MANY = 8  # modules in what counts as a block

Tell = Callable[[str], None]


@contextmanager
def fastest(
    denoiser: nn.Module, call: Call, crew: Crew, tell: Tell, *, channels_last: bool = False, calls: float = 0.0
) -> Iterator[None]:
    """While the block runs, the denoiser is arranged to be fastest for so many calls; `tell` is told what was measured.

    Convolutions' weights lie channels-last if that is said. Where the calls would take `COMPILED_S` seconds and more, its blocks
    are compiled, and stay so if that saves time; the first process of a crew decides for all. What the arrangements compute
    differs in the last bits.
    """
    if channels_last and arranges(denoiser):
        _lay(denoiser, torch.channels_last)
    else:
        channels_last = False
    try:
        with _compiled(denoiser, call, crew, tell, calls):
            yield
    finally:
        if channels_last:
            _lay(denoiser, torch.contiguous_format)


def channels_last_pays(denoiser: nn.Module, call: Call, tell: Tell) -> bool:
    """Whether a call is faster so; that is measured once on a device, and kept. Nothing changes where there is no choice."""
    if not arranges(denoiser):
        return False
    ratio = _kept_ratio("channels_last", denoiser, call, lambda: channels_last_ratio(denoiser, call))
    tell(_told("with channels last", ratio, ratio <= WORTH_IT))
    return ratio <= WORTH_IT


def sharing_pays(denoiser: nn.Module, few: Call, many: Call, tell: Tell) -> bool:
    """Whether many samples take much less time together than a few at a time; measured once on a device, and kept."""
    times = many.batch // few.batch
    ratio = _kept_ratio(f"sharing {times}", denoiser, few, lambda: sharing_ratio(denoiser, few, many))
    pays = ratio <= SHARED
    how = f"measuring {'so many' if pays else 'one'} at a time"
    tell(f"Measured: {times} replacements in one denoiser call take {ratio * 100:.0f}% of the time of {times} calls; {how}.")
    return pays


def sharing_ratio(denoiser: nn.Module, few: Call, many: Call) -> float:
    """The time of a sample in a call of many, to that in a call of few: the median of the rounds' ratios."""
    times = many.batch / few.batch
    return statistics.median(_seconds(denoiser, many) / (times * _seconds(denoiser, few)) for _ in range(ROUNDS))


@contextmanager
def _compiled(denoiser: nn.Module, call: Call, crew: Crew, tell: Tell, calls: float) -> Iterator[None]:
    blocks = [] if arrangement(denoiser)[1] else blocks_of(denoiser)
    each = crew.leaders(_seconds(denoiser, call) if crew.leads and blocks and calls else 0.0 if crew.leads else None)
    if each * calls < COMPILED_S:
        yield
        return
    try:
        ratio, spent = compiled_ratio(denoiser, blocks, call, each)
        ratio = crew.leaders(ratio if crew.leads else None)
        tell(_told(f"after {spent:.0f} s of compiling its blocks", ratio, ratio <= WORTH_IT))
        if ratio > WORTH_IT:
            _forget(blocks)
        yield
    finally:
        _forget(blocks)


def compiled_ratio(denoiser: nn.Module, blocks: Sequence[nn.Module], call: Call, before: float) -> tuple[float, float]:
    """The time of a call with compiled blocks, to `before`, and the seconds of compiling; infinite where it cannot be done here."""
    began = time.perf_counter()
    for block in blocks:
        block.compile(dynamic=False, **COMPILING)
    try:
        with torch.inference_mode():
            call.run(denoiser)
        spent = time.perf_counter() - began
        return _seconds(denoiser, call) / before, spent
    except Exception as error:  # whatever a compiler, or the lack of one, raises
        log.info("blocks cannot be compiled here: %s", error)
        return math.inf, time.perf_counter() - began


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks of a denoiser: what its lists hold, and what stands beside them and has parts."""
    blocks: list[nn.Module] = []
    for child in denoiser.children():
        blocks += list(child) if isinstance(child, nn.ModuleList) else [child] if len(list(child.modules())) > MANY else []
    return blocks


def _forget(blocks: Iterable[nn.Module]) -> None:
    for block in blocks:
        block._compiled_call_impl = None


def _told(how: str, ratio: float, change: bool) -> str:
    share = f"takes {ratio * 100:.0f}% of its time" if ratio < math.inf else "does not run"
    return f"Measured: {how} a denoiser call {share}; scoring runs {'so' if change else 'as it is'}."


@torch.inference_mode()
def _seconds(denoiser: nn.Module, call: Call) -> float:
    taken: list[float] = []
    while len(taken) < CALLS and sum(taken) < LONG_S:
        taken.append(seconds(lambda: call.run(denoiser), device_of(denoiser)))
    return min(taken)


def _lay(denoiser: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in denoiser.parameters():
        if parameter.ndim == 4:  # of videos, which have five, the layout is another and stays
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def arranges(denoiser: nn.Module) -> bool:
    """Whether there is a choice: convolutions whose weights are laid the usual way, all of them."""
    grids = [parameter for parameter in denoiser.parameters() if parameter.ndim == 4 and parameter[0, 0].numel() > 1]
    return bool(grids) and all(grid.is_contiguous() for grid in grids)


def arrangement(denoiser: nn.Module) -> list[bool]:
    """Whether some weights lie channels-last, and whether some blocks are compiled: either decides last bits."""
    laid = any(parameter.ndim == 4 and not parameter.is_contiguous() for parameter in denoiser.parameters())
    return [laid, any(block._compiled_call_impl for block in denoiser.modules())]


def _kept_ratio(name: str, denoiser: nn.Module, call: Call, measure: Callable[[], float]) -> float:
    """The ratio that the cache holds for this device and these shapes; measured, and kept if that can be, where it holds none."""
    where = environment(denoiser)
    same = {key: where[key] for key in ("device", "threads", "dtype", "torch")}
    shapes = [list(tensor.shape) for tensor in tensors_in((call.args, call.kwargs))]
    question = json.dumps([name, architecture(denoiser), same, shapes], sort_keys=True)
    path = cache_folder() / "arrangements" / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        ratio = measure()
    try:
        write_json(path, {name: ratio})
    except ArtifactError as error:
        log.info("not kept for the next run: %s", error)
    return ratio


def channels_last_ratio(denoiser: nn.Module, call: Call) -> float:
    """The time of a call with weights channels-last, to that as it is: the median of the rounds' ratios; left as it was."""
    ratios = []
    for _ in range(ROUNDS):
        taken = []
        for memory_format in (torch.channels_last, torch.contiguous_format):
            _lay(denoiser, memory_format)
            taken.append(_seconds(denoiser, call))
        ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)
