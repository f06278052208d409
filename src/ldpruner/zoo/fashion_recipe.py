"""`zoo:fashion`: latent diffusion of grey 32x32 garments, trained from nothing on a CPU.

Three networks, each in a folder of its own with checkpoints and a loss log: a judge (classifier), a vector-quantised
autoencoder (32x32 pictures to 8x8x4 latents), and a denoiser trained on the latents by v-prediction
(Salimans and Ho, arXiv 2202.00512). What diffusers' `LDMPipeline` loads is put together from the last two.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldpruner.benchmarking import environment
from ldpruner.evaluation.frechet import frechet_distance
from ldpruner.files import staged_folder, write_json, write_text
from ldpruner.operators import discover
from ldpruner.pipelines import load
from ldpruner.probes import Probe
from ldpruner.reporting import grid
from ldpruner.zoo.data import Pictures, load_pictures
from ldpruner.zoo.judges import GreyClassifier, accuracy, judge_features, load_judge, save_judge
from ldpruner.zoo.training import Training, train


@dataclass(frozen=True, kw_only=True)
class FashionRecipe:
    """How long each network of `zoo:fashion` trains; the defaults made the weights that ship."""

    autoencoder: Training = field(default_factory=lambda: Training(steps=2400, batch_size=32, learning_rate=1e-3, ema_decay=0.995))
    denoiser: Training = field(default_factory=lambda: Training(steps=4000, batch_size=64, learning_rate=5e-4, ema_decay=0.999))
    judge: Training = field(default_factory=lambda: Training(steps=1500, batch_size=128, learning_rate=3e-3, ema_decay=0.99))
    codebook_from: float = 0.25  # the share of the autoencoder's steps that run before latents are quantised
    judged_samples: int = 2000
    judged_steps: int = 20


REDUCED = FashionRecipe(
    autoencoder=Training(steps=6, batch_size=8, checkpoint_every=4),
    denoiser=Training(steps=4, batch_size=4, checkpoint_every=2),
    judge=Training(steps=4, batch_size=16, checkpoint_every=2),
    judged_samples=150,
    judged_steps=1,
)


def new_autoencoder() -> VQModel:
    """An untrained autoencoder, `(n, 1, 32, 32)` to `(n, 4, 8, 8)` and back, with 2048 codes of 4 numbers."""
    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
        num_vq_embeddings=2048,
        norm_num_groups=8,
        vq_embed_dim=4,
    )


def new_denoiser() -> UNet2DModel:
    """An untrained denoiser of `(n, 4, 8, 8)` latents with self-attention at 8x8 and 4x4."""
    return UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        attention_head_dim=32,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    )


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
    )


def train_autoencoder(pictures: Pictures, recipe: FashionRecipe, folder: Path) -> VQModel:
    """Learn to squeeze pictures into latents; the codebook starts from latents of the data, so that no code lies idle."""
    training = recipe.autoencoder
    quantize_from = int(training.steps * recipe.codebook_from)

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        assert isinstance(module, VQModel)
        images = pictures.floats(_draw(len(pictures.images), training.batch_size, generator))
        latents = module.encode(images).latents
        if step == quantize_from:
            _fill_codebook(module, pictures, generator)
        decoded = module.decode(latents, force_not_quantize=step < quantize_from)
        leash = 1e-3 * latents.square().mean() if step < quantize_from else decoded.commit_loss.mean()
        error: Tensor = F.mse_loss(decoded.sample, images) + 0.2 * F.l1_loss(decoded.sample, images) + leash
        return error

    torch.manual_seed(training.seed)
    autoencoder = train(new_autoencoder(), loss, training, folder)
    assert isinstance(autoencoder, VQModel)
    autoencoder.register_to_config(scaling_factor=float(1 / encode(autoencoder, pictures.floats(slice(0, 4000))).std()))
    return autoencoder


@torch.no_grad()
def _fill_codebook(autoencoder: VQModel, pictures: Pictures, generator: torch.Generator) -> None:
    codes = autoencoder.quantize.embedding.weight
    images = pictures.floats(_draw(len(pictures.images), 512, generator))
    vectors = encode(autoencoder, images).permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
    codes.copy_(vectors[_draw(len(vectors), len(codes), generator)])


@torch.no_grad()
def encode(autoencoder: VQModel, images: Tensor) -> Tensor:
    """Latents `(n, 4, 8, 8)` of pictures, before scaling and quantising."""
    return torch.cat([autoencoder.encode(part).latents for part in torch.split(images, 250)])


def training_latents(autoencoder: VQModel, pictures: Pictures, path: Path) -> Tensor:
    """The scaled latents of all pictures, computed once and kept in `path`."""
    if not path.exists():
        parts = tqdm(torch.split(torch.arange(len(pictures.images)), 1000), desc="latents", mininterval=5)
        latents = torch.cat([encode(autoencoder, pictures.floats(rows)) for rows in parts])
        save_file({"latents": (latents * autoencoder.config["scaling_factor"]).contiguous()}, path)
    return load_file(path)["latents"]


def train_denoiser(latents: Tensor, training: Training, folder: Path) -> UNet2DModel:
    """Learn to predict the velocity v = sqrt(abar) noise - sqrt(1 - abar) latents at uniformly drawn timesteps."""
    scheduler = new_scheduler()

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        clean = latents[_draw(len(latents), training.batch_size, generator)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(clean),), generator=generator)
        predicted = module(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        return F.mse_loss(predicted, scheduler.get_velocity(clean, noise, timesteps))

    torch.manual_seed(training.seed)
    denoiser = train(new_denoiser(), loss, training, folder)
    assert isinstance(denoiser, UNet2DModel)
    return denoiser


def train_judge(pictures: Pictures, training: Training, folder: Path) -> GreyClassifier:
    """Learn to tell the classes apart, from pictures shifted by up to 2 pixels."""

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        rows = _draw(len(pictures.images), training.batch_size, generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        images = pictures.floats(rows).roll(shift, (2, 3))
        return F.cross_entropy(module(images), pictures.labels[rows], label_smoothing=0.05)

    torch.manual_seed(training.seed)
    judge = train(GreyClassifier(int(pictures.labels.max()) + 1), loss, training, folder)
    assert isinstance(judge, GreyClassifier)
    return judge


def _draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, count, (size,), generator=generator)


def make(data: Path, out: Path, work: Path, recipe: FashionRecipe) -> dict[str, Any]:
    """Train every network, write the pipeline, its judge and its card to `out`, and return what was measured.

    Each network goes on from its checkpoint in `work` where there is one. Raises `DataError` for data that cannot be read.
    """
    pictures, unseen = load_pictures(data, "train"), load_pictures(data, "test")
    autoencoder = train_autoencoder(pictures, recipe, work / "autoencoder")
    latents = training_latents(autoencoder, pictures, work / "latents.safetensors")
    denoiser = train_denoiser(latents, recipe.denoiser, work / "denoiser")
    judge = train_judge(pictures, recipe.judge, work / "judge")
    with staged_folder(out) as scratch:
        LDMPipeline(vqvae=autoencoder.half(), unet=denoiser.half(), scheduler=new_scheduler()).save_pretrained(scratch)
        save_judge(judge, scratch / "judge" / "judge.safetensors")
        figures = measure(scratch, pictures, unseen, recipe)
        write_json(scratch / "figures.json", figures)
        write_text(scratch / "README.md", card(figures))
    return figures


@torch.inference_mode()
def measure(folder: Path, pictures: Pictures, unseen: Pictures, recipe: FashionRecipe) -> dict[str, Any]:
    """The judge's figures on a pipeline folder as it was saved, and a sheet of samples beside it.

    Fréchet distances are to the test pictures, in the judge's 128 features: of samples, of the autoencoder's
    reconstructions of as many test pictures, and of as many training pictures, which is the floor.
    """
    judge = load_judge(folder / "judge" / "judge.safetensors")
    pipeline = load(folder)
    real = judge_features(judge, (unseen.floats(rows) for rows in torch.split(torch.arange(len(unseen.images)), 500)))
    probe = Probe(samples=recipe.judged_samples, num_inference_steps=recipe.judged_steps, seed=1000)
    generated = pipeline.images(probe, batch_size=100)
    grid([generated[first : first + 16] for first in range(0, min(64, len(generated)), 16)], side=48).save(folder / "samples.png")
    samples = torch.from_numpy(np.stack([np.asarray(picture.convert("L")) for picture in generated])).unsqueeze(1)
    compared = {
        "samples": Pictures(images=samples, labels=torch.zeros(len(samples))).floats(),
        "reconstructions": reconstruct(pipeline.pipe.vqvae, unseen.floats(slice(0, len(samples)))),
        "training pictures": pictures.floats(slice(0, len(samples))),
    }
    features = {name: judge_features(judge, iter(torch.split(images, 250))) for name, images in compared.items()}
    classes = judge(compared["samples"]).argmax(1).bincount(minlength=10)
    return {
        "judge_accuracy": accuracy(judge, unseen.floats(), unseen.labels),
        "frechet": {name: frechet_distance(real, found) for name, found in features.items()},
        "classes_of_samples": classes.tolist(),
        "samples": len(samples),
        "num_inference_steps": recipe.judged_steps,
        "test_pictures": len(unseen.images),
        "operators": len(
            [o for o in discover(pipeline.denoiser, pipeline.call(probe), timing_repeats=0).operators if o.candidates]
        ),
        "params": {name: sum(p.numel() for p in getattr(pipeline.pipe, name).parameters()) for name in ("vqvae", "unet")},
        "bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "recipe": asdict(recipe),
        "environment": environment(pipeline.denoiser),
    }


@torch.inference_mode()
def reconstruct(autoencoder: VQModel, images: Tensor) -> Tensor:
    """Pictures through the encoder and the decoder, `(n, 1, 32, 32)` in [-1, 1]."""
    return torch.cat([autoencoder(part).sample.clamp(-1, 1) for part in torch.split(images, 250)])


def card(figures: dict[str, Any]) -> str:
    """The model card, every figure of it from the measurement."""
    distance, recipe = figures["frechet"], figures["recipe"]
    steps = ", ".join(
        f"{name} {recipe[name]['steps']} x {recipe[name]['batch_size']}" for name in ("autoencoder", "denoiser", "judge")
    )
    where = ", ".join(f"{key} {value}" for key, value in figures["environment"].items())
    return f"""---
