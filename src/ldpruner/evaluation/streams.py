"""Where evidence comes from: samples and real data, as streams of what a feature net makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldpruner.datasets import PICTURES, Folder, in_parts
from ldpruner.errors import DataError
from ldpruner.evaluation.base import Evidence, Stream
from ldpruner.evaluation.features import FeatureNet
from ldpruner.evaluation.judges import Seen, load_reference
from ldpruner.evaluation.kept import Samples, named, observed, sounds
from ldpruner.pipelines import Pipeline
from ldpruner.sound import resampled

Watch = Callable[[Iterator[Seen], int, str], Iterator[Seen]]  # parts to come, samples in all, what is done

PART = 50  # real samples that are looked at at once


def generated_shape(samples: Samples, watch: Watch | None) -> torch.Size:
    """Make sure that every part is there; the shape of a picture."""
    parts = samples.parts()
    watched = watch(parts, samples.probe.samples, f"generating, {samples.pipeline.source}") if watch else parts
    shape = torch.Size()
    for part in watched:
        shape = part["pictures"].shape[1:]
    return shape


def paired(made: Sequence[Samples]) -> Evidence:
    """Latents and pictures of the model, and of the original for the same seeds."""
    streams = [{name: samples.stream(name) for name in ("latents", "pictures")} for samples in made]
    return Evidence(samples=streams[0], reference={}, original=streams[1] if len(streams) > 1 else {})


def sample_streams(samples: Samples, net: FeatureNet, cache: Path, watch: Watch | None) -> dict[str, Stream]:
    """What a net makes of samples and, where it reads, of their captions."""
    pictures = samples.stream("pictures")
    shown = sounds(pictures, samples.pipeline, net.sample_rate, cache) if net.sample_rate else pictures
    parts = observed(net, shown, cache)
    first: Seen = {}
    for part in watch(parts(), samples.probe.samples, f"looking, {net.name}") if watch else parts():
        first = first or part
    streams = {name: named(parts, name) for name in first}
    captions = samples.captions
    if captions and net.describe:
        streams["captions"] = _described(net.describe, captions, samples.batch_size)
    if captions and net.label:
        labels = torch.tensor([-1 if label is None else label for label in map(net.label, captions)])
        streams["labels"] = lambda: iter(torch.split(labels, samples.batch_size))
    return streams


def _described(describe: Callable[[Sequence[str]], Tensor], captions: Sequence[str], size: int) -> Stream:
    def stream() -> Iterator[Tensor]:
        with torch.inference_mode():
            for first in range(0, len(captions), size):
                yield describe(captions[first : first + size]).float().cpu()

    return stream


def reference_streams(
    net: FeatureNet, pipeline: Pipeline, reference: Path | str | None, shape: torch.Size, cache: Path
) -> dict[str, Stream]:
    """What a net makes of real data: of a folder or zip, else what a judge kept of it, else nothing."""
    if reference is None:
        if net.reference is None or not (net.reference / "reference.safetensors").is_file():
            return {}
        kept = load_reference(net.reference)
        return {name: lambda name=name: iter(torch.split(kept[name], 250)) for name in kept}  # type: ignore[misc]
    parts = observed(net, _real(Folder.open(Path(reference)), net, pipeline, shape), cache)
    return {name: named(parts, name) for name in next(parts())}


def _real(folder: Folder, net: FeatureNet, pipeline: Pipeline, shape: torch.Size) -> Stream:
    """Real pictures, of the samples' shape; or real sound, as spectrograms or, for a net that hears, as waves."""
    recordings, pictures = folder.of(".wav"), folder.of(*PICTURES)
    if pipeline.mel is not None and recordings:
        if net.sample_rate:
            return lambda: in_parts(recordings, lambda name: _cut(folder, name, pipeline, net.sample_rate), PART)
        rate = pipeline.mel.get_sample_rate()
        return lambda: in_parts(recordings, lambda name: pipeline.spectrogram(folder.wave(name, rate)), PART)
    if not pictures or net.sample_rate:
        raise DataError(f"{folder.path}: no {'pictures' if pipeline.mel is None else 'recordings (.wav)'} in it.")
    channels, height, width = (int(size) for size in shape)
    return lambda: in_parts(pictures, lambda name: folder.picture(name, channels=channels, size=(height, width)), PART)


def _cut(folder: Folder, name: str, pipeline: Pipeline, sample_rate: int | None) -> Tensor:
    """A recording, as long as what the pipeline generates: cut, or with silence at its end."""
    assert pipeline.mel is not None
    rate = pipeline.mel.get_sample_rate()
    wave = torch.from_numpy(folder.wave(name, rate))[: pipeline.mel.slice_size]
    whole = F.pad(wave, (0, pipeline.mel.slice_size - len(wave)))
    return torch.from_numpy(resampled(whole.numpy(), rate, sample_rate or rate))
