"""What people look at and listen to: eight generations of the same seeds, whichever model makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.sound import Wave, levelled

STYLES = ("google", "twitter", "fluent3d")
THINGS = ("red apple", "cat face", "rocket", "pizza", "red heart", "snowman", "police car", "sunflower")
PROMPTS = tuple(f"{thing}, {STYLES[place % len(STYLES)]} style" for place, thing in enumerate(THINGS))


def look(pipeline: Pipeline, steps: int) -> Probe:
    """Eight samples in so many denoising steps, of `PROMPTS` where the pipeline takes prompts."""
    return Probe(samples=len(THINGS), num_inference_steps=steps, prompts=PROMPTS if pipeline.task == "text-to-image" else ())


def joined(pipeline: Pipeline, spectrograms: Sequence[Image.Image]) -> tuple[Wave, int]:
    """The sounds of spectrograms one after the other, equally loud, a quarter of a second apart; and the sample rate in Hz."""
    waves = [pipeline.sound(picture) for picture in spectrograms]
    rate = waves[0][1]
    pause = np.zeros(rate // 4, dtype=np.float32)
    return np.concatenate([part for wave, _ in waves for part in (levelled(wave), pause)]), rate
