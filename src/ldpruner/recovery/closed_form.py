"""Repair in closed form: every stand-in fitted to what its operator gave, on the inputs that the pruned model gives it.

Stand-ins are chosen and scored one by one, so each was fitted as if the rest of the model were still the original. Here they
are fitted again, front to back, each after those before it: what it is given now is mapped to what the original's operator made
of its own inputs. Least squares, no gradient, no data but the original's generations. Layer-wise reconstruction of this kind
is common for channel pruning (He et al., arXiv 1707.06168, eq. 1); fitting it to stand-ins of whole operators is ours.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldpruner.fitting import Moments, Weights, pointwise_wanted, rows, trajectories
from ldpruner.ldpruner_v1 import Pointwise, Shortcut, StandIn, resample
from ldpruner.operators.tracing import Call
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit
from ldpruner.probes import Probe
from ldpruner.surgery import Fitted, correction_of, pruned_view, set_fitted
from ldpruner.trajectories import record_calls

log = logging.getLogger(__name__)

Pair = tuple[Tensor, Tensor]
KEPT_BYTES = 2**30  # of the original's outputs at once: its calls are made anew for every group of operators that fits in here
SAMPLES = 24  # of each trajectory: with 8, stand-ins fitted to each other learnt the noise, and digits came out worse


class _ReachedError(Exception):
    """Ends a denoiser call once the module that was waited for has run."""


def repair(
    pipeline: Pipeline,
    edits: Sequence[Edit],
    probe: Probe,
    *,
    fitted: Fitted,
    ridge: float = 1e-3,
    batch_size: int | None = None,
) -> Weights:
    """What the stand-ins of `edits` are to hold, see `surgery.Fitted`, fitted front to back; `fitted` is where maps start.

    `pipeline` is the original. Pointwise maps are drawn towards what they were, corrections towards none, by `ridge` times
    the mean second moment of what they are given. The activations are those of teacher-forced calls: the original's on
    `fitting.trajectories`, put to both models. Costs about half a pass over these calls for each edit, and a pass of the
    original for every gigabyte of its outputs.
    """
    teacher = pipeline.denoiser
    calls = [
        call
        for each in trajectories(pipeline.completed(probe), SAMPLES)
        for call in record_calls(pipeline, each, batch_size=batch_size)
    ]
    student = pruned_view(teacher, edits, fitted)
    weights = {name: pair for name, pair in fitted.items() if name in pointwise_wanted(edits)}
    chosen = [edit.operator for edit in edits if edit.reason == "chosen"]
    names = [name for name in in_calling_order(student, chosen, calls[0]) if _can_be_fitted(student.get_submodule(name))]
    wanted: dict[str, list[Tensor]] = {}
    for place, name in enumerate(names):
        if name not in wanted:
            wanted = outputs(teacher, names[place:], calls)
        stand_in: Any = student.get_submodule(name)
        key = name if isinstance(stand_in, Pointwise) else correction_of(name)
        weights[key] = _fit(student, name, calls, wanted.pop(name), ridge=ridge, start=fitted.get(name))
        set_fitted(stand_in, *weights[key])
    log.info("fitted %d stand-ins front to back on %d calls of %d samples", len(weights), len(calls), calls[0].batch)
    return weights


def _can_be_fitted(stand_in: nn.Module) -> bool:
    assert isinstance(stand_in, StandIn)
    if isinstance(stand_in, Pointwise):
        return True
    if "correction" not in stand_in.options:
        return False
    child = stand_in.get_submodule(stand_in.options["child"]) if isinstance(stand_in, Shortcut) else None
    return child is None or all(isinstance(getattr(child, name, None), Tensor) for name in ("weight", "bias"))


@torch.no_grad()
def _fit(
    student: nn.Module, name: str, calls: Sequence[Call], wanted: Sequence[Tensor], *, ridge: float, start: Pair | None
) -> Pair:
    """The pair of one stand-in, from what it is given in the student and what its operator made in the teacher."""
    stand_in = student.get_submodule(name)
    if isinstance(stand_in, Pointwise):
        assert start is not None
        moments = Moments.empty(stand_in.options["channels"])
        for call, made in zip(calls, wanted, strict=True):
            args, kwargs, _ = reach(student, name, call)
            given = resample(stand_in.pick(stand_in.options["source"], args, kwargs), stand_in.options["grid"])
            moments.add(rows(given), rows(made))
        return moments.solve(ridge, start[0])
    sums = ChannelSums()
    for call, made in zip(calls, wanted, strict=True):
        sums.add(rows(reach(student, name, call)[2]), rows(made))
    return sums.solve(ridge)


@dataclass
class ChannelSums:
    """Sums per channel, over every position seen, of what a stand-in gives, of what is wanted, and of their products."""

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        """Take in rows `(positions, channels)` of both."""
        x, y = given.double(), wanted.double()
        new = {"x": x, "y": y, "xx": x * x, "xy": x * y}
        self.count += len(x)
        self.sums = {name: self.sums.get(name, 0.0) + values.sum(0).cpu() for name, values in new.items()}

    def solve(self, ridge: float) -> Pair:
        """The scale `(channels,)`, drawn towards 1, and shift of the least squared error; float32."""
        x, y = self.sums["x"] / self.count, self.sums["y"] / self.count
        variance = self.sums["xx"] / self.count - x * x
        covariance = self.sums["xy"] / self.count - x * y
        penalty = variance.mean().clamp(min=0) * ridge + torch.finfo(torch.float64).tiny
        scale = (covariance + penalty) / (variance.clamp(min=0) + penalty)
        return scale.float(), (y - scale * x).float()


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
            fitting = max(1, sum(size <= KEPT_BYTES for size in sizes))
            made = dict(itertools.islice(made.items(), fitting))
    return made


def reach(model: nn.Module, name: str, call: Call) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """What one module is given in a call, and what it makes of it; the call ends there."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append((args, kwargs, output))
        raise _ReachedError

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        call.run(model)
    except _ReachedError:
        return seen[0]
    finally:
        handle.remove()
    raise AssertionError(f"{name} was traced and yet did not run")


@torch.no_grad()
def in_calling_order(model: nn.Module, names: Sequence[str], call: Call) -> list[str]:
    """The modules of these names in the order in which they run."""
    ran: dict[str, None] = {}
    handles = [model.get_submodule(name).register_forward_hook(_noting(ran, name)) for name in names]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return list(ran)


def _noting(ran: dict[str, None], name: str) -> Any:
    def hook(*_: Any) -> None:
        ran.setdefault(name)

    return hook
