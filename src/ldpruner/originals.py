"""What the original answers: computed once, then found on disk by the hash of all that it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldpruner.arrangements import arrangement
from ldpruner.errors import ArtifactError
from ldpruner.files import cache_folder
from ldpruner.operators.timing import device_of
from ldpruner.operators.tracing import Call, weights_digest
from ldpruner.packing import Part, packed, unpacked
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.trajectories import spread_calls

log = logging.getLogger(__name__)

SCHEMA = 1  # of what files hold; a change makes what is kept unknown
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Original:
    """A pipeline as it is now, and what it generates; kept in the cache, for every run that asks for the same."""

    pipeline: Pipeline
    digest: str

    @classmethod
    def of(cls, pipeline: Pipeline) -> Original:
        return cls(pipeline=pipeline, digest=pipeline_digest(pipeline))

    def latents(self, probe: Probe, *, batch_size: int | None = None) -> Tensor:
        """See `Pipeline.latents`."""
        probe = self.pipeline.completed(probe)
        return self._kept(["latents", *self._asked(probe, batch_size)], lambda: self.pipeline.latents(probe, batch_size=batch_size))

    def spread_calls(self, probe: Probe, count: int, *, batch_size: int | None = None) -> list[Call]:
        """See `trajectories.spread_calls`."""
        probe = self.pipeline.completed(probe)

        def made() -> list[tuple[Any, Any]]:
            return [(call.args, call.kwargs) for call in spread_calls(self.pipeline, probe, count, batch_size=batch_size)]

        return [Call(*each) for each in self._kept(["calls", count, *self._asked(probe, batch_size)], made)]

    def _asked(self, probe: Probe, batch_size: int | None) -> list[Any]:
        """All that decides the bits of what a probe gives: how many samples and threads add up together, in which order, too."""
        arranged = arrangement(self.pipeline.denoiser)
        return [probe.to_json(), batch_size or probe.samples, torch.get_num_threads(), arranged]

    def _kept(self, asked: Sequence[Any], make: Callable[[], T]) -> T:
        return kept(cache_folder() / "originals" / self.digest[:32], asked, make, device_of(self.pipeline.denoiser))


def kept(folder: Path, asked: Sequence[Any], make: Callable[[], T], device: torch.device) -> T:
    """What a folder holds for a question, or what `make` gives, which is kept there if it can be."""
    part = Part(path=folder / f"{hash_of(asked)[:32]}.safetensors")
    held = part.read()
    if held is not None:
        try:
            return unpacked(held, device)  # type: ignore[no-any-return]
        except (KeyError, TypeError, ValueError) as error:
            log.info("%s: made anew (%s)", part.path, error)
    made = make()
    try:
        held = packed(made)
        part.write(held)
    except (TypeError, ArtifactError) as error:  # nothing is lost but time
        log.info("not kept for the next run: %s", error)
    return made if held is None else unpacked(held, device)  # laid in memory as the next run will find it: the same bits follow


def pipeline_digest(pipeline: Pipeline) -> str:
    """A fingerprint of all that decides what a pipeline generates: weights, configurations, dtype, device, versions."""
    versions = [metadata.version(name) for name in ("torch", "diffusers")]
    digest = hashlib.sha256(f"{SCHEMA} {versions} {type(pipeline.pipe).__name__} {plain(pipeline.pipe.config)}".encode())
    for name, component in sorted(pipeline.pipe.components.items()):
        digest.update(f"{name} {type(component).__name__} {plain(getattr(component, 'config', None))}".encode())
        if isinstance(component, nn.Module):
            digest.update(module_digest(component).encode())
    parameter = next(pipeline.denoiser.parameters())
    digest.update(f"{parameter.dtype} {parameter.device.type}".encode())
    return digest.hexdigest()


def module_digest(module: nn.Module) -> str:
    """A fingerprint of a module's layers, weights and buffers."""
    digest = hashlib.sha256(f"{module} {weights_digest(module)}".encode())  # as text, a module names its stand-ins
    for buffer in module.buffers():
        digest.update(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(config: Any) -> str:
    """A configuration as text, the same for the same settings."""
    given = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    settings = {key: value for key, value in given.items() if not key.startswith("_")}
    return json.dumps(settings, sort_keys=True, default=str)


def hash_of(settings: Sequence[Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()
