"""`zoo:digits`: unconditional latent diffusion of spoken digits as mel spectrograms, trained from nothing on a CPU.

One second of 8 kHz sound is a 64x64 picture of its mel spectrogram. An autoencoder and a denoiser make diffusers'
`AudioDiffusionPipeline`, whose `Mel` turns pictures back into sound; the judge is a classifier of the ten digits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AudioDiffusionPipeline, AutoencoderKL, Mel, UNet2DModel
from torch import Tensor, nn

from ldpruner.datasets import signed
from ldpruner.evaluation.judges import PictureClassifier, accuracy, save_judge, save_reference
from ldpruner.files import staged_folder, write_json, write_text
from ldpruner.pipelines import load
from ldpruner.probes import Probe
from ldpruner.reporting import grid, upright_spectrogram
from ldpruner.sound import to_spectrogram
from ldpruner.zoo.autoencoders import kept_latents, reconstruct, train_autoencoder
from ldpruner.zoo.denoisers import new_scheduler, train_unconditional
from ldpruner.zoo.folders import Recordings, load_recordings
from ldpruner.zoo.measuring import Shown, card, judge_in, measure, network_facts, seen_by, weight_bytes
from ldpruner.zoo.training import Training, draw, train

HELD_OUT_TAKES = 5  # the first takes of every speaker and digit test the judge, as the data set's own split has it


@dataclass(frozen=True, kw_only=True)
class DigitsRecipe:
    """How long each network of `zoo:digits` trains; the defaults made the weights that ship."""

    autoencoder: Training = field(default_factory=lambda: Training(steps=1500, batch_size=16, learning_rate=1e-3, ema_decay=0.995))
    denoiser: Training = field(default_factory=lambda: Training(steps=14000, batch_size=32, learning_rate=5e-4, ema_decay=0.9995))
    judge: Training = field(default_factory=lambda: Training(steps=800, batch_size=64, learning_rate=2e-3, ema_decay=0.99))
    judged_samples: int = 2000
    judged_steps: int = 20


REDUCED = DigitsRecipe(
    autoencoder=Training(steps=4, batch_size=4, checkpoint_every=2),
    denoiser=Training(steps=4, batch_size=4, checkpoint_every=2),
    judge=Training(steps=4, batch_size=16, checkpoint_every=2),
    judged_samples=12,
    judged_steps=1,
)


def new_mel() -> Mel:
    """64 mel bands of 64 frames, 16 ms apart: 1.02 s at 8 kHz, 60 dB below the loudest."""
    return Mel(x_res=64, y_res=64, sample_rate=8000, n_fft=512, hop_length=128, top_db=60)


def spectrograms(recordings: Recordings, mel: Mel) -> Tensor:
    """The first second of every recording as a uint8 picture, `(n, 1, 64, 64)`, rows from low to high pitch."""
    return torch.from_numpy(np.stack([to_spectrogram(mel, wave) for wave in recordings.waves])).unsqueeze(1)


def new_denoiser() -> UNet2DModel:
    """An untrained denoiser of `(n, 8, 8, 8)` latents with self-attention at 8x8 and 4x4."""
    return UNet2DModel(
        sample_size=(8, 8),  # a single number would be changed to this by the pipeline's first call
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 112, 128),
        layers_per_block=2,
        attention_head_dim=16,
        norm_num_groups=16,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    )


def train_judge(pictures: Tensor, digits: Tensor, training: Training, folder: Path) -> PictureClassifier:
    """Learn to tell the digits apart, from spectrograms `(n, 1, 64, 64)` moved by up to 6 frames and 2 bands."""

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        rows = draw(len(pictures), training.batch_size, generator)
        frames, bands = (int(torch.randint(-most, most + 1, (), generator=generator)) for most in (6, 2))
        return F.cross_entropy(module(moved(signed(pictures[rows]), bands, frames)), digits[rows], label_smoothing=0.05)

    torch.manual_seed(training.seed)
    judge = train(PictureClassifier(classes="0123456789"), loss, training, folder)
    assert isinstance(judge, PictureClassifier)
    return judge


def moved(pictures: Tensor, bands: int, frames: int) -> Tensor:
    """Spectrograms `(n, 1, bands, frames)` in [-1, 1], shifted in pitch and time, with silence where nothing was."""
    padded = F.pad(pictures, (max(frames, 0), max(-frames, 0), max(bands, 0), max(-bands, 0)), value=-1.0)
    height, width = pictures.shape[2:]
    return padded[:, :, max(-bands, 0) : max(-bands, 0) + height, max(-frames, 0) : max(-frames, 0) + width]


def make(data: Path, out: Path, work: Path, recipe: DigitsRecipe) -> dict[str, Any]:
    """Train every network, write the pipeline, its judge and its card to `out`, and return what was measured.

    Each network goes on from its checkpoint in `work` where there is one. Raises `DataError` for data that cannot be read.
    """
    mel = new_mel()
    recordings = load_recordings(data, mel.get_sample_rate())
    pictures, held_out = spectrograms(recordings, mel), recordings.takes < HELD_OUT_TAKES
    known = pictures[~held_out]
    autoencoder = train_autoencoder(known, recipe.autoencoder, work / "autoencoder")
    latents = kept_latents(autoencoder, known, work / "latents.safetensors")
    denoiser = train_unconditional(new_denoiser, latents, recipe.denoiser, work / "denoiser")
    judge = train_judge(known, recordings.digits[~held_out], recipe.judge, work / "judge")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    count = min(recipe.judged_samples, len(order) // 2)
    compared, others = pictures[order[:count]], pictures[order[count : 2 * count]]
    with staged_folder(out) as scratch:
        assemble(autoencoder, denoiser, mel).save_pretrained(scratch)
        save_judge(judge, scratch / "judge")
        save_reference(seen_by(judge_in(scratch), compared), scratch / "judge")
        figures = measured(scratch, others, recipe, work / "cache")
        unseen = seen_by(judge_in(scratch), pictures[held_out])
        figures["judge"] = {
            "accuracy": accuracy(unseen["probabilities"], recordings.digits[held_out]),
            "held_out": int(held_out.sum()),
        }
        write_json(scratch / "figures.json", figures)
        write_text(scratch / "README.md", card_of(figures))
    return figures


def assemble(autoencoder: AutoencoderKL, denoiser: UNet2DModel, mel: Mel) -> AudioDiffusionPipeline:
    """The pipeline, its weights in float16."""
    return AudioDiffusionPipeline(vqvae=autoencoder.half(), unet=denoiser.half(), mel=mel, scheduler=new_scheduler())


def measured(folder: Path, others: Tensor, recipe: DigitsRecipe, cache: Path) -> dict[str, Any]:
    """The judge's figures on a pipeline folder as it was saved, and a sheet of samples beside it.

    Beside the samples: other real recordings (the floor), and the autoencoder's reconstructions of these.
    """
    pipeline = load(folder, device="cpu")
    probe = Probe(samples=recipe.judged_samples, num_inference_steps=recipe.judged_steps, seed=1000)
    columns = {
        "other real recordings": Shown(pictures=others),
        "their reconstructions": Shown(pictures=reconstruct(pipeline.pipe.vqvae, others)),
    }
    figures = measure(pipeline, judge_in(folder), columns, probe, cache)
    shown = pipeline.images(Probe(samples=32, num_inference_steps=recipe.judged_steps))
    upright = [upright_spectrogram(picture) for picture in shown]
    grid([upright[at : at + 8] for at in range(0, 32, 8)]).save(folder / "samples.png")
    return figures | weight_bytes(folder) | {"recipe": asdict(recipe)}


def card_of(figures: dict[str, Any]) -> str:
    """The model card, every figure of it from the measurement."""
    judge = figures["judge"]
    return card(
        title="zoo:digits",
        licence="cc-by-sa-4.0",
        pipeline_tag="unconditional-audio-generation",
        intro=(
            "Unconditional latent diffusion of spoken digits, one second of 8 kHz sound each, small enough to train and prune on a "
            "laptop's CPU. It is a stand-in for the large models that ldpruner is made for, not a model to use for its voices. "
            "The pictures are spectrograms, low pitch at the bottom."
        ),
        facts={
            "pipeline": "diffusers `AudioDiffusionPipeline`, mel spectrograms of 64 bands and 64 frames, sound by Griffin-Lim",
            "autoencoder": "`AutoencoderKL`, 64x64x1 spectrograms to 8x8x8 latents",
            "denoiser": "`UNet2DModel`, self-attention at 8x8 and 4x4",
            "scheduler": "`DDIMScheduler`, v-prediction",
            **network_facts(figures, ("autoencoder", "denoiser", "judge")),
            "data": "Free Spoken Digit Dataset (CC BY-SA 4.0), six speakers; takes 0 to 4 of each held out",
            "command": "`ldpruner zoo train digits --data fsdd.zip --out digits`",
            **({"remark": figures["remark"]} if "remark" in figures else {}),
        },
        quality=(
            f"The judge (`judge/`) is a classifier of the ten digits, with {judge['accuracy'] * 100:.2f} % accuracy on "
            f"{judge['held_out']} takes that neither it nor the pipeline was trained on. The reference is "
            f"{figures['counts']['reference']:,} real recordings; the floor is other real recordings against it, most of both seen "
            "in training."
        ),
        figures=figures,
    )
