"""Samples and features kept on disk by the hash of what made them: a second run finds them, a killed run goes on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldpruner.errors import DataError, PipelineError
from ldpruner.evaluation.base import Stream
from ldpruner.evaluation.features import FeatureNet
from ldpruner.evaluation.judges import Seen
from ldpruner.originals import hash_of, pipeline_digest, plain
from ldpruner.packing import Part
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.sound import levelled, resampled

SCHEMA = 1  # of what parts hold; a change makes what is kept unknown

Watch = Callable[[Iterator[Seen], int, str], Iterator[Seen]]  # parts to come, samples in all, what is done


def stream_of(parts: Sequence[Part], name: str) -> Stream:
    """One of the things that parts hold, part by part. Raises `DataError` where one has gone since it was made."""

    def stream() -> Iterator[Tensor]:
        for part in parts:
            held = part.read()
            if held is None:
                raise DataError(f"{part.path}: has gone, or is damaged. Run again: it is made anew.")
            yield held[name]

    return stream


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A pipeline's generations for a probe, in parts of `batch_size`, each generated once."""

    pipeline: Pipeline
    probe: Probe  # complete: with the prompts that the samples take
    batch_size: int
    folder: Path
    digest: str

    @classmethod
    def of(cls, pipeline: Pipeline, probe: Probe, *, batch_size: int, cache: Path) -> Samples:
        digest = pipeline_digest(pipeline)
        return cls(pipeline=pipeline, probe=probe, batch_size=batch_size, folder=cache / "samples" / digest[:32], digest=digest)

    def generate(self, watch: Watch | None) -> tuple[torch.Size, torch.Size]:
        """Make sure that every part is there; the shapes of one sample's latents and picture. Raises `PipelineError`."""
        coming = (part.or_made(functools.partial(self._make, rows)) for rows, part in self._parts())
        latents = pictures = torch.Size()
        for held in watch(coming, self.probe.samples, f"generating, {self.pipeline.source}") if watch else coming:
            latents, pictures = held["latents"].shape[1:], held["pictures"].shape[1:]
            if not torch.isfinite(held["latents"]).all():
                raise PipelineError(f"{self.pipeline.source}: generates latents that are not finite; nothing can be said of them.")
        return latents, pictures

    def missing(self) -> int:
        """How many samples are not in the cache yet."""
        return sum(len(rows) for rows, part in self._parts() if not part.path.exists())

    def stream(self, name: str) -> Stream:
        """`latents`, or uint8 `pictures`, part by part."""
        return stream_of([part for _, part in self._parts()], name)

    @property
    def captions(self) -> list[str]:
        """The prompt of every sample; none where the pipeline takes none."""
        prompts = self.probe.prompts
        return [prompts[row % len(prompts)] for row in range(self.probe.samples)] if prompts else []

    def _parts(self) -> Iterator[tuple[range, Part]]:
        captions = self.captions
        for first in range(0, self.probe.samples, self.batch_size):
            rows = range(first, min(first + self.batch_size, self.probe.samples))
            seeds = [self.probe.seed + rows.start, len(rows)]
            asked = [self.probe.num_inference_steps, self.probe.guidance_scale, captions[rows.start : rows.stop]]
            more = [self.probe.solver, dict(self.probe.call)] if self.probe.solver or self.probe.call else []
            key = hash_of([*seeds, *asked, *more])
            yield rows, Part(path=self.folder / f"part-{key[:32]}.safetensors")

    def _make(self, rows: range) -> Seen:
        some = replace(self.probe, samples=rows.stop)
        made = next(self.pipeline.generations(some, batch_size=len(rows), first=rows.start))
        return {"latents": made.latents, "pictures": made.pictures}


def sounds(spectrograms: Stream, pipeline: Pipeline, sample_rate: int, cache: Path) -> Stream:
    """The sound of uint8 spectrograms `(n, 1, bands, frames)` as `(n, length)` at a sample rate in Hz, kept by their content.

    Every wave has the same length and the same loudest sample: spectrograms carry no loudness.
    """
    settings = hash_of([SCHEMA, plain(getattr(pipeline.mel, "config", None)), sample_rate])

    def make(part: Tensor) -> Seen:
        return {"waves": torch.from_numpy(np.stack([comparable(*pipeline.sound(each), pipeline, sample_rate) for each in part]))}

    def parts() -> Iterator[Tensor]:
        for part in spectrograms():
            file = Part(path=cache / "sound" / settings[:32] / f"{_tensor_hash(part)[:32]}.safetensors")
            yield file.or_made(functools.partial(make, part))["waves"]

    return parts


def comparable(wave: Any, rate: int, pipeline: Pipeline, sample_rate: int) -> Any:
    """A wave as long and as loud as every other that is compared, generated or real, at a sample rate in Hz."""
    assert pipeline.mel is not None
    return resampled(levelled(wave, pipeline.mel.slice_size), rate, sample_rate)


def observed(net: FeatureNet, shown: Stream, cache: Path) -> Iterator[tuple[Part, Seen]]:
    """What a network makes of uint8 pictures `(n, c, h, w)`, or of waves `(n, length)`: each part once, kept by its content."""
    folder = cache / "features" / hashlib.sha256(f"{SCHEMA} {net.digest}".encode()).hexdigest()[:32]
    for part in shown():
        file = Part(path=folder / f"{_tensor_hash(part)[:32]}.safetensors")
        yield file, file.or_made(functools.partial(_look, net, part))


@torch.inference_mode()
def _look(net: FeatureNet, part: Tensor) -> Seen:
    return {name: tensor.float().cpu() for name, tensor in net.observe(part).items()}


def _tensor_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
