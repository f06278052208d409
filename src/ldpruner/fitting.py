"""Weights of pointwise stand-ins: ridge regression of an operator's output on its input, over generated latents."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldpruner.ldpruner_v1 import StandIn, channel_axis, resample
from ldpruner.operators.timing import device_of
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe

log = logging.getLogger(__name__)

Options = Mapping[str, Any]
Weights = dict[str, tuple[Tensor, Tensor]]
TRAJECTORIES = (7, 11, 13, 17)  # their steps: 45 timesteps without a common grid
SAMPLES = 8  # of each, at most, while operators stand alone
MOMENT_BYTES = 256 * 2**20  # operators are fitted in groups, so that the sums of one group stay below this


def fit_pointwise(
    pipeline: Pipeline, wanted: Mapping[str, Options], probe: Probe, *, ridge: float = 1e-4, batch_size: int | None = None
) -> Weights:
    """The weight `(out, in)` and bias `(out,)` that map each operator's input to its output with the least squared error.

    `wanted` gives operators with the options of their pointwise stand-ins. The activations are those of the original on
    `trajectories(probe)`. `ridge` is relative to the mean second moment of the inputs; the bias is not shrunk.
    """
    probe = pipeline.varied(probe)
    weights: Weights = {}
    for group in _groups(wanted, room(device_of(pipeline.denoiser))):
        moments = {name: Moments.empty(options["channels"]) for name, options in group.items()}
        with ExitStack() as stack:
            for name, options in group.items():
                hook = pipeline.denoiser.get_submodule(name).register_forward_hook(_watch(moments[name], options), with_kwargs=True)
                stack.callback(hook.remove)
            for trajectory in trajectories(probe, min(probe.samples, SAMPLES)):
                pipeline.latents(trajectory, batch_size=batch_size)
        weights |= {name: moment.solve(ridge) for name, moment in moments.items()}
        log.info("fitted %d of %d pointwise stand-ins", len(weights), len(wanted))
    return weights


def trajectories(probe: Probe, samples: int) -> Iterator[Probe]:
    """What stand-ins are fitted on: other noise, and mostly other timesteps, than those on which the probe scores them.

    An operator of the timestep alone, such as a time embedding, gives one row for each timestep: fitted at the few that
    the probe passes, it would be exact there, score nothing, and be wrong for every other number of steps.
    """
    for number, steps in enumerate(TRAJECTORIES):
        turned = number * samples % max(1, len(probe.prompts))
        yield replace(
            probe,
            samples=samples,
            num_inference_steps=steps,
            seed=probe.seed + probe.samples + number * samples,
            prompts=probe.prompts[turned:] + probe.prompts[:turned],
        )


@dataclass
class Moments:
    """Sums over every position seen: inputs with a one appended, against themselves and against outputs; where these are."""

    inputs: Tensor  # (in + 1, in + 1)
    crossed: Tensor  # (in + 1, out)

    @classmethod
    def empty(cls, channels: list[int]) -> Moments:
        width, out = channels[0] + 1, channels[1]
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, out, dtype=torch.float64))

    def add(self, given: Tensor, made: Tensor, weight: float = 1.0) -> None:
        """Take in rows `(positions, in)` and `(positions, out)`, whose squared errors count `weight` times."""
        rows = torch.cat([given, given.new_ones(len(given), 1)], dim=1)
        self.inputs, self.crossed = self.inputs.to(rows.device), self.crossed.to(rows.device)
        self.inputs += weight * (rows.T @ rows).double()
        self.crossed += weight * (rows.T @ made).double()

    def solve(self, ridge: float, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ridge regression towards `prior` `(out, in)`, zero by default: (X^T X + r I) W = X^T Y + r P."""
        penalty = self.inputs.diagonal()[:-1].mean() * ridge + torch.finfo(torch.float64).tiny
        damped, wanted = self.inputs.clone(), self.crossed.clone()
        damped.diagonal()[:-1] += penalty
        if prior is not None:
            wanted[:-1] += penalty * prior.T.to(wanted)
        factor, singular = torch.linalg.cholesky_ex(damped)
        if singular:
            solution = torch.linalg.lstsq(damped.cpu(), wanted.cpu(), driver="gelsd").solution
        else:
            solution = torch.cholesky_solve(wanted, factor)
        solution = solution.float().cpu()
        return solution[:-1].T.contiguous(), solution[-1].contiguous()


def _watch(moments: Moments, options: Options) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = resample(StandIn.pick(options["source"], args, kwargs), options["grid"])
        axis = channel_axis(output.ndim, dict(options))
        moments.add(rows(given, axis), rows(output, axis))

    return hook


def rows(tensor: Tensor, axis: int) -> Tensor:
    """Every position of a tensor as a row of its channels, those of dimension `axis`: `(positions, channels)`, float32."""
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis]).float()


def room(device: torch.device) -> float:
    """Bytes that the sums of one group may take: `MOMENT_BYTES`, or a quarter of a GPU's free memory where that is more."""
    return max(MOMENT_BYTES, torch.cuda.mem_get_info(device)[0] / 4) if device.type == "cuda" else MOMENT_BYTES


def _groups(wanted: Mapping[str, Options], most: float) -> Iterator[dict[str, Options]]:
    group: dict[str, Options] = {}
    size = 0
    for name, options in wanted.items():
        width, out = options["channels"][0] + 1, options["channels"][1]
        needed = 8 * width * (width + out)
        if group and size + needed > most:
            yield group
            group, size = {}, 0
        group[name] = options
        size += needed
    if group:
        yield group


def blank(edits: Iterable[Any]) -> Weights:
    """Zeros for every pointwise map among edits: how fast it is does not hang on what it holds."""
    shapes = {name: options["channels"] for name, options in pointwise_wanted(edits).items()}
    return {name: (torch.zeros(out, given), torch.zeros(out)) for name, (given, out) in shapes.items()}


def pointwise_wanted(edits: Iterable[Any]) -> dict[str, Options]:
    """The operators, with options, that need fitted weights among edits."""
    return {edit.operator: edit.options for edit in edits if edit.replacement == "pointwise"}
