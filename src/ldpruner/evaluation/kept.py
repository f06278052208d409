"""Samples and features kept on disk by the hash of what made them: a second run finds them, a killed run goes on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldpruner.errors import ArtifactError
from ldpruner.evaluation.base import Stream
from ldpruner.evaluation.features import FeatureNet
from ldpruner.evaluation.judges import Seen
from ldpruner.files import refused_by_disk
from ldpruner.operators.tracing import weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.sound import resampled


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file of the cache, whether it is there yet or not. It is whole or absent."""

    path: Path

    def read(self) -> Seen | None:
        """What it holds; None where it is not there, or was damaged."""
        try:
            return load_file(self.path)
        except (OSError, SafetensorError):
            return None

    def write(self, tensors: Seen) -> None:
        """Fill it. Raises `ArtifactError` where the disk refuses; the parts before it are kept."""
        scratch = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)
            scratch.replace(self.path)
        except Exception as error:
            scratch.unlink(missing_ok=True)
            if not refused_by_disk(error):
                raise
            raise ArtifactError(
                f"{self.path.parent}: the cache cannot be written ({error}). What is there is kept; free space, "
                "or name another folder with --cache, and run again."
            ) from error

    def or_made(self, make: Callable[[], Seen]) -> Seen:
        """What it holds, made and written first where it is not there."""
        held = self.read()
        if held is None:
            held = make()
            self.write(held)
        return held


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A pipeline's generations for a probe, in parts of `batch_size`, each generated once."""

    pipeline: Pipeline
    probe: Probe
    batch_size: int
    folder: Path
    digest: str

    @classmethod
    def of(cls, pipeline: Pipeline, probe: Probe, *, batch_size: int, cache: Path) -> Samples:
        digest = pipeline_digest(pipeline)
        return cls(
            pipeline=pipeline,
            probe=pipeline.completed(probe),
            batch_size=batch_size,
            folder=cache / "samples" / digest[:32],
            digest=digest,
        )

    def parts(self) -> Iterator[Seen]:
        """`latents` and uint8 `pictures` of every part, in the order of their seeds."""
        for first in range(0, self.probe.samples, self.batch_size):
            yield self._part(range(first, min(first + self.batch_size, self.probe.samples)))

    def _part(self, rows: range) -> Seen:
        def make() -> Seen:
            some = replace(self.probe, samples=rows.stop)
            made = next(self.pipeline.generations(some, batch_size=len(rows), first=rows.start))
            return {"latents": made.latents, "pictures": made.pictures}

        return self._file("part", rows).or_made(make)

    def _file(self, kind: str, rows: range) -> Part:
        prompts = [self.probe.prompts[row % len(self.probe.prompts)] for row in rows] if self.probe.prompts else []
        settings = [self.probe.seed + rows.start, len(rows), self.probe.num_inference_steps, self.probe.guidance_scale, prompts]
        return Part(path=self.folder / f"{kind}-{_hash(settings)[:32]}.safetensors")

    def stream(self, name: str) -> Stream:
        """`latents` or `pictures`, part by part."""
        return lambda: (part[name] for part in self.parts())

    @property
    def captions(self) -> list[str]:
        """The prompt of every sample; none where the pipeline takes none."""
        return (
            [self.probe.prompts[row % len(self.probe.prompts)] for row in range(self.probe.samples)] if self.probe.prompts else []
        )


def sounds(spectrograms: Stream, pipeline: Pipeline, sample_rate: int, cache: Path) -> Stream:
    """The sound of uint8 spectrograms `(n, 1, bands, frames)` as `(n, length)` at a sample rate in Hz, kept by their content."""
    settings = _hash([_plain(getattr(pipeline.mel, "config", None)), sample_rate])

    def make(part: Tensor) -> Seen:
        waves = [resampled(*pipeline.sound(picture), sample_rate) for picture in part]
        return {"waves": torch.from_numpy(np.stack(waves))}

    def parts() -> Iterator[Tensor]:
        for part in spectrograms():
            file = Part(path=cache / "sound" / settings[:32] / f"{_tensor_hash(part)[:32]}.safetensors")
            yield file.or_made(functools.partial(make, part))["waves"]

    return parts


def observed(net: FeatureNet, shown: Stream, cache: Path) -> Callable[[], Iterator[Seen]]:
    """What a network makes of uint8 pictures `(n, c, h, w)`, or of waves `(n, length)`: each part once, kept by its content."""

    def parts() -> Iterator[Seen]:
        for part in shown():
            file = Part(path=cache / "features" / net.digest[:32] / f"{_tensor_hash(part)[:32]}.safetensors")
            yield file.or_made(functools.partial(_look, net, part))

    return parts


@torch.inference_mode()
def _look(net: FeatureNet, part: Tensor) -> Seen:
    return {name: tensor.float().cpu() for name, tensor in net.observe(part).items()}


def named(parts: Callable[[], Iterator[Seen]], name: str) -> Stream:
    """One of the things that parts hold."""
    return lambda: (part[name] for part in parts())


def pipeline_digest(pipeline: Pipeline) -> str:
    """A fingerprint of all that decides what a pipeline generates: weights, configurations, dtype, kind of device."""
    digest = hashlib.sha256(type(pipeline.pipe).__name__.encode())
    for name, component in sorted(pipeline.pipe.components.items()):
        config = getattr(component, "config", None)
        digest.update(f"{name} {type(component).__name__} {_plain(config)}".encode())
        if isinstance(component, nn.Module):
            digest.update(f"{component} {weights_digest(component)}".encode())  # as text, a module names its stand-ins
    parameter = next(pipeline.denoiser.parameters())
    digest.update(f"{parameter.dtype} {parameter.device.type}".encode())
    return digest.hexdigest()


def _plain(config: Any) -> str:
    given = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    settings = {key: value for key, value in given.items() if not key.startswith("_")}
    return json.dumps(settings, sort_keys=True, default=str)


def _hash(settings: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _tensor_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
