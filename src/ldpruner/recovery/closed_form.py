"""Repair in closed form: what stands in for operators, and the maps that stay, fitted to what the original makes.

Stand-ins are chosen and scored one by one, so each was fitted as if the rest of the model were still the original. Here they
are fitted again, front to back, each after those before it: what it is given now is mapped to what the original's operator made
of its own inputs. The linear maps and convolutions that stay behind the first of them are fitted alike, each drawn towards what
it was, and so take up what stand-ins, which have few weights, leave. Least squares, no gradient, no data but the original's
generations, and nothing that costs time when the model runs. Layer-wise reconstruction of this kind is common for channel
pruning (He et al., arXiv 1707.06168, eq. 1); fitting it to stand-ins of whole operators is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldpruner.fitting import Moments, Weights, pointwise_wanted, rows
from ldpruner.ldpruner_v1 import Pointwise, Shortcut, StandIn, channel_axis, resample
from ldpruner.operators.tracing import Call
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, within
from ldpruner.probes import Probe
from ldpruner.recovery.activations import Replay, fitting_calls, in_calling_order, outputs
from ldpruner.recovery.losses import guided
from ldpruner.surgery import Fitted, correction_of, kept_of, place, pruned_view, set_fitted, with_weights

log = logging.getLogger(__name__)

Pair = tuple[Tensor, Tensor]
ROWS = 16_384  # positions, at most, on which a map that stays is fitted
NOT_FITTED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")  # a softmax lies between: it gained nothing
INPUTS = 4096  # of an output of such a map, at most: their moments are a square matrix


@torch.no_grad()
def repair(
    pipeline: Pipeline,
    edits: Sequence[Edit],
    probe: Probe,
    *,
    fitted: Fitted,
    ridge: float = 3e-3,
    batch_size: int | None = None,
    calls: Sequence[Call] | None = None,
) -> Weights:
    """What the pruned model is to hold, see `surgery.Fitted`, fitted front to back; `fitted` is where pointwise maps start.

    `pipeline` is the original. All maps are drawn towards what they were, corrections towards none, by `ridge` times the mean
    second moment of what they are given. The activations are those of teacher-forced `calls`, by default those of
    `activations.fitting_calls`: the original's, put to both models. Where these are guided, what guidance makes of both halves
    is fitted beside them, see `Errors`. Costs a few passes over these calls, see `activations.Replay`, and a pass of the
    original for every gigabyte of its outputs.
    """
    teacher = pipeline.denoiser
    calls = calls or fitting_calls(pipeline, probe, batch_size=batch_size)
    errors = Errors(ridge=ridge, guidance_scale=pipeline.guidance_scale(probe) if calls[0].guided else None)
    student = pruned_view(teacher, edits, fitted)
    weights = {name: pair for name, pair in fitted.items() if name in pointwise_wanted(edits)}
    names, replay = fitted_in_order(student, edits, calls[0]), Replay(student, calls)
    wanted: dict[str, list[Tensor]] = {}
    for number, name in enumerate(names):
        if name not in wanted:
            wanted = outputs(teacher, names[number:], calls)
        made = wanted.pop(name)
        module = student.get_submodule(name)
        if made[0].ndim < 3 and (isinstance(module, Pointwise) or not isinstance(module, StandIn)):
            continue  # one row a sample, such as an embedding of the timestep: as many that differ as there are timesteps, too few
        if not isinstance(module, StandIn):
            if not torch.equal(next(replay.reach(name))[2], made[0]):  # else nothing before it has changed
                weights[kept_of(name)] = _fit_map(replay, name, module, made, errors)
                place(student, name, with_weights(module, *weights[kept_of(name)]))
            continue
        key = name if isinstance(module, Pointwise) else correction_of(name)
        weights[key] = _fit_stand_in(replay, name, module, made, errors, start=fitted.get(name))
        set_fitted(module, *weights[key])
    log.info("fitted %d maps front to back on %d calls of %d samples", len(weights), len(calls), calls[0].batch)
    return weights


def fitted_in_order(student: nn.Module, edits: Iterable[Edit], call: Call) -> list[str]:
    """The stand-ins that can be fitted, and the maps that stay behind the first of them, in the order in which they run."""
    replaced = [edit.operator for edit in edits]
    chosen = [edit.operator for edit in edits if edit.reason == "chosen"]
    maps = [
        name
        for name, module in student.named_modules()
        if _is_map(module)
        and name.rpartition(".")[2] not in NOT_FITTED
        and not any(within(name, operator) for operator in replaced)
    ]
    order = in_calling_order(student, [*chosen, *maps], call)
    first = min((order.index(name) for name in chosen if name in order), default=len(order))
    return [name for name in order[first:] if name in maps or _can_be_fitted(student.get_submodule(name))]


def _is_map(module: Any) -> bool:
    """Whether it is a linear map, or a convolution of pictures of all channels, with a bias."""
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    return isinstance(module, nn.Linear | nn.Conv2d) and isinstance(module.bias, Tensor)


def _can_be_fitted(stand_in: nn.Module) -> bool:
    assert isinstance(stand_in, StandIn)
    if isinstance(stand_in, Pointwise):
        return True
    if "correction" not in stand_in.options:
        return False
    return not isinstance(stand_in, Shortcut) or _is_map(stand_in.get_submodule(stand_in.options["child"]))


def _fit_stand_in(
    replay: Replay, name: str, stand_in: StandIn, wanted: Sequence[Tensor], errors: Errors, *, start: Pair | None
) -> Pair:
    """The pair of one stand-in, from what it is given in the student and what its operator made in the teacher."""
    if isinstance(stand_in, Shortcut):
        child, scale = stand_in.options["child"], stand_in.options["scale"]
        module = stand_in.get_submodule(child)
        return _fit_map(replay, f"{name}.{child}", module, [made / scale for made in wanted], errors)
    if isinstance(stand_in, Pointwise):
        assert start is not None
        moments = Moments.empty(stand_in.options["channels"])
        for (args, kwargs, _), made in zip(replay.reach(name), wanted, strict=True):
            given = resample(stand_in.pick(stand_in.options["source"], args, kwargs), stand_in.options["grid"])
            axis = channel_axis(made.ndim, stand_in.options)
            errors.add(moments, rows(given, axis), rows(made, axis))
        return moments.solve(errors.ridge, start[0])
    return _fit_channels(replay, name, wanted, errors, axis=channel_axis(wanted[0].ndim, stand_in.options))


def _fit_channels(replay: Replay, name: str, wanted: Sequence[Tensor], errors: Errors, *, axis: int) -> Pair:
    """The scale and shift of every channel of what a module makes."""
    sums = ChannelSums()
    for (_, _, output), made in zip(replay.reach(name), wanted, strict=True):
        errors.add(sums, rows(output, axis), rows(made, axis))
    return sums.solve(errors.ridge)


def _fit_map(replay: Replay, name: str, module: Any, wanted: Sequence[Tensor], errors: Errors) -> Pair:
    """The weight and bias of a map that stays, on some of the positions; a scale and shift of its outputs where they are few."""
    axis = 1 if isinstance(module, nn.Conv2d) else wanted[0].ndim - 1
    inputs, positions = module.weight[0].numel(), len(rows(wanted[0], axis)) * len(wanted)
    if inputs > min(positions, INPUTS):
        scale, shift = (values.to(module.weight.device) for values in _fit_channels(replay, name, wanted, errors, axis=axis))
        return torch.einsum("o...,o->o...", module.weight.float(), scale), module.bias.float() * scale + shift
    draw, moments = torch.Generator().manual_seed(0), Moments.empty([inputs, len(module.weight)])
    for (args, kwargs, _), made in zip(replay.reach(name), wanted, strict=True):
        given, answers = _patches(module, args[0] if args else kwargs["input"]), rows(made, axis)
        if positions > ROWS:
            some = errors.some(len(answers), ROWS / positions, draw).to(answers.device)
            given, answers = given[some], answers[some]
        errors.add(moments, given, answers)
    weight, bias = moments.solve(errors.ridge, module.weight.float().flatten(1))
    return weight.view(module.weight.shape), bias


def _patches(module: nn.Module, given: Tensor) -> Tensor:
    """What a map multiplies by its weight at every position: `(positions, inputs of one output)`, float32."""
    if isinstance(module, nn.Conv2d):
        kernel: Any = {name: getattr(module, name) for name in ("kernel_size", "dilation", "padding", "stride")}
        return F.unfold(given.float(), **kernel).mT.flatten(0, 1)
    return given.flatten(0, -2).float()


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Which squared errors of a map are made small: of what each sample is given, and of what guidance makes of both its halves.

    Classifier-free guidance (arXiv 2207.12598, equation 6 with g = 1 + w) answers g c - (g - 1) u, with prompts and without,
    and so makes much of errors in which the halves differ, which each alone does not tell apart. A map is linear, so the same
    combination of what it is given and of what is wanted is one more row to fit. It weighs 1 / (g^2 + (g - 1)^2): errors that
    know nothing of each other count alike in both.
    """

    ridge: float
    guidance_scale: float | None = None  # None: calls have no halves

    def add(self, sums: Moments | ChannelSums, given: Tensor, wanted: Tensor) -> None:
        """Take in rows `(positions, channels)` of both, those without prompts first."""
        sums.add(given, wanted)
        scale = self.guidance_scale
        if scale is not None and len(given) % 2 == 0:  # what is odd has no halves, such as one row for all samples
            (given_without, given_prompted), (without, prompted) = given.chunk(2), wanted.chunk(2)
            weight = 1 / (scale**2 + (scale - 1) ** 2)
            sums.add(guided(given_without, given_prompted, scale), guided(without, prompted, scale), weight)

    def some(self, count: int, share: float, draw: torch.Generator) -> Tensor:
        """Which of `count` rows to take, `(count,)`; the same of both halves."""
        if self.guidance_scale is None or count % 2:
            return torch.rand(count, generator=draw).lt(share)
        return torch.rand(count // 2, generator=draw).lt(share).repeat(2)


@dataclass
class ChannelSums:
    """Sums per channel, over every position seen, of what a stand-in gives, of what is wanted, and of their products."""

    count: float = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, given: Tensor, wanted: Tensor, weight: float = 1.0) -> None:
        """Take in rows `(positions, channels)` of both, whose squared errors count `weight` times."""
        x, y = given.double(), wanted.double()
        new = {"x": x, "y": y, "xx": x * x, "xy": x * y}
        self.count += weight * len(x)
        self.sums = {name: self.sums.get(name, 0.0) + weight * values.sum(0).cpu() for name, values in new.items()}

    def solve(self, ridge: float) -> Pair:
        """The scale `(channels,)`, drawn towards 1, and shift of the least squared error; float32."""
        x, y = self.sums["x"] / self.count, self.sums["y"] / self.count
        variance = self.sums["xx"] / self.count - x * x
        covariance = self.sums["xy"] / self.count - x * y
        penalty = variance.mean().clamp(min=0) * ridge + torch.finfo(torch.float64).tiny
        scale = (covariance + penalty) / (variance.clamp(min=0) + penalty)
        return scale.float(), (y - scale * x).float()
