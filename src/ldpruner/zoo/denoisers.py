"""What the denoisers of the zoo share: the scheduler, and the loss by which they learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from ldpruner.zoo.training import Training, draw, train


def new_scheduler() -> DDIMScheduler:
    """Deterministic sampling in few steps: zero terminal signal and trailing steps (Lin et al., arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # Stable Diffusion's pipeline insists; trailing steps do not use it
    )


def velocity_error(
    predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, scheduler: DDIMScheduler, generator: torch.Generator
) -> Tensor:
    """The squared error of a predicted velocity v = sqrt(abar) noise - sqrt(1 - abar) latents at uniformly drawn timesteps.

    `predict` takes noisy latents and timesteps (Salimans and Ho, arXiv 2202.00512).
    """
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    predicted = predict(scheduler.add_noise(clean, noise, timesteps), timesteps)
    return F.mse_loss(predicted, scheduler.get_velocity(clean, noise, timesteps))


def train_unconditional(denoiser: Callable[[], UNet2DModel], latents: Tensor, training: Training, folder: Path) -> UNet2DModel:
    """Learn to predict the velocity of noisy latents, with a network that `denoiser` makes."""
    scheduler = new_scheduler()

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        clean = latents[draw(len(latents), training.batch_size, generator)]
        return velocity_error(lambda noisy, times: module(noisy, times).sample, clean, scheduler, generator)

    torch.manual_seed(training.seed)
    trained = train(denoiser(), loss, training, folder)
    assert isinstance(trained, UNet2DModel)
    return trained
