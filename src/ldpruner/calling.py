"""What a pipeline's call asks, by the names of its arguments: prompts, class labels, pictures, or nothing."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ldpruner.errors import PipelineError, suggest
from ldpruner.probes import Probe

log = logging.getLogger(__name__)

CLASSES = 1000  # of a pipeline that takes class labels and whose denoiser does not say how many
SIDE = 512  # pixels of a picture that is given, where nothing says how large they are


@dataclass(frozen=True, kw_only=True)
class Calling:
    """The arguments of one pipeline's call, and what they are made of."""

    pipe: DiffusionPipeline
    denoiser: nn.Module
    source: str

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.pipe.__call__).parameters)

    def takes(self, name: str) -> bool:
        return name in self.parameters

    @property
    def wants_pictures(self) -> bool:
        """Whether a call makes no sense without a picture: one that has no default, or that noise is added to."""
        if not self.takes("image"):
            return False
        return self.parameters["image"].default is inspect.Parameter.empty or self.takes("strength")

    def arguments(self, probe: Probe, rows: Sequence[int]) -> dict[str, Any]:
        """What the call is given for these rows of a completed probe. Raises `PipelineError` where it takes no such thing."""
        self._check_taken(probe)
        steps = "num_inference_steps" if self.takes("num_inference_steps") else "steps"
        generators = [torch.Generator("cpu").manual_seed(probe.seed + row) for row in rows]
        arguments: dict[str, Any] = {"generator": generators, steps: probe.num_inference_steps}
        if self.takes("prompt"):
            arguments["prompt"] = [probe.prompts[row % len(probe.prompts)] for row in rows]
        elif self.takes("class_labels"):
            arguments["class_labels"] = [row % self._classes() for row in rows]
        elif self.takes("batch_size"):
            arguments["batch_size"] = len(rows)
        if self.wants_pictures:
            size = self._picture_size(probe)
            arguments["image"] = [made_up_picture(probe.seed + row, size) for row in rows]
        if probe.guidance_scale is not None:
            arguments["guidance_scale"] = probe.guidance_scale
        return arguments | dict(probe.call)

    def _check_taken(self, probe: Probe) -> None:
        name = type(self.pipe).__name__
        for argument, asked in (("prompt", bool(probe.prompts)), ("guidance_scale", probe.guidance_scale is not None)):
            if asked and not self.takes(argument):
                raise PipelineError(f"{self.source}: {name} takes no {argument}. Leave it out.")
        for argument in probe.call:
            if not self.takes(argument):
                raise PipelineError(f"{self.source}: {name} takes no {argument}: {suggest(argument, self.parameters)}")

    def _classes(self) -> int:
        config: Any = getattr(self.denoiser, "config", {})
        return int(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or CLASSES)

    def _picture_size(self, probe: Probe) -> tuple[int, int]:
        """Height and width in pixels: those of the call, else those that the denoiser was made for."""
        latents: Any = getattr(self.denoiser, "config", {}).get("sample_size")
        scale = int(getattr(self.pipe, "vae_scale_factor", 1))
        sides = [latents, latents] if isinstance(latents, int) else list(latents or [])[-2:]
        made_for = [side * scale for side in sides] if len(sides) == 2 else [SIDE, SIDE]
        return int(probe.call.get("height", made_for[0])), int(probe.call.get("width", made_for[1]))


def made_up_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of soft colours, `size` being height and width: for pipelines that start from one, where none is given."""
    colours = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(colours, size, mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((smooth * 255).to(torch.uint8).permute(1, 2, 0).numpy())


def denoisers_in(pipe: DiffusionPipeline) -> list[str]:
    """The parts that denoise, the likeliest first: those that are called so, then those whose class is made for it."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    named = [name for name in ("unet", "transformer") if name in modules]
    kinds = ("diffusers.models.unets.", "diffusers.models.transformers.")
    others = [name for name, part in modules.items() if type(part).__module__.startswith(kinds) and name not in named]
    return named + others


def denoiser_name(pipe: DiffusionPipeline, source: str, asked: str | None) -> str:
    """The part that is asked for, else the first that denoises; which others do is told. Raises `PipelineError`."""
    modules = [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    if asked is not None and asked not in modules:
        raise PipelineError(f"{source}: has no part {asked!r} to prune: {suggest(asked, modules)}")
    found = [asked] if asked else denoisers_in(pipe)
    if not found:
        raise PipelineError(f"{source}: which part is the denoiser? {suggest('unet', modules)}")
    if len(found) > 1:
        log.info("%s: %s is taken, as no component was named; %s denoise too", source, found[0], ", ".join(found[1:]))
    return found[0]
