"""What a model generates for the same eight seeds: a strip of pictures and, of sound, the sounds one after the other."""

from __future__ import annotations

import re
from pathlib import Path

from ldpruner.pipelines import Pipeline
from ldpruner.reporting import grid, upright_spectrogram
from ldpruner.sound import write_wav
from ldpruner.zoo.looks import joined, look


def show(model: Pipeline, folder: Path, name: str) -> dict[str, str]:
    """Write `NAME.png` and, of sound, `NAME.wav` into a folder; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    made = model.images(look(model, 20))
    files = {"pictures": f"{name}.png"}
    if model.mel is not None:
        files["sound"] = f"{name}.wav"
        write_wav(folder / files["sound"], *joined(model, made))
        made = [upright_spectrogram(picture) for picture in made]
    grid([made]).save(folder / files["pictures"], optimize=True)
    return files
