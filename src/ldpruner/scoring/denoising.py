"""The loss that a denoiser was trained on, asked again with its own generations as the clean data: no data set is needed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldpruner.errors import PipelineError
from ldpruner.operators.tracing import Call
from ldpruner.operators.watching import tensors_in
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.trajectories import recording


@dataclass(frozen=True, kw_only=True)
class Question:
    """Noised latents put to the denoiser, and what it should answer."""

    call: Call
    target: Tensor
    share: float  # of all samples, so that the losses of a timestep's batches add up to their mean

    def loss(self, denoiser: nn.Module) -> Tensor:
        """share x mean((answer - target)^2); channels beyond the target's, a learned variance, are left out."""
        answer = tensors_in(self.call.run(denoiser))[0][:, : self.target.shape[1]]
        return F.mse_loss(answer.float(), self.target.float()) * self.share


def questions(pipeline: Pipeline, probe: Probe, *, timesteps: int, batch_size: int | None) -> Iterator[list[Question]]:
    """For each of `timesteps` timesteps, spread by the scheduler as for a generation, one question per batch of samples.

    Clean data are the latents that the probe generates; prompts and all else come from the calls of that generation, and
    under guidance all rows count. Costs `samples x steps` denoiser passes. Raises `PipelineError` where the scheduler
    cannot add noise, or the denoiser is given more than latents, a timestep and conditions.
    """
    size = batch_size or probe.samples
    _check_scheduler(pipeline)
    with recording(pipeline.denoiser) as calls:
        clean = torch.split(pipeline.latents(probe, batch_size=size), size)
    first_calls = [calls[batch * (len(calls) // len(clean))] for batch in range(len(clean))]
    noise = torch.split(_noise(probe, torch.cat(clean)), size)
    for number in range(len(_timesteps(pipeline, timesteps)[1])):
        batches = zip(first_calls, clean, noise, strict=True)
        yield [_question(pipeline, *batch, probe=probe, number=number, timesteps=timesteps) for batch in batches]


def _question(
    pipeline: Pipeline, call: Call, clean: Tensor, noise: Tensor, *, probe: Probe, number: int, timesteps: int
) -> Question:
    scheduler, times = _timesteps(pipeline, timesteps)  # a fresh one: some count the steps that they scale
    time = times[number].to(clean.device)
    every = time.repeat(len(clean))
    noisy = scheduler.scale_model_input(scheduler.add_noise(clean, noise, every), time)
    asked, copies = _with_sample(pipeline, call, noisy, time)
    target = torch.cat([_target(scheduler, clean, noise, every)] * copies)
    return Question(call=asked, target=target, share=len(clean) / probe.samples)


def _target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    prediction = _prediction(scheduler)
    if prediction == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(clean, noise, timesteps)
        return velocity
    return noise if prediction == "epsilon" else clean


def _timesteps(pipeline: Pipeline, count: int) -> tuple[Any, list[Tensor]]:
    scheduler = copy.deepcopy(pipeline.pipe.scheduler)
    scheduler.set_timesteps(count)
    different = {float(time): time for time in scheduler.timesteps}  # multistep schedulers name some twice
    return scheduler, list(different.values())


def _prediction(scheduler: Any) -> str:
    return str(scheduler.config.get("prediction_type", "epsilon"))


def _check_scheduler(pipeline: Pipeline) -> None:
    scheduler = pipeline.pipe.scheduler
    prediction, kind = _prediction(scheduler), type(scheduler).__name__
    wants = {"epsilon": ["add_noise"], "sample": ["add_noise"], "v_prediction": ["add_noise", "get_velocity"]}
    if prediction not in wants:
        raise PipelineError(f"{pipeline.source}: no loss is known for prediction type {prediction!r}; known: {', '.join(wants)}.")
    lacking = [name for name in wants[prediction] if not hasattr(scheduler, name)]
    if lacking:
        raise PipelineError(
            f"{pipeline.source}: {kind} has no {' and no '.join(lacking)}, so there is no denoising loss to differentiate. "
            "Use a method that needs none, such as output-mse."
        )


def _noise(probe: Probe, like: Tensor) -> Tensor:
    """Sample i's noise has a seed of its own, whatever the batch size, and other than those that generations start from."""
    seeds = (probe.seed + probe.samples + row for row in range(probe.samples))
    rows = [torch.randn(like.shape[1:], generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device=like.device, dtype=like.dtype)


def _with_sample(pipeline: Pipeline, call: Call, sample: Tensor, time: Tensor) -> tuple[Call, int]:
    """The call with another sample and timestep, and how often the sample stands in it: guidance repeats it."""
    denoiser = type(pipeline.denoiser).__name__
    given = inspect.signature(pipeline.denoiser.forward).bind(*call.args, **call.kwargs).arguments
    name = next((name for name in ("sample", "hidden_states") if name in given), None)
    if name is None or "timestep" not in given:
        raise PipelineError(f"{pipeline.source}: {denoiser} takes no sample and timestep, so its loss is not known here.")
    copies = len(given[name]) // len(sample)
    repeated = torch.cat([sample] * copies).to(given[name].dtype)
    if repeated.shape != given[name].shape:
        shapes = f"{tuple(given[name].shape)} where the latents are {tuple(sample.shape)}"
        raise PipelineError(f"{pipeline.source}: {denoiser} is given more than latents ({shapes}), so its loss is not known here.")
    old = given["timestep"]
    moment = torch.full_like(old, time.item()) if isinstance(old, Tensor) else type(old)(time.item())
    return _with(call, list(given), {name: repeated, "timestep": moment}), copies


def _with(call: Call, names: list[str], changes: dict[str, Any]) -> Call:
    """The call with other values of arguments, each where it was: by position or by keyword."""
    args = tuple(changes.get(name, value) for name, value in zip(names, call.args, strict=False))
    return Call(args, call.kwargs | {name: value for name, value in changes.items() if name in call.kwargs})
