"""Autoencoders of the zoo: what `zoo:emoji` and `zoo:digits` share, and what is done with that of `zoo:fashion` too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldpruner.datasets import signed
from ldpruner.operators.tracing import weights_digest
from ldpruner.zoo.training import Training, draw, train

Autoencoder: TypeAlias = AutoencoderKL | VQModel

KL_WEIGHT = 1e-6  # as in latent diffusion (Rombach et al., arXiv 2112.10752, section G)


def new_autoencoder(channels: int) -> AutoencoderKL:
    """An untrained autoencoder, `(n, channels, 64, 64)` to `(n, 8, 8, 8)` and back."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def train_autoencoder(images: Tensor, training: Training, folder: Path) -> AutoencoderKL:
    """Learn to squeeze uint8 pictures `(n, channels, 64, 64)` into latents, by squared and absolute error and a weak KL term."""

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        assert isinstance(module, AutoencoderKL)
        batch = signed(images[draw(len(images), training.batch_size, generator)])
        posterior = module.encode(batch).latent_dist
        decoded = module.decode(posterior.sample(generator)).sample
        error: Tensor = F.mse_loss(decoded, batch) + 0.5 * F.l1_loss(decoded, batch) + KL_WEIGHT * posterior.kl().mean()
        return error

    torch.manual_seed(training.seed)
    autoencoder = train(new_autoencoder(images.shape[1]), loss, training, folder)
    assert isinstance(autoencoder, AutoencoderKL)
    autoencoder.register_to_config(scaling_factor=float(1 / encode(autoencoder, images[:2000]).std()))
    return autoencoder


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Latents `(n, c, h, w)` of uint8 pictures, before scaling and quantising; of a distribution its mode."""
    parts = tqdm(torch.split(images, 100), desc="latents", mininterval=5, leave=False)
    return torch.cat([_latents(autoencoder.encode(signed(part))) for part in parts])


def _latents(encoded: Any) -> Tensor:
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents


def kept_latents(autoencoder: Autoencoder, images: Tensor, path: Path, captions: Sequence[str] = ()) -> Tensor:
    """The scaled latents of all pictures, computed once and kept in `path` for these weights and this many pictures.

    With their captions the file is one that `ldpruner distil --data` takes.
    """
    made_by = {"autoencoder": weights_digest(autoencoder), "pictures": str(len(images))}
    made_by |= {"prompts": json.dumps(list(captions))} if captions else {}
    if path.exists():
        with safe_open(path, framework="pt") as stored:
            if stored.metadata() == made_by:
                latents: Tensor = stored.get_tensor("latents")
                return latents
    latents = (encode(autoencoder, images) * autoencoder.config["scaling_factor"]).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    save_file({"latents": latents}, scratch, made_by)
    scratch.replace(path)
    return latents


@torch.inference_mode()
def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """uint8 pictures through the encoder and the decoder, uint8 again."""
    parts = [autoencoder(signed(part)).sample for part in torch.split(images, 50)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
