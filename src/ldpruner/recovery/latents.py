"""What a student learns on: latents as the denoiser sees them, and their prompts. From the teacher itself, or from data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldpruner.datasets import PICTURES, Folder, signed
from ldpruner.errors import DataError, PipelineError
from ldpruner.operators.tracing import weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.recovery.rows import Maker, Rows, key_of

FIRST_SEED = 1_000_000  # far from the seeds that evaluations start from: no student is judged on what it has learnt by heart
GENERATED = Probe(samples=1000, num_inference_steps=20, seed=FIRST_SEED)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Clean latents and the prompt of each."""

    latents: Rows  # under the name `latents`
    prompts: tuple[str, ...]  # one a row; none where the pipeline takes none
    source: str
    digest: str  # of all that they were made from


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Files of one split and the caption of each, None where there are none."""

    folder: Folder
    names: tuple[str, ...]
    captions: tuple[str, ...] | None


def generated(teacher: Pipeline, probe: Probe, *, maker: Maker) -> Examples:
    """The teacher's own generations for a probe: no data is needed, and the student learns where the teacher goes."""
    probe = teacher.completed(probe)
    prompts = tuple(probe.prompts[row % len(probe.prompts)] for row in range(probe.samples)) if probe.prompts else ()
    pipe = teacher.pipe
    weights = {name: weights_digest(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    key = key_of(weights, type(pipe).__name__, str(pipe.scheduler.config), probe.to_json())

    def make(rows: range) -> dict[str, Tensor]:
        some = replace(probe, samples=len(rows), seed=probe.seed + rows.start, prompts=prompts[rows.start : rows.stop])
        return {"latents": _finite(teacher.latents(some).float(), teacher.source)}

    latents = maker.rows(f"generated/{key}", probe.samples, make, what="teacher's generations")
    return Examples(latents=latents, prompts=prompts, source=f"{probe.samples} generations of {teacher.source}", digest=key)


def from_data(data: Path, teacher: Pipeline, *, split: str, caption: str, maker: Maker) -> Examples:
    """Latents of a `.safetensors` file, or of pictures or recordings encoded once. Raises `DataError`."""
    takes_prompts = bool(teacher.completed(Probe(samples=1)).prompts)
    data = data.expanduser()
    if data.suffix == ".safetensors":
        examples = _from_file(data)
    elif not data.exists():
        raise DataError(f"{data}: no such file or folder.")
    else:
        examples = _encoded(captioned(data, teacher, split, caption), teacher, maker=maker)
    if takes_prompts and not examples.prompts:
        raise DataError(
            f"{data}: has no captions, and {type(teacher.pipe).__name__} takes prompts. Add a metadata.jsonl with file_name and "
            'text, or to a .safetensors file the metadata entry "prompts", a JSON list.'
        )
    return examples if takes_prompts else replace(examples, prompts=())


def _from_file(file: Path) -> Examples:
    try:
        with safe_open(file, framework="pt") as stored:
            latents, metadata = stored.get_tensor("latents").float(), stored.metadata() or {}
        prompts = tuple(str(prompt) for prompt in json.loads(metadata.get("prompts", "[]")))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise DataError(f'{file}: holds no latents that can be read ({error}). Expected a tensor "latents".') from error
    if prompts and len(prompts) != len(latents):
        raise DataError(f"{file}: has {len(latents)} latents and {len(prompts)} prompts. Give one a row.")
    if not len(latents):
        raise DataError(f"{file}: holds no latents.")
    digest = hashlib.sha256(_finite(latents, file.name).contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
    rows = Rows(parts=[{"latents": latents}], size=len(latents), count=len(latents))
    return Examples(latents=rows, prompts=prompts, source=f"{len(rows)} latents of {file.name}", digest=key_of(digest, prompts))


def captioned(data: Path, teacher: Pipeline, split: str, caption: str) -> Captioned:
    """The files of one split, and captions made from their entries. Raises `DataError`.

    A split is what entries of `metadata.jsonl` say in `split`, or a folder of that name at the top, as Hugging Face's
    `imagefolder` has it; data without either is taken whole.
    """
    folder = Folder.open(data)
    wanted = (".wav",) if teacher.mel is not None else PICTURES
    entries = folder.metadata() or [{"file_name": name} for name in folder.of(*wanted)]
    entries = [entry for entry in entries if str(entry["file_name"]).lower().endswith(wanted)]
    if not entries:
        raise DataError(f"{data}: holds no {' or '.join(wanted)} files.")
    entries = _of_split(entries, split, data)
    try:
        captions = tuple(caption.format(**entry) for entry in entries) if any("text" in entry for entry in entries) else None
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"{data}: caption {caption!r} does not fit the entries of metadata.jsonl ({error}).") from error
    return Captioned(folder=folder, names=tuple(str(entry["file_name"]) for entry in entries), captions=captions)


def _of_split(entries: list[dict[str, Any]], split: str, data: Path) -> list[dict[str, Any]]:
    known = {str(entry["split"]) for entry in entries if "split" in entry}
    if known:
        kept = [entry for entry in entries if entry.get("split") == split]
    else:
        known = {str(entry["file_name"]).split("/", 1)[0] for entry in entries}
        kept = [entry for entry in entries if str(entry["file_name"]).startswith(f"{split}/")] or (
            [] if known & {"train", "test", "validation"} else entries
        )
    if not kept:
        raise DataError(f"{data}: has no split {split!r}. It has: {', '.join(sorted(known)[:8])}.")
    return kept


def _encoded(files: Captioned, pipeline: Pipeline, *, maker: Maker) -> Examples:
    autoencoder = _autoencoder(pipeline)
    channels, *size = _picture_shape(pipeline)
    digest = hashlib.sha256()
    for name in files.names:
        digest.update(f"{name} {hashlib.sha256(files.folder.read(name)).hexdigest()}\n".encode())
    key = key_of(digest.hexdigest(), weights_digest(autoencoder), str(getattr(autoencoder, "config", None)), channels, size)

    def make(rows: range) -> dict[str, Tensor]:
        names = [files.names[row] for row in rows]
        if pipeline.mel is not None:
            pictures = [pipeline.spectrogram(files.folder.wave(name, pipeline.mel.get_sample_rate())) for name in names]
        else:
            pictures = [files.folder.picture(name, channels=channels, size=(size[0], size[1])) for name in names]
        return {"latents": _finite(encode(autoencoder, torch.stack(pictures)), pipeline.source)}

    latents = maker.rows(f"encoded/{key}", len(files.names), make, what="encoding")
    captions = files.captions or ()
    source = f"{len(latents)} files of {files.folder.path.name}"
    return Examples(latents=latents, prompts=captions, source=source, digest=key_of(key, captions))


@torch.no_grad()
def encode(autoencoder: Any, pictures: Tensor) -> Tensor:
    """uint8 pictures `(n, c, h, w)` as latents that the denoiser sees: what pipelines undo before they decode.

    Diffusers' pipelines decode latents / scaling_factor + shift_factor, or latents std / scaling_factor + mean where the
    configuration has these per channel. Of a distribution its mode; of a quantiser what it is given, as it quantises when
    it decodes.
    """
    like = next(autoencoder.parameters())
    encoded = autoencoder.encode(signed(pictures).to(like))
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    config = dict(autoencoder.config)
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = (latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return ((latents - mean) * scale / std).float()
    return ((latents - (config.get("shift_factor") or 0.0)) * scale).float()


def _autoencoder(pipeline: Pipeline) -> nn.Module:
    for part in pipeline.pipe.components.values():
        if isinstance(part, nn.Module) and hasattr(part, "encode") and hasattr(part, "decode"):
            return part
    raise DataError(f"{pipeline.source}: has no autoencoder to encode pictures with. Give latents in a .safetensors file.")


def _picture_shape(pipeline: Pipeline) -> tuple[int, ...]:
    """The channels, height and width of what the pipeline generates."""
    made = next(pipeline.generations(pipeline.completed(Probe(samples=1, num_inference_steps=2))))
    return tuple(made.pictures.shape[1:])


def _finite(latents: Tensor, source: str) -> Tensor:
    if not torch.isfinite(latents).all():
        raise PipelineError(f"{source}: gives latents that are not finite; nothing can be learnt from them.")
    return latents


def distinct(prompts: Sequence[str], always: str) -> tuple[list[str], list[int]]:
    """Every prompt once, `always` first, and where each of `prompts` lies among them."""
    order = {prompt: place for place, prompt in enumerate(dict.fromkeys((always, *prompts)))}
    return list(order), [order[prompt] for prompt in prompts]
