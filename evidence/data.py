"""What the zoo was trained on, as latents: the recovery of its pruned pipelines learns on the same, and on nothing held out."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldpruner.evaluation.frechet import frechet_distance
from ldpruner.evaluation.kept import Samples
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.zoo.autoencoders import kept_latents
from ldpruner.zoo.data import load_pictures
from ldpruner.zoo.digits_recipe import HELD_OUT_TAKES, spectrograms
from ldpruner.zoo.folders import load_captioned, load_recordings

WHERE = {"fashion": "fashion-mnist", "emoji": "emoji64.zip", "digits": "fsdd.zip"}


def training_latents(name: str, pipeline: Pipeline, data: Path, file: Path) -> Path:
    """The training pictures or recordings of `zoo:NAME`, found in the folder `data`, as latents in `file`, made once."""
    pictures, prompts = _training_data(name, pipeline, data / WHERE[name])
    kept_latents(getattr(pipeline.pipe, "vae", None) or pipeline.pipe.vqvae, pictures, file, prompts)
    return file


def _training_data(name: str, pipeline: Pipeline, source: Path) -> tuple[Tensor, list[str]]:
    if name == "fashion":
        return load_pictures(source, "train").images, []
    if name == "emoji":
        known = load_captioned(source).of("train")
        return known.images, known.captions
    recordings = load_recordings(source, pipeline.pipe.mel.get_sample_rate())
    return spectrograms(recordings, pipeline.pipe.mel)[recordings.takes >= HELD_OUT_TAKES], []


def unseen_captions(name: str, data: Path) -> tuple[str, ...]:
    """The captions of `zoo:NAME`'s data that no training picture has; none where it has no captions."""
    return tuple(load_captioned(data / WHERE[name]).of("test").captions) if name == "emoji" else ()


def distance_to(file: Path, model: Pipeline, probe: Probe, *, batch_size: int, cache: Path) -> float:
    """The Fréchet distance of a model's latents to those in `file`; its samples are those that `evaluate` keeps in `cache`."""
    real = load_file(file)["latents"]
    samples = Samples.of(model, probe, batch_size=batch_size, cache=cache)
    generated = samples.stream("latents")
    return frechet_distance(
        lambda: (part.flatten(1) for part in torch.split(real, 1000)), lambda: (part.float().flatten(1) for part in generated())
    )
