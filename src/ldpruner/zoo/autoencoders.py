"""The autoencoder that `zoo:emoji` and `zoo:digits` share: 64x64 pictures to 8x8 latents of 8 channels and back."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldpruner.zoo.training import Training, draw, train

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
        batch = floats(images[draw(len(images), training.batch_size, generator)])
        posterior = module.encode(batch).latent_dist
        decoded = module.decode(posterior.sample(generator)).sample
        error: Tensor = F.mse_loss(decoded, batch) + 0.5 * F.l1_loss(decoded, batch) + KL_WEIGHT * posterior.kl().mean()
        return error

    torch.manual_seed(training.seed)
    autoencoder = train(new_autoencoder(images.shape[1]), loss, training, folder)
    assert isinstance(autoencoder, AutoencoderKL)
    autoencoder.register_to_config(scaling_factor=float(1 / encode(autoencoder, images[:2000]).std()))
    return autoencoder


def floats(images: Tensor) -> Tensor:
    """uint8 pictures scaled to [-1, 1], as diffusers autoencoders take them."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """The modes of the latents of uint8 pictures, `(n, 8, 8, 8)`, before scaling."""
    parts = tqdm(torch.split(images, 100), desc="latents", mininterval=5, leave=False)
    return torch.cat([autoencoder.encode(floats(part)).latent_dist.mode() for part in parts])


def kept_latents(autoencoder: AutoencoderKL, images: Tensor, path: Path) -> Tensor:
    """The scaled latents of all pictures, computed once and kept in `path`."""
    if not path.exists():
        save_file({"latents": (encode(autoencoder, images) * autoencoder.config["scaling_factor"]).contiguous()}, path)
    return load_file(path)["latents"]


@torch.inference_mode()
def reconstruct(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 pictures through the encoder and the decoder, uint8 again."""
    parts = [autoencoder.decode(autoencoder.encode(floats(part)).latent_dist.mode()).sample for part in torch.split(images, 50)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
