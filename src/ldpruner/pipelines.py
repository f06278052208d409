"""Pipelines: the only caller of `from_pretrained`, and the only place that runs a whole generation."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ldpruner.calling import Calling, denoiser_name
from ldpruner.errors import LDPrunerError, PipelineError
from ldpruner.files import read_prompts
from ldpruner.opening import locate, move, one_line, opened
from ldpruner.operators.timing import device_of, giving_back
from ldpruner.operators.tracing import Call
from ldpruner.operators.watching import reads_noted
from ldpruner.probes import Probe
from ldpruner.solvers import solving_by, watching
from ldpruner.sound import Wave, from_spectrogram, to_spectrogram

log = logging.getLogger(__name__)

PROMPTS = "prompts.txt"  # one prompt a line: beside a pipeline's model_index.json, or ours
USUAL = "generation.json"  # how a pipeline is usually run, where its class's defaults do not suit it: {"guidance_scale": 3.0}


class _SeenEnoughError(Exception):
    """Ends a generation once what was wanted has been seen."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Some samples of a generation: the latents it ended with, and what was decoded from them."""

    latents: Tensor  # (n, channels, ...), as the scheduler's last step gave them
    pictures: Tensor  # (n, channels, h, w), uint8; of sound, its spectrograms


class Pipeline:
    """A diffusers pipeline, its denoiser, and how to run it to latents.

    `source` says where it came from, `folder` where its files are, if it was loaded from some.
    """

    def __init__(self, pipe: DiffusionPipeline, source: str, component: str | None = None, *, folder: Path | None = None) -> None:
        self.pipe = pipe
        self.source = source
        self.folder = folder
        self.component = denoiser_name(pipe, source, component)
        pipe.set_progress_bar_config(disable=True)

    def __repr__(self) -> str:
        return f"Pipeline({type(self.pipe).__name__} from {self.source}, {self.component}: {type(self.denoiser).__name__})"

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts the noise of latents, step after step."""
        denoiser: nn.Module = getattr(self.pipe, self.component)
        return denoiser

    @property
    def task(self) -> str:
        """What it takes and gives, such as `text-to-image`, `image-to-video`, `class-conditional image`, `unconditional audio`."""
        calling = self._calling
        audio = self.mel is not None or "vocoder" in self.pipe.components or calling.takes("audio_end_in_s")
        outcome = "audio" if audio else "video" if calling.takes("num_frames") else "image"
        if calling.takes("prompt"):
            return f"text-to-{outcome}"
        if calling.wants_pictures:
            return f"image-to-{outcome}"
        return f"class-conditional {outcome}" if calling.takes("class_labels") else f"unconditional {outcome}"

    @property
    def mel(self) -> Any | None:
        """What turns spectrograms into sound and back, where the pipeline generates sound as pictures of it."""
        return getattr(self.pipe, "mel", None)

    def completed(self, probe: Probe) -> Probe:
        """The probe with prompts and a guidance scale, where the pipeline wants them and the probe has none.

        Prompts come from `prompts.txt` in the pipeline's folder, or from a list that ships: one for each sample, in turn. The
        guidance scale comes from `generation.json` in the folder; without it, the pipeline's class has its own.
        """
        calling, changes = self._calling, dict[str, Any]()
        if not probe.prompts and calling.takes("prompt"):
            changes["prompts"] = self._own_prompts()[: probe.samples]
        if probe.guidance_scale is None and calling.takes("guidance_scale") and USUAL in self.own_files():
            changes["guidance_scale"] = read_usual(self.own_files()[USUAL])
        return replace(probe, **changes)

    def guidance_scale(self, probe: Probe) -> float:
        """What generations are guided by: the probe's scale, else that of the pipeline's folder, else its class's; 1: nothing."""
        usual = inspect.signature(self.pipe.__call__).parameters.get("guidance_scale")
        given = [self.completed(probe).guidance_scale, usual.default if usual else None]
        return next((float(scale) for scale in given if scale is not None), 1.0)

    def varied(self, probe: Probe) -> Probe:
        """The probe completed, with the pipeline's other prompts after its own: what is fitted to a few holds for no other."""
        probe = self.completed(probe)
        return replace(probe, prompts=tuple(dict.fromkeys(probe.prompts + self._own_prompts()))) if probe.prompts else probe

    def _own_prompts(self) -> tuple[str, ...]:
        return read_prompts(self.own_files().get(PROMPTS, Path(__file__).with_name(PROMPTS)))

    def own_files(self) -> dict[str, Path]:
        """Where the pipeline's own `prompts.txt` and `generation.json` are, as far as its folder has them."""
        folder = Path(locate(self.source)) if self.source.startswith("zoo:") else self.folder
        return {name: folder / name for name in (PROMPTS, USUAL) if folder and (folder / name).is_file()}

    def takes(self, argument: str) -> bool:
        """Whether the pipeline's call has an argument of that name."""
        return self._calling.takes(argument)

    @property
    def _calling(self) -> Calling:
        return Calling(pipe=self.pipe, denoiser=self.denoiser, source=self.source)

    @contextmanager
    def with_denoiser(self, denoiser: nn.Module) -> Iterator[Pipeline]:
        """The same pipeline around another denoiser, for as long as the block runs."""
        original = self.denoiser
        setattr(self.pipe, self.component, denoiser)
        try:
            yield self
        finally:
            setattr(self.pipe, self.component, original)

    def around(self, denoiser: nn.Module) -> Pipeline:
        """Another pipeline, of the same parts around another denoiser."""
        pipe = copy.copy(self.pipe)
        setattr(pipe, self.component, denoiser)
        return Pipeline(pipe, self.source, self.component, folder=self.folder)

    def latents(self, probe: Probe, *, batch_size: int | None = None, rows: Sequence[int] | None = None) -> Tensor:
        """The latents that the probe's generations end with, `(samples, channels, ...)`, before the decoder sees them.

        `rows` are the samples that are wanted, by their numbers from 0 and as often as they are named; by default all.
        """
        rows = range(probe.samples) if rows is None else rows
        size = batch_size or len(rows)
        return torch.cat([self._latents(probe, rows[start : start + size]) for start in range(0, len(rows), size)])

    def _latents(self, probe: Probe, rows: Sequence[int]) -> Tensor:
        last: list[Tensor] = []
        with self._without_decoder(), giving_back(device_of(self.denoiser)):
            self._generate(probe, rows, last)
        self._check_seen(last)
        return last[0][: len(rows)]  # some pipelines step both halves of guidance, which are alike

    def _check_seen(self, last: list[Tensor]) -> None:
        if not last:
            raise PipelineError(f"{self.source}: {type(self.pipe).__name__} never called its scheduler, so it has no latents.")

    def generations(self, probe: Probe, *, batch_size: int | None = None, first: int = 0) -> Iterator[Generated]:
        """The probe's generations from sample `first` on, a batch at a time, latents and pictures both."""
        for rows in _batches(probe.samples, batch_size or probe.samples, first):
            last: list[Tensor] = []
            with self._without_vocoder():
                images = self._pictures(probe, rows, last)
            self._check_seen(last)
            yield Generated(latents=last[0].float().cpu(), pictures=torch.stack([_as_tensor(image) for image in images]))

    def images(self, probe: Probe, *, batch_size: int | None = None) -> list[Image.Image]:
        """The probe's generations as pictures, in the order of their seeds; of sound, its spectrograms."""
        pictures: list[Image.Image] = []
        for rows in _batches(probe.samples, batch_size or probe.samples):
            with self._without_vocoder():
                pictures += self._pictures(probe, rows)
        return pictures

    def videos(self, probe: Probe, *, batch_size: int | None = None) -> list[list[Image.Image]]:
        """The probe's generations as videos, each as its frames. Raises `PipelineError` where the pipeline makes none."""
        probe, videos = replace(probe, call={"output_type": "pil", **probe.call}), list[list[Image.Image]]()
        for rows in _batches(probe.samples, batch_size or probe.samples):
            videos += self._made("frames", self._generate(probe, rows))
        return videos

    def waves(self, probe: Probe, *, batch_size: int | None = None) -> tuple[list[Wave], int]:
        """The probe's generations as sound without a spectrogram on the way, channels averaged, and their sample rate in Hz."""
        waves: list[Wave] = []
        for rows in _batches(probe.samples, batch_size or probe.samples):
            sounds = torch.as_tensor(self._made("audios", self._generate(probe, rows))).float().cpu()
            waves += [sound.reshape(-1, sound.shape[-1]).mean(0).numpy() for sound in sounds]
        rates = (getattr(getattr(part, "config", None), "sampling_rate", None) for part in self.pipe.components.values())
        return waves, next((int(rate) for rate in rates if rate), 16000)

    def _made(self, kind: str, output: Any) -> Any:
        if not hasattr(output, kind):
            raise PipelineError(f"{self.source}: {type(self.pipe).__name__} gives no {kind}.")
        return getattr(output, kind)

    def _pictures(self, probe: Probe, rows: range, last: list[Tensor] | None = None) -> list[Image.Image]:
        output = self._generate(probe, rows, last)
        if not hasattr(output, "images"):
            raise PipelineError(f"{self.source}: {type(self.pipe).__name__} gives no pictures, nor spectrograms as pictures.")
        pictures: list[Image.Image] = output.images
        return pictures

    def sound(self, spectrogram: Image.Image | Tensor) -> tuple[Wave, int]:
        """The sound of one generated spectrogram, and its sample rate in Hz. Raises `PipelineError` where there is no mel."""
        if self.mel is None:
            raise PipelineError(f"{self.source}: {type(self.pipe).__name__} generates no spectrograms, so there is no sound.")
        picture = spectrogram[0].numpy() if isinstance(spectrogram, Tensor) else np.asarray(spectrogram.convert("L"))
        return from_spectrogram(self.mel, picture), self.mel.get_sample_rate()

    def spectrogram(self, wave: Wave) -> Tensor:
        """A wave at the pipeline's sample rate as it would generate it, `(1, bands, frames)`, uint8."""
        return torch.from_numpy(to_spectrogram(self.mel, wave).copy()).unsqueeze(0)

    def generate(self, probe: Probe) -> Any:
        """All of the probe's samples in one generation, decoded, as the pipeline gives them."""
        return self._generate(probe, range(probe.samples))

    def call(self, probe: Probe, *, samples: int = 1) -> Call:
        """The arguments of the denoiser's first call in a generation of `samples`."""
        seen: list[Call] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            seen.append(Call(args, kwargs, frozenset(read)))
            raise _SeenEnoughError

        handle = self.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with reads_noted(self.denoiser) as read:
                self._generate(probe, range(samples))
        finally:
            handle.remove()
        if not seen:
            steps = probe.num_inference_steps
            raise PipelineError(
                f"{self.source}: {self.component} is not called in {steps} steps. Ask for more, or name another part."
            )
        return seen[0]

    def _generate(self, probe: Probe, rows: Sequence[int], last: list[Tensor] | None = None) -> Any:
        """One call of the pipeline, its latest sample kept in `last`; None where it was stopped on the way."""
        probe = self.completed(probe)
        arguments = self._calling.arguments(probe, rows)
        try:
            with solving_by(self.pipe, probe.solver), watching(self.pipe.scheduler, last):
                return self.pipe(**arguments)
        except _SeenEnoughError:
            return None
        except LDPrunerError:
            raise
        except (ValueError, RuntimeError, TypeError) as error:  # refused, out of memory, or a dtype that it cannot run in
            raise PipelineError(f"{self.source}: {type(self.pipe).__name__} refuses to run ({one_line(error)}).") from error

    @contextmanager
    def _without_decoder(self) -> Iterator[None]:
        """Stop a generation where it would decode its latents."""

        def stop(*_: Any, **__: Any) -> None:
            raise _SeenEnoughError

        with ExitStack() as stack:
            for part in self.pipe.components.values():
                if isinstance(part, nn.Module) and hasattr(part, "decode"):
                    part.__dict__["decode"] = stop
                    stack.callback(part.__dict__.pop, "decode")
            yield

    @contextmanager
    def _without_vocoder(self) -> Iterator[None]:
        """Leave spectrograms as pictures: phases take longer to find than the rest of a small pipeline's generation."""
        if self.mel is None:
            yield
            return
        self.mel.__dict__["image_to_audio"] = lambda _: np.zeros(1)
        try:
            yield
        finally:
            del self.mel.__dict__["image_to_audio"]


