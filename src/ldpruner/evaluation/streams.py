"""Where evidence comes from: samples and real data, as streams of what a feature net makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldpruner.datasets import PICTURES, Folder, in_parts, resized
from ldpruner.errors import DataError
from ldpruner.evaluation.base import Evidence, Stream
from ldpruner.evaluation.features import FeatureNet
from ldpruner.evaluation.judges import Seen, load_reference
from ldpruner.evaluation.kept import Samples, Watch, comparable, observed, sounds, stream_of
from ldpruner.packing import Part
from ldpruner.pipelines import Pipeline

PART = 50  # real samples that are looked at at once


@dataclass(frozen=True, kw_only=True)
class RealData:
    """Real pictures or recordings that samples are compared with, shuffled: metrics that work in blocks expect no order."""

    folder: Folder
    names: tuple[str, ...]
    pipeline: Pipeline

    @classmethod
    def open(cls, path: Path, pipeline: Pipeline) -> RealData:
        """List what there is of what the pipeline generates. Raises `DataError` where there is nothing."""
        folder = Folder.open(path)
        names = folder.of(".wav") if pipeline.mel is not None else folder.of(*PICTURES)
        if not names:
            raise DataError(f"{path}: no {'pictures' if pipeline.mel is None else 'recordings (.wav)'} in it.")
        return cls(folder=folder, names=tuple(random.Random(0).sample(names, len(names))), pipeline=pipeline)

    def shown_to(self, net: FeatureNet, shape: torch.Size) -> Stream:
        """Pictures of the samples' shape; of recordings their spectrograms or, for a net that hears, themselves."""
        channels, height, width = shape
        if net.sample_rate:
            return lambda: in_parts(self.names, lambda name: self._wave(name, net.sample_rate), PART)
        if self.pipeline.mel is not None:
            return _at_size(lambda: in_parts(self.names, self._spectrogram, PART), net)
        size = net.size or (height, width)
        return lambda: in_parts(self.names, lambda name: self.folder.picture(name, channels=channels, size=size), PART)

    def _spectrogram(self, name: str) -> Tensor:
        assert self.pipeline.mel is not None
        return self.pipeline.spectrogram(self.folder.wave(name, self.pipeline.mel.get_sample_rate()))

    def _wave(self, name: str, sample_rate: int | None) -> Tensor:
        assert self.pipeline.mel is not None
        rate = self.pipeline.mel.get_sample_rate()
        return torch.from_numpy(comparable(self.folder.wave(name, rate), rate, self.pipeline, sample_rate or rate))


def paired(made: Sequence[Samples]) -> Evidence:
    """Latents and pictures of the model, and of the original for the same seeds."""
    streams = [{name: samples.stream(name) for name in ("latents", "pictures")} for samples in made]
    return Evidence(samples=streams[0], reference={}, original=streams[1] if len(streams) > 1 else {})


def sample_streams(samples: Samples, net: FeatureNet, cache: Path, watch: Watch | None) -> dict[str, Stream]:
    """What a net makes of samples and, where it reads, of their captions."""
    pictures = samples.stream("pictures")
    shown = sounds(pictures, samples.pipeline, net.sample_rate, cache) if net.sample_rate else _at_size(pictures, net)
    streams = _seen(net, shown, cache, samples.probe.samples, f"looking, {net.name}", watch)
    return streams | caption_streams(net, samples.captions)


def _at_size(pictures: Stream, net: FeatureNet) -> Stream:
    """Pictures of the height and width that a net wants, if it wants some."""
    size = net.size
    return pictures if size is None else lambda: (resized(part, size) for part in pictures())


def caption_streams(net: FeatureNet, captions: Sequence[str]) -> dict[str, Stream]:
    """What a net makes of captions: each different one is read once."""
    streams: dict[str, Stream] = {}
    if captions and net.describe:
        different = list(dict.fromkeys(captions))
        place = {caption: number for number, caption in enumerate(different)}
        own = torch.tensor([place[caption] for caption in captions])
        with torch.inference_mode():
            parts = [net.describe(different[at : at + PART]).float().cpu() for at in range(0, len(different), PART)]
        candidates = torch.cat(parts)
        streams["candidates"] = split(candidates)
        streams["own"] = split(own)
        streams["captions"] = lambda: (candidates[part] for part in torch.split(own, 500))
    if captions and net.label:
        labels = [-1 if label is None else label for label in map(net.label, captions)]
        streams["labels"] = split(torch.tensor(labels))
    return streams


def reference_streams(
    net: FeatureNet, real: RealData | None, shape: torch.Size, cache: Path, watch: Watch | None
) -> dict[str, Stream]:
    """What a net makes of real data, else what a judge kept of what it made of it, else nothing."""
    if real is not None:
        return _seen(net, real.shown_to(net, shape), cache, len(real.names), f"looking at real data, {net.name}", watch)
    if net.reference is None:
        return {}
    return {name: split(tensor) for name, tensor in load_reference(net.reference).items()}


def _seen(net: FeatureNet, shown: Stream, cache: Path, count: int, what: str, watch: Watch | None) -> dict[str, Stream]:
    parts: list[Part] = []
    names: list[str] = []

    def looked() -> Iterator[Seen]:
        for part, seen in observed(net, shown, cache):
            parts.append(part)
            names[:] = seen
            yield seen

    for _ in watch(looked(), count, what) if watch else looked():
        pass
    return {name: stream_of(parts, name) for name in names}


def split(tensor: Tensor) -> Stream:
    """A tensor as a stream."""
    return lambda: iter(torch.split(tensor, 500))
