"""Opening a pipeline: the only caller of `from_pretrained`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version
from torch import Tensor, nn

from ldpruner import sharing, single_files
from ldpruner.errors import PipelineError, suggest
from ldpruner.files import first_damaged

FORMAT_MODULE = "ldpruner_v1"
_ZOO = Path(__file__).parent / "zoo"
_USUAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# diffusers renamed the argument in 0.40 and warns about the old name since.
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"


def opened(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    revision: str | None,
    variant: str | None,
    trust_remote_code: bool,
    config: str | os.PathLike[str] | None,
) -> tuple[DiffusionPipeline, Path | None]:
    """What `model` names, on the CPU, and the folder where its files are. Raises `PipelineError`, see `pipelines.load`."""
    path = locate(model)
    options = {"revision": revision, "variant": variant, _DTYPE: dtype}
    one_file = single_files.is_one(Path(path))
    single_files.check_options(os.fspath(model), one_file, config, variant)
    try:
        pipe = _of_one_file(path, config, options) if one_file else _of_folder(path, trust_remote_code, options)
    except PipelineError:
        raise
    except Exception as error:
        raise PipelineError(_explain(str(model), path, error)) from error
    _check_weights(pipe, str(model))
    return pipe, sharing.folder_of(path, revision)


def _of_folder(path: str, trust_remote_code: bool, options: dict[str, Any]) -> DiffusionPipeline:
    return _Ours.from_pretrained(path, trust_remote_code=trust_remote_code, **options)


class _Ours(DiffusionPipeline):  # type: ignore[misc]
    """Reads the portable form as the plugin form: what loads a pruned part is here already, and no code of a folder runs.

    Parts that were loaded before could be handed over as well, but diffusers loads those again that a pipeline can do without.
    """

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loading and downloading both read `model_index.json` by this; diffusers 0.36 downloads no portable one without trust."""
        config: dict[str, Any] = super()._dict_from_json_file(*args, **kwargs)
        return {name: ["diffusers", entry[1]] if _is_portable(entry) else entry for name, entry in config.items()}


# By these two diffusers tells that the class is to be read from the folder, and where classes are.
_Ours.__name__, _Ours.__module__ = DiffusionPipeline.__name__, DiffusionPipeline.__module__


def _is_portable(entry: Any) -> bool:
    return isinstance(entry, list) and entry[:1] == [FORMAT_MODULE]


def _of_one_file(path: str, config: str | os.PathLike[str] | None, options: dict[str, Any]) -> DiffusionPipeline:
    place = single_files.config_for(path, config)
    with single_files.told(path, place):
        kind = getattr(diffusers, sharing.index_of(place, options["revision"])["_class_name"])
        return kind.from_single_file(path, config=place, **{_DTYPE: options[_DTYPE]})


def move(pipe: DiffusionPipeline, device: str, *, source: str) -> None:
    """Move a pipeline, in place. Raises `PipelineError` where the device is unknown, missing or full."""
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a PyTorch built without that device; no memory left
        raise PipelineError(f"{source}: cannot be moved to device {device!r} ({one_line(error)}). Try cpu.") from error


def locate(model: str | os.PathLike[str]) -> str:
    """The folder or hub id that `model` names. Raises `PipelineError` where a folder is missing or holds no pipeline."""
    name = os.fspath(model)
    if name.startswith("zoo:"):
        return str(_shipped(name.removeprefix("zoo:")))
    path = Path(name).expanduser()
    if (path / "model_index.json").is_file():
        return str(path)
    if single_files.is_one(path):
        return str(path)
    if path.exists():
        raise PipelineError(f"{name}: is no diffusers pipeline (no model_index.json in it).")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise PipelineError(f"{name}: no such folder. Give a diffusers folder, a hub id such as org/name, or zoo:NAME.")
    return name


def _shipped(name: str) -> Path:
    names = sorted(path.parent.name for path in _ZOO.glob("*/model_index.json"))
    if name not in names:
        raise PipelineError(f"zoo:{name} does not exist: {suggest(name, names)}")
    return _ZOO / name


def _explain(model: str, path: str, error: Exception) -> str:
    """One line on why loading failed; names the damaged file where one of ours can be told."""
    damaged = first_damaged(Path(path))
    if damaged is not None:
        return f"{model}: {damaged.relative_to(path)} is truncated or damaged. Copy or download it again."
    reason = sharing.trouble(error)
    if reason is not None:
        return f"{model}: cannot be loaded ({reason.rstrip('.')})."
    return f"{model}: cannot be loaded ({type(error).__name__}: {one_line(error)})."


def one_line(error: Exception) -> str:
    """An error's text without line breaks, cut where it is long."""
    return " ".join(str(error).split())[:300]


def _check_weights(pipe: DiffusionPipeline, source: str) -> None:
    for part, module in pipe.components.items():
        for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
            if parameter.is_meta:
                raise PipelineError(f"{source}: the weights of {part} lack {name}.")
            if not _finite(parameter):
                raise PipelineError(f"{source}: {part}.{name} holds NaN or infinite weights; nothing can be scored with it.")


def _finite(parameter: Tensor) -> bool:
    """Whether all numbers are: of usual ones the least and the most tell, without a mask as large as the weights."""
    if not parameter.numel() or parameter.dtype not in _USUAL:
        return bool(torch.isfinite(parameter).all())
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(parameter.detach()))