def _batches(samples: int, size: int, first: int = 0) -> Iterator[range]:
    return (range(start, min(start + size, samples)) for start in range(first, samples, size))


def _as_tensor(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def read_usual(path: Path) -> float:
    """The guidance scale in a `generation.json`. Raises `PipelineError`."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["guidance_scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PipelineError(f'{path}: cannot be read ({error}). Expected {{"guidance_scale": NUMBER}}.') from error


Model: TypeAlias = str | os.PathLike[str] | DiffusionPipeline | Pipeline


def as_pipeline(model: Model) -> Pipeline:
    """A handle on whatever names or is a pipeline; strings and paths are loaded with the defaults of `load`."""
    if isinstance(model, Pipeline):
        return model
    if isinstance(model, DiffusionPipeline):
        return Pipeline(model, source=str(model.config.get("_name_or_path") or type(model).__name__))
    return load(model)


def load(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    trust_remote_code: bool = False,
    component: str | None = None,
    config: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """Load a hub id, a folder, `zoo:NAME` or a checkpoint in one `.safetensors` file. Pruned folders load without trusting any
    code of theirs.

    `config` is the folder or hub id of a pipeline of the same shape as a checkpoint of one file; by default one of the Hub that
    its tensors tell. Raises `PipelineError` where there is no pipeline, a file is damaged, weights are missing or not finite.
    """
    pipe, folder = opened(
        model, dtype=dtype, revision=revision, variant=variant, trust_remote_code=trust_remote_code, config=config
    )
    pipeline = Pipeline(pipe, source=str(model), component=component, folder=folder)
    move(pipe, device or ("cuda" if torch.cuda.is_available() else "cpu"), source=str(model))
    return pipeline
