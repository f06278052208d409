"""`ldpruner zoo train NAME`: train, put the pipeline together, measure it, write its card."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ldpruner.errors import UnknownNameError, suggest

NAMES = ("fashion", "emoji", "digits")


def train(name: str, *, data: Path, out: Path, work: Path, reduced: bool = False) -> dict[str, Any]:
    """Train the zoo pipeline `name` from `data` into `out`, with checkpoints in `work`, and return its figures.

    `reduced` runs every step of the command on next to nothing. Raises `UnknownNameError`, or `DataError` for bad data.
    """
    if name not in NAMES:
        raise UnknownNameError(f"zoo pipeline {name!r} is unknown: {suggest(name, NAMES)}")
    module = importlib.import_module(f"ldpruner.zoo.{name}_recipe")
    recipe = module.REDUCED if reduced else getattr(module, f"{name.capitalize()}Recipe")()
    figures: dict[str, Any] = module.make(data, out, work, recipe)
    return figures
