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
from torch import Tensor, nn

from ldpruner.datasets import signed
from ldpruner.evaluation.judges import PictureClassifier, accuracy, save_judge, save_reference
from ldpruner.files import staged_folder, write_json, write_text
from ldpruner.pipelines import load
from ldpruner.probes import Probe
from ldpruner.reporting import grid
from ldpruner.zoo.autoencoders import encode, kept_latents, reconstruct
from ldpruner.zoo.data import Pictures, load_pictures
from ldpruner.zoo.denoisers import new_scheduler, train_unconditional
from ldpruner.zoo.measuring import Shown, card, judge_in, measure, network_facts, seen_by, weight_bytes
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
        images = signed(pictures.images[draw(len(pictures.images), training.batch_size, generator)])
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
    autoencoder.register_to_config(scaling_factor=float(1 / encode(autoencoder, pictures.images[:4000]).std()))
    return autoencoder


@torch.no_grad()
def _fill_codebook(autoencoder: VQModel, pictures: Pictures, generator: torch.Generator) -> None:
    codes = autoencoder.quantize.embedding.weight
    images = pictures.images[draw(len(pictures.images), 512, generator)]
    vectors = encode(autoencoder, images).permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
    codes.copy_(vectors[draw(len(vectors), len(codes), generator)])


def train_judge(pictures: Pictures, training: Training, folder: Path) -> PictureClassifier:
    """Learn to tell the classes apart, from pictures shifted by up to 2 pixels."""

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        rows = draw(len(pictures.images), training.batch_size, generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        images = signed(pictures.images[rows]).roll(shift, (2, 3))
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
    latents = kept_latents(autoencoder, pictures.images, work / "latents.safetensors")
    denoiser = train_unconditional(new_denoiser, latents, recipe.denoiser, work / "denoiser")
    judge = train_judge(pictures, recipe.judge, work / "judge")
    shuffled = unseen.images[torch.randperm(len(unseen.images), generator=torch.Generator().manual_seed(0))]
    with staged_folder(out) as scratch:
        LDMPipeline(vqvae=autoencoder.half(), unet=denoiser.half(), scheduler=new_scheduler()).save_pretrained(scratch)
        save_judge(judge, scratch / "judge")
        save_reference(seen_by(judge_in(scratch), shuffled[: recipe.judged_samples]), scratch / "judge")
        figures = measured(scratch, pictures, unseen, recipe, work / "cache")
        write_json(scratch / "figures.json", figures)
        write_text(scratch / "README.md", card_of(figures))
    return figures


def measured(folder: Path, pictures: Pictures, unseen: Pictures, recipe: FashionRecipe, cache: Path) -> dict[str, Any]:
    """The judge's figures on a pipeline folder as it was saved, and a sheet of samples beside it.

    The reference is test pictures. Beside the samples: training pictures (the floor), and their reconstructions.
    """
    pipeline = load(folder, device="cpu")
    probe = Probe(samples=recipe.judged_samples, num_inference_steps=recipe.judged_steps, seed=1000)
    order = torch.randperm(len(pictures.images), generator=torch.Generator().manual_seed(0))
    others = pictures.images[order[: recipe.judged_samples]]
    columns = {
        "training pictures": Shown(pictures=others),
        "their reconstructions": Shown(pictures=reconstruct(pipeline.pipe.vqvae, others)),
    }
    figures = measure(pipeline, judge_in(folder), columns, probe, cache)
    probabilities = seen_by(judge_in(folder), unseen.images)["probabilities"]
    figures["judge"] = {"accuracy": accuracy(probabilities, unseen.labels), "held_out": len(unseen.images)}
    shown = pipeline.images(Probe(samples=64, num_inference_steps=recipe.judged_steps, seed=1000))
    grid([shown[first : first + 16] for first in range(0, 64, 16)], side=48).save(folder / "samples.png")
    return figures | weight_bytes(folder) | {"recipe": asdict(recipe)}


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
            f"{judge['held_out']:,} test pictures. The reference is {figures['counts']['reference']:,} of these; "
            "the floor is training pictures against it."
        ),
        figures=figures,
    )
