"""Copies of a student: as it was on its way, and as it would have begun from nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


@torch.no_grad()
def averaged(denoiser: nn.Module, work: Path, steps: int) -> nn.Module:
    """A student as its moving average was after some steps, of which a checkpoint is kept; 0: as it began."""
    then = copy.deepcopy(denoiser)
    if steps:
        held = load_file(work / f"checkpoint-{steps}" / "training.safetensors")
        for name, parameter in then.named_parameters():
            if f"average.{name}" in held:  # the others did not learn
                parameter.copy_(held[f"average.{name}"])
    return then


@torch.no_grad()
def untrained(denoiser: nn.Module) -> nn.Module:
    """A copy with every weight drawn anew, as each layer draws its own; scales begin at one and shifts at nought."""
    torch.manual_seed(0)
    fresh = copy.deepcopy(denoiser)
    for module in fresh.modules():
        draw = getattr(module, "reset_parameters", None)
        if callable(draw):
            draw()
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("scale", "shift"):
                parameter.fill_(float(name == "scale"))
    return fresh
