"""How long operators and their stand-ins take, on the device that they will run on."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ldpruner.ldpruner_v1 import Pointwise
from ldpruner.operators.tracing import Call
from ldpruner.plans import Operator

LARGE_S = 1.0  # seconds of what memory is given back after: this takes a quarter of one, and small calls are to find theirs


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """One timed run, waiting for the device where it works on its own."""
    with giving_back(device):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - began


@contextmanager
def giving_back(device: torch.device) -> Iterator[None]:
    """Give back what a long block freed on a CPU: in pieces, it stays with the process, and the next call takes more beside it."""
    began = time.perf_counter()
    yield
    if time.perf_counter() - began > LARGE_S and device.type == "cpu":
        give_back()


def give_back() -> None:
    """Give back to the system what was freed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Linux with glibc


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter is."""
    return next(module.parameters()).device


def time_modules(denoiser: nn.Module, call: Call, repeats: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of the whole call, and of every module in it with all that it calls: medians over `repeats`.

    What each module spends by itself is added up, so that a disturbance that meets one module in one run neither hides in
    its parents nor makes the parts disagree with the whole. Hooks slow the call down, so everything is scaled to the
    duration of the plain call.
    """
    plain, alone = time_alone(denoiser, call, repeats)
    total = dict.fromkeys(alone, 0.0)
    for name, taken in alone.items():
        for block in _with_ancestors(name):
            total[block] = total.get(block, 0.0) + taken
    scale = plain / total[""]
    return plain, {name: taken * scale for name, taken in total.items()}


@torch.inference_mode()
def time_alone(denoiser: nn.Module, call: Call, repeats: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of the plain call, and those that each module spends by itself in a call that is watched: medians.

    A module's own time is without the modules that it calls. Watching costs time, so the parts add up to more than the plain
    call.
    """
    device = device_of(denoiser)
    seconds(lambda: call.run(denoiser), device)
    plain = statistics.median(seconds(lambda: call.run(denoiser), device) for _ in range(repeats))
    clock = _Clock(device)
    with clock.running(denoiser):
        for _ in range(repeats + 1):
            clock.begin()
            seconds(lambda: call.run(denoiser), device)
    return plain * 1e3, {name: statistics.median(taken[1:]) * 1e3 for name, taken in clock.alone.items() if name in clock.met}


def _with_ancestors(name: str) -> list[str]:
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


class _Clock:
    """Seconds that each module spends by itself, a reading per run, however often it is called in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.alone: dict[str, list[float]] = {}
        self.met: set[str] = set()
        self._open: list[list[float]] = []  # of every module entered: when, and how long its children took

    @contextmanager
    def running(self, denoiser: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in denoiser.named_modules():
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave(name)).remove)
                self.alone[name] = []
            yield

    def begin(self) -> None:
        """A new run: a reading of nothing for every module."""
        for readings in self.alone.values():
            readings.append(0.0)

    def _enter(self, *_: Any) -> None:
        synchronize(self.device)
        self._open.append([time.perf_counter(), 0.0])

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronize(self.device)
            began, children = self._open.pop()
            taken = time.perf_counter() - began
            self.alone[name][-1] += taken - children
            self.met.add(name)
            if self._open:
                self._open[-1][1] += taken

        return hook


@torch.inference_mode()
def time_pointwise(operator: Operator, options: dict[str, Any], like: nn.Module, repeats: int) -> float:
    """Milliseconds of a pointwise stand-in on an input of the operator's shape: the median over `repeats`."""
    parameter = next(like.parameters())
    stand_in = Pointwise(options).to(device=parameter.device, dtype=parameter.dtype)
    inputs = torch.zeros(operator.input_shape, device=parameter.device, dtype=parameter.dtype)
    _, keyword = options["source"]
    run = functools.partial(stand_in, **{keyword: inputs})
    run()
    return statistics.median(seconds(run, parameter.device) for _ in range(repeats)) * 1e3
