"""What modules are given and make of it, in the calls on which stand-ins are fitted to each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldpruner.operators.tracing import Call
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.trajectories import record_call

CALLS = 48
SAMPLES = 24  # of each call
STEPS = (7, 11, 13, 17)  # of the generations that calls are taken from, in turn
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo one, are spread evenly however many are taken
KEPT_BYTES = 2**30  # of the original's outputs at once: its calls are made anew for every group of operators that fits in here


class _ReachedError(Exception):
    """Ends a denoiser call once the module that was waited for has run."""


def fitting_calls(pipeline: Pipeline, probe: Probe, *, batch_size: int | None = None, count: int | None = None) -> list[Call]:
    """`count` or `CALLS` calls of `SAMPLES` samples, no sample in two of them; more of fewer samples for a smaller `batch_size`.

    Samples take the probe's prompts, then the pipeline's others: with no more than sixteen, a text-to-image model came closer to
    the original on these sixteen, and moved away from it on all others.
    Neighbouring steps of one generation say nearly the same. On as many calls of a quarter of the samples, twelve of each, a
    convolution of a thousand weights an output learnt these generations by heart: its error fell to a tenth there, and not at
    all on others. Costs about six denoiser passes a sample: a generation ends with the call that is wanted of it.
    """
    probe, size = pipeline.varied(probe), min(batch_size or SAMPLES, SAMPLES)
    calls = []
    for number in range(math.ceil((count or CALLS) * SAMPLES / size)):
        steps = STEPS[number % len(STEPS)]
        turned = number * size % max(1, len(probe.prompts))
        other = replace(
            probe,
            samples=size,
            num_inference_steps=steps,
            seed=probe.seed + probe.samples + number * size,
            prompts=probe.prompts[turned:] + probe.prompts[:turned],
        )
        calls.append(record_call(pipeline, other, int(number * GOLDEN % 1 * steps)))
    return calls


@torch.no_grad()
def outputs(model: nn.Module, names: Sequence[str], calls: Sequence[Call]) -> dict[str, list[Tensor]]:
    """What modules make in every call: of the first, and of as many after it as `KEPT_BYTES` allow."""
    made: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        return lambda _module, _args, output: made[name].append(output)

    for call in calls:
        with ExitStack() as stack:
            for name in made:
                stack.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
            call.run(model)
        if call is calls[0]:  # the others take as much
            sizes = itertools.accumulate(len(calls) * tensors[0].nbytes for tensors in made.values())
            fitting_in = max(1, sum(size <= KEPT_BYTES for size in sizes))
            made = dict(itertools.islice(made.items(), fitting_in))
    return made


Reached = tuple[tuple[Any, ...], dict[str, Any], Tensor]


class Replay:
    """Calls of a model that is changed front to back, made again from where what is settled ends.

    The first module asked for in a block is reached through the whole model; what the block is given on the way is kept, so
    that the next one is reached through the block alone, and so on inwards. Modules are to be asked for in calling order, and
    changed only once they have been.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.model = model
        self._given: dict[str, Sequence[Call]] = {"": calls}  # to the blocks around the last module asked for
        self._once = set(in_calling_order(model, [name for name, _ in model.named_modules() if name], calls[0]))

    def reach(self, name: str) -> Iterator[Reached]:
        """What a module is given in every call, and what it makes of it."""
        around = self._around(name)
        block = self.model.get_submodule(around)
        return (reach(block, _inside(name, around), call) for call in self._given[around])

    def _around(self, name: str) -> str:
        """The innermost block around a module whose arguments are kept, after keeping those that can be."""
        self._given = {path: calls for path, calls in self._given.items() if not path or name.startswith(f"{path}.")}
        parts = name.split(".")
        for length in range(1, len(parts)):
            path, known = ".".join(parts[:length]), max(self._given, key=len)
            if path in self._once and path not in self._given and len(path) > len(known):
                self._keep(path, known)
        return max(self._given, key=len)

    def _keep(self, path: str, around: str) -> None:
        block, kept = self.model.get_submodule(around), list[Call]()
        for call in self._given[around]:
            kept.append(_entered(block, _inside(path, around), call))
            if len(self._given[around]) * kept[0].nbytes > KEPT_BYTES:
                return
        self._given[path] = kept


def _inside(name: str, block: str) -> str:
    return name.removeprefix(f"{block}.") if block else name


def _entered(model: nn.Module, name: str, call: Call) -> Call:
    """The call of one module in a call of the model."""
    seen: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(args, kwargs))
        raise _ReachedError

    _run_until(model, model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True), call)
    return seen[0]


def reach(model: nn.Module, name: str, call: Call) -> Reached:
    """What one module is given in a call, and what it makes of it; the call ends there."""
    seen: list[Reached] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append((args, kwargs, output))
        raise _ReachedError

    _run_until(model, model.get_submodule(name).register_forward_hook(hook, with_kwargs=True), call)
    return seen[0]


def _run_until(model: nn.Module, handle: RemovableHandle, call: Call) -> None:
    """Run until a hook ends the call; on copies, for blocks may write over what they are given."""
    try:
        call.copied().run(model)
    except _ReachedError:
        return
    finally:
        handle.remove()
    raise AssertionError("a module was traced and yet did not run")


@torch.no_grad()
def in_calling_order(model: nn.Module, names: Sequence[str], call: Call) -> list[str]:
    """Those of the modules that run once in a call, in the order in which they do."""
    ran: dict[str, int] = {}
    handles = [model.get_submodule(name).register_forward_hook(_counting(ran, name)) for name in names]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, times in ran.items() if times == 1]


def _counting(ran: dict[str, int], name: str) -> Any:
    def hook(*_: Any) -> None:
        ran[name] = ran.get(name, 0) + 1

    return hook
