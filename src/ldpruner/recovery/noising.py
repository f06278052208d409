"""The noise that a denoiser was trained to remove: how latents are made noisy, and what it should answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ldpruner.errors import PipelineError
from ldpruner.pipelines import Pipeline

_KINDS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, kw_only=True)
class Noising:
    """noisy = signal clean + noise_level noise at each training timestep, and the target that goes with it."""

    kind: str  # epsilon, v_prediction, sample, or flow
    timesteps: Tensor  # (T,), what the scheduler calls each
    signal: Tensor  # (T,)
    noise_level: Tensor  # (T,)

    @classmethod
    def of(cls, pipeline: Pipeline) -> Noising:
        """The process behind a pipeline's scheduler, whichever sampler it is. Raises `PipelineError` for an unknown one."""
        scheduler = pipeline.pipe.scheduler
        if hasattr(scheduler, "scale_noise"):  # flow matching (arXiv 2210.02747): a straight line from latents to noise
            fresh = type(scheduler).from_config(scheduler.config)  # sampling has moved the timesteps of the pipeline's own
            sigmas = fresh.sigmas[: len(fresh.timesteps)].float()
            return cls(kind="flow", timesteps=fresh.timesteps.float(), signal=1 - sigmas, noise_level=sigmas)
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in _KINDS or "beta_start" not in scheduler.config:
            raise PipelineError(
                f"{pipeline.source}: {type(scheduler).__name__} predicts {kind!r} on a schedule that is not known here. "
                f"Known: {', '.join(_KINDS)} with betas, and flow matching."
            )
        # Samplers of one schedule differ in how they step (Euler's even in scale), not in what the denoiser was trained on.
        alphas = DDPMScheduler.from_config(dict(scheduler.config)).alphas_cumprod
        return cls(kind=kind, timesteps=torch.arange(len(alphas)), signal=alphas.sqrt(), noise_level=(1 - alphas).sqrt())

    def __len__(self) -> int:
        return len(self.timesteps)

    def noisy(self, clean: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """Latents `(n, ...)` made noisy, each at its training timestep `at` `(n,)`."""
        return _along(self.signal, at, clean) * clean + _along(self.noise_level, at, clean) * noise

    def target(self, clean: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """What a perfect denoiser answers; the velocity is signal noise - noise_level clean (arXiv 2202.00512, appendix D)."""
        if self.kind == "epsilon":
            return noise
        if self.kind == "sample":
            return clean
        if self.kind == "flow":
            return noise - clean
        return _along(self.signal, at, clean) * noise - _along(self.noise_level, at, clean) * clean

    def check_same(self, other: Noising, sources: tuple[str, str]) -> None:
        """Raise `PipelineError` where two pipelines answer different questions: their outputs cannot be compared."""
        if self.kind != other.kind or len(self) != len(other) or not torch.allclose(self.signal, other.signal, atol=1e-5):
            raise PipelineError(
                f"{sources[0]} predicts {self.kind} and {sources[1]} {other.kind}, or on another noise schedule: "
                "a student learns from a teacher of its own scheduler settings."
            )

    def to(self, device: Any) -> Noising:
        moved = {name: getattr(self, name).to(device) for name in ("timesteps", "signal", "noise_level")}
        return replace(self, **moved)


def _along(values: Tensor, at: Tensor, like: Tensor) -> Tensor:
    return values[at].to(like.dtype).view(-1, *(1,) * (like.ndim - 1))
