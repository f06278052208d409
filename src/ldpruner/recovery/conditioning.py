"""Calling a denoiser as its pipeline calls it: what stays, what is noise, what is time, and what the prompts decide.

Nothing here knows a class of denoiser. One generation of one sample and one of two are stopped at the denoiser's first
call: what grew with the samples, and is neither the latents nor the timestep, is conditioning.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ldpruner.errors import PipelineError
from ldpruner.operators.tracing import Call, weights_digest
from ldpruner.operators.watching import tensors_in
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.recovery.rows import Maker, Named, Rows, key_of

NO_PROMPT = ""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The arguments of a denoiser call, with places for noisy latents, timesteps and conditioning."""

    leaves: tuple[Any, ...]
    spec: TreeSpec
    sample: int  # places among the leaves
    timestep: int
    conditions: tuple[int, ...]
    time_scale: float  # what the denoiser is told, per unit of the scheduler's timestep
    sample_shape: tuple[int, ...]  # of one sample

    @classmethod
    def of(cls, pipeline: Pipeline) -> Caller:
        """Watch a pipeline call its denoiser. Raises `PipelineError` where its arguments cannot be told apart."""
        single, double = (_recorded(pipeline, [NO_PROMPT] * samples) for samples in (1, 2))
        leaves, spec = tree_flatten((single.args, single.kwargs))
        others = tree_flatten((double.args, double.kwargs))[0]
        sample, timestep = (_place(leaves, tensor) for tensor in _sample_and_timestep(pipeline, single))
        if leaves[sample].shape[0] != 1 or len(leaves) != len(others):
            raise PipelineError(
                f"{pipeline.source}: calls its denoiser in a way that is not understood: no single batch of latents."
            )
        grown = tuple(place for place, (one, two) in enumerate(zip(leaves, others, strict=True)) if _grew(one, two))
        first = float(pipeline.pipe.scheduler.timesteps[0])
        return cls(
            leaves=tuple(leaves),
            spec=spec,
            sample=sample,
            timestep=timestep,
            conditions=tuple(place for place in grown if place not in (sample, timestep)),
            time_scale=float(leaves[timestep].flatten()[0]) / first if first else 1.0,
            sample_shape=tuple(leaves[sample].shape[1:]),
        )

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Named) -> Call:
        """The call for latents `(n, ...)` at the scheduler's timesteps `(n,)`."""
        leaves = list(self.leaves)
        leaves[self.sample] = noisy.to(self.leaves[self.sample].dtype)
        leaves[self.timestep] = (timesteps * self.time_scale).to(self.leaves[self.timestep].dtype)
        for place in self.conditions:
            leaves[place] = conditions[str(place)].to(self.leaves[place].dtype)
        args, kwargs = tree_unflatten(leaves, self.spec)
        return Call(args, kwargs)

    def to(self, device: torch.device) -> Caller:
        """The same with what stays on `device`."""
        leaves = tuple(leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves)
        return replace(self, leaves=leaves)

    def conditioning(self, pipeline: Pipeline, prompts: Sequence[str]) -> Named:
        """What the pipeline makes of prompts, `(n, ...)` each, under the names that `call` takes."""
        call = _recorded(pipeline, prompts)
        leaves = tree_flatten((call.args, call.kwargs))[0]
        return {str(place): leaves[place] for place in self.conditions}


def first_tensor(output: Any) -> Tensor:
    """What a denoiser or block gives: a tensor, or the first of its tuple or mapping."""
    return tensors_in(output)[0]


def kept_conditions(caller: Caller, pipeline: Pipeline, prompts: Sequence[str], *, maker: Maker) -> Rows:
    """The conditioning of every prompt, computed once by the pipeline and kept in `work`."""
    if not caller.conditions:
        return Rows(parts=[{}], size=1, count=0)
    others = {
        name: weights_digest(part)
        for name, part in pipeline.pipe.components.items()
        if isinstance(part, nn.Module) and part is not pipeline.denoiser
    }
    key = key_of(others, list(prompts), type(pipeline.pipe).__name__, str(pipeline.pipe.config))
    try:
        made = maker.rows(
            f"conditions/{key}",
            len(prompts),
            lambda rows: caller.conditioning(pipeline, [prompts[row] for row in rows]),
            what="conditioning",
        )
        shapes = {tuple((name, tensor.shape[1:]) for name, tensor in part.items()) for part in made.parts}
    except RuntimeError as error:  # from torch.cat
        raise _ragged(pipeline) from error
    if len(shapes) > 1:
        raise _ragged(pipeline)
    return made


def _ragged(pipeline: Pipeline) -> PipelineError:
    return PipelineError(f"{pipeline.source}: makes conditioning of another length for every prompt, which cannot be batched.")


def _recorded(pipeline: Pipeline, prompts: Sequence[str]) -> Call:
    """The denoiser's first call in a generation without guidance."""
    probe = pipeline.completed(Probe(samples=len(prompts), num_inference_steps=2))
    guided = _accepts(pipeline, "guidance_scale")
    probe = Probe(
        samples=len(prompts),
        num_inference_steps=2,
        prompts=tuple(prompts) if probe.prompts else (),
        guidance_scale=1.0 if guided else None,
    )
    return pipeline.call(probe, samples=len(prompts))


def _accepts(pipeline: Pipeline, argument: str) -> bool:
    return argument in inspect.signature(pipeline.pipe.__call__).parameters


def _sample_and_timestep(pipeline: Pipeline, call: Call) -> tuple[Tensor, Tensor]:
    """The first tensor argument, and the one that is called `timestep`, else the second."""
    bound = inspect.signature(pipeline.denoiser.forward).bind(*call.args, **call.kwargs).arguments
    tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
    if len(tensors) < 2:
        raise PipelineError(f"{pipeline.source}: calls its denoiser without a timestep, so there is nothing to distil.")
    sample, second = list(tensors.values())[:2]
    return sample, tensors.get("timestep", second)


def _place(leaves: Sequence[Any], tensor: Tensor) -> int:
    return next(place for place, leaf in enumerate(leaves) if leaf is tensor)


def _grew(one: Any, two: Any) -> bool:
    """Whether a tensor's first dimension went from one sample to two."""
    if not (isinstance(one, Tensor) and isinstance(two, Tensor)) or not one.ndim or one.ndim != two.ndim:
        return False
    return one.shape[0] * 2 == two.shape[0] and one.shape[1:] == two.shape[1:]
