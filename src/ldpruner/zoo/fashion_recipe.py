"""`zoo:fashion`: latent diffusion of grey 32x32 garments, trained from nothing on a CPU.

Three networks, each in a folder of its own with checkpoints and a loss log: a judge (classifier), a vector-quantised
autoencoder (32x32 pictures to 8x8x4 latents), and a denoiser trained on the latents by v-prediction
(Salimans and Ho, arXiv 2202.00512). What diffusers' `LDMPipeline` loads is put together from the last two.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LDMPipeline, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldpruner.evaluation.judges import PictureClassifier, accuracy, load_judge, load_reference, save_judge, save_reference
from ldpruner.files import staged_folder, write_json, write_text
from ldpruner.pipelines import load
from ldpruner.probes import Probe
from ldpruner.reporting import grid
from ldpruner.zoo.autoencoders import floats
from ldpruner.zoo.data import Pictures, load_pictures
from ldpruner.zoo.denoisers import new_scheduler, velocity_error
from ldpruner.zoo.measuring import Shown, card, measure, network_facts, seen_by, weight_bytes
from ldpruner.zoo.training import Training, draw, train

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


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


def train_autoencoder(pictures: Pictures, recipe: FashionRecipe, folder: Path) -> VQModel:
    """Learn to squeeze pictures into latents; the codebook starts from latents of the data, so that no code lies idle."""
    training = recipe.autoencoder
    quantize_from = int(training.steps * recipe.codebook_from)

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        assert isinstance(module, VQModel)
        images = pictures.floats(draw(len(pictures.images), training.batch_size, generator))
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
    images = pictures.floats(draw(len(pictures.images), 512, generator))
    vectors = encode(autoencoder, images).permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
    codes.copy_(vectors[draw(len(vectors), len(codes), generator)])


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
    """Learn to predict the velocity of noisy latents."""
    scheduler = new_scheduler()

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        clean = latents[draw(len(latents), training.batch_size, generator)]
        return velocity_error(lambda noisy, times: module(noisy, times).sample, clean, scheduler, generator)

    torch.manual_seed(training.seed)
    denoiser = train(new_denoiser(), loss, training, folder)
    assert isinstance(denoiser, UNet2DModel)
    return denoiser


def train_judge(pictures: Pictures, training: Training, folder: Path) -> PictureClassifier:
    """Learn to tell the classes apart, from pictures shifted by up to 2 pixels."""

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        rows = draw(len(pictures.images), training.batch_size, generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        images = pictures.floats(rows).roll(shift, (2, 3))
        return F.cross_entropy(module(images), pictures.labels[rows], label_smoothing=0.05)

    torch.manual_seed(training.seed)
    judge = train(PictureClassifier(classes=CLASSES), loss, training, folder)
    assert isinstance(judge, PictureClassifier)
    return judge


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
        save_judge(judge, scratch / "judge")
        reference = seen_by(load_judge(scratch / "judge"), Shown(pictures=unseen.images[: recipe.judged_samples]))
        save_reference(reference, scratch / "judge")
        figures = measured(scratch, pictures, unseen, recipe, work / "cache")
        write_json(scratch / "figures.json", figures)
        write_text(scratch / "README.md", card_of(figures))
    return figures


def measured(folder: Path, pictures: Pictures, unseen: Pictures, recipe: FashionRecipe, cache: Path) -> dict[str, Any]:
    """The judge's figures on a pipeline folder as it was saved, and a sheet of samples beside it.

    The reference is test pictures. Beside the samples: training pictures (the floor), and their reconstructions.
    """
    pipeline, judge, reference = load(folder), load_judge(folder / "judge"), load_reference(folder / "judge")
    probe = Probe(samples=recipe.judged_samples, num_inference_steps=recipe.judged_steps, seed=1000)
    others = pictures.images[: recipe.judged_samples]
    columns = {
        "training pictures": Shown(pictures=others),
        "their reconstructions": Shown(pictures=reconstruct(pipeline.pipe.vqvae, others)),
    }
    figures = measure(pipeline, judge, reference, columns, probe, cache)
    probabilities = seen_by(judge, Shown(pictures=unseen.images))["probabilities"]
    figures["judge"] = {"accuracy": accuracy(probabilities, unseen.labels), "held_out": len(unseen.images)}
    shown = pipeline.images(Probe(samples=64, num_inference_steps=recipe.judged_steps, seed=1000))
    grid([shown[first : first + 16] for first in range(0, 64, 16)], side=48).save(folder / "samples.png")
    return figures | weight_bytes(folder) | {"recipe": asdict(recipe)}


@torch.inference_mode()
def reconstruct(autoencoder: VQModel, images: Tensor) -> Tensor:
    """uint8 pictures through the encoder and the decoder, uint8 again."""
    parts = [autoencoder(floats(part)).sample for part in torch.split(images, 250)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def card_of(figures: dict[str, Any]) -> str:
    """The model card, every figure of it from the measurement."""
    judge = figures["judge"]
    return card(
        title="zoo:fashion",
        licence="apache-2.0",
        pipeline_tag="unconditional-image-generation",
        intro=(
            "Unconditional latent diffusion of grey 32x32 garments, small enough to train and prune on a laptop's CPU. It is a "
            "stand-in for the large models that ldpruner is made for, not a model to use for its pictures."
        ),
        facts={
            "pipeline": "diffusers `LDMPipeline`",
            "autoencoder": "`VQModel`, 32x32x1 pictures to 8x8x4 latents, 2048 codes",
            "denoiser": "`UNet2DModel`, self-attention at 8x8 and 4x4",
            "scheduler": "`DDIMScheduler`, v-prediction",
            **network_facts(figures, ("autoencoder", "denoiser", "judge")),
            "data": "Fashion-MNIST (Zalando Research, MIT licence), 60,000 training pictures with a border of 2 pixels",
            "command": "`ldpruner zoo train fashion --data DIR --out fashion`",
        },
        quality=(
            f"The judge (`judge/`) is a classifier of the ten kinds of garment, with {judge['accuracy'] * 100:.2f} % accuracy on "
            f"{judge['held_out']:,} test pictures. The reference is the first {figures['counts']['reference']:,} of these; "
            "the floor is training pictures against it."
        ),
        figures=figures,
    )
