"""What a model generates for the same eight seeds: a strip of pictures and, of sound, the sounds one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.reporting import grid, upright_spectrogram
from ldpruner.sound import levelled, write_wav

THINGS = ("red apple", "cat face", "rocket", "pizza", "red heart", "snowman", "police car", "sunflower")
STYLES = ("google", "twitter", "fluent3d")


def show(model: Pipeline, folder: Path, name: str) -> dict[str, str]:
    """Write `NAME.png` and, of sound, `NAME.wav` into a folder; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    prompts = tuple(f"{thing}, {STYLES[place % len(STYLES)]} style" for place, thing in enumerate(THINGS))
    taken = prompts if model.task == "text-to-image" else ()
    made = model.images(Probe(samples=len(THINGS), num_inference_steps=20, prompts=taken))
    files = {"pictures": f"{name}.png"}
    if model.mel is not None:
        waves = [model.sound(picture) for picture in made]
        rate = waves[0][1]
        pause = np.zeros(rate // 4, dtype=np.float32)
        joined = np.concatenate([part for wave, _ in waves for part in (levelled(wave), pause)])
        write_wav(folder / f"{name}.wav", joined, rate)
        files["sound"] = f"{name}.wav"
        made = [upright_spectrogram(picture) for picture in made]
    grid([made]).save(folder / files["pictures"], optimize=True)
    return files