library_name: diffusers
license: apache-2.0
pipeline_tag: unconditional-image-generation
---
# zoo:fashion

Unconditional latent diffusion of grey 32x32 garments, small enough to train and prune on a laptop's CPU. It is a
stand-in for the large models that ldpruner is made for, not a model to use for its pictures.

![samples](samples.png)

| | |
|---|---|
| pipeline | diffusers `LDMPipeline` |
| autoencoder | `VQModel`, 32x32x1 pictures to 8x8x4 latents, 2048 codes |
| denoiser | `UNet2DModel`, self-attention at 8x8 and 4x4 |
| scheduler | `DDIMScheduler`, v-prediction |
| parameters | autoencoder {figures["params"]["vqvae"]:,}, denoiser {figures["params"]["unet"]:,} |
| removable operators | {figures["operators"]} |
| weights | {figures["bytes"] / 1e6:.1f} MB, float16 safetensors, the judge included |
| data | Fashion-MNIST (Zalando Research, MIT licence), 60,000 training pictures with a border of 2 pixels |
| steps x batch | {steps} |
| command | `ldpruner zoo train fashion --data DIR --out fashion` |

## Quality

The judge is a classifier of the same data (`judge/`), with {figures["judge_accuracy"] * 100:.2f} % accuracy on the test pictures.
Fréchet distance to the {figures["test_pictures"]:,} test pictures, in its 128 features, of {figures["samples"]:,} each:

| | Fréchet distance |
|---|---|
| samples, {figures["num_inference_steps"]} steps | {distance["samples"]:.3f} |
| reconstructions by the autoencoder | {distance["reconstructions"]:.3f} |
| training pictures (the floor) | {distance["training pictures"]:.3f} |

Samples by the judge's class: {figures["classes_of_samples"]}. These distances compare with each other only, not with FID in
Inception's features.

Measured by the same command that trains ({where}).
"""
