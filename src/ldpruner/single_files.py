"""Checkpoints of one file, as Stable Diffusion's were first given out: what may be read, and where the configuration is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldpruner.errors import PipelineError
from ldpruner.sharing import trouble

SUFFIX = ".safetensors"
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def is_one(path: Path) -> bool:
    """Whether `path` names a checkpoint of one file. Raises `PipelineError` for one that must not be read, or is not there."""
    if path.suffix in PICKLES and not path.is_dir():
        raise PipelineError(
            f"{path}: is a pickle, which can run any code when it is read, and is refused. Give the same weights as {SUFFIX}."
        )
    if path.suffix == SUFFIX and not path.exists():
        raise PipelineError(f"{path}: no such file.")
    return path.suffix == SUFFIX and path.is_file()


def check_options(model: str, one_file: bool, config: str | os.PathLike[str] | None, variant: str | None) -> None:
    """Raise `PipelineError` where something is asked for that a checkpoint of one file, or a folder, does not have."""
    if one_file and variant is not None:
        raise PipelineError(f"{model}: is one file, and has no variants. Leave the variant out.")
    if config is not None and not one_file:
        raise PipelineError(f"{model}: has a configuration; another one is for checkpoints of one {SUFFIX} file. Leave it out.")


@contextmanager
def told(path: str, config: str) -> Iterator[None]:
    """Raise `PipelineError` with one sentence for whatever diffusers makes of a file and a configuration that do not fit."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()).partition(" Please load the component")[0][:300]
        lacking = "weights are missing" if "meta tensor" in said else None
        reason = (trouble(error) or lacking or said or type(error).__name__).rstrip(".")
        raise PipelineError(
            f"{path}: cannot be loaded with the configuration of {config} ({reason}). Name another with config, or --config: the "
            "folder of a pipeline of the same shape."
        ) from error


def config_for(path: str, given: str | os.PathLike[str] | None) -> str:
    """The folder or hub id of a checkpoint's configuration: what is given, else what diffusers makes of its names and shapes.

    Raises `PipelineError` where the file is damaged, or diffusers cannot tell.
    """
    shapes = shapes_in(path)
    if given is not None:
        return os.fspath(given)
    try:
        config: dict[str, str] = fetch_diffusers_config(shapes)
    except Exception as error:  # a name that its rules took for granted is not there
        raise PipelineError(f"{path}: is of no model that diffusers tells by its names. Give config, or --config.") from error
    return config["pretrained_model_name_or_path"]


def shapes_in(path: str) -> dict[str, Tensor]:
    """Every tensor of a file without its values. Raises `PipelineError` where the file is damaged."""
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: torch.empty(stored.get_slice(name).get_shape(), device="meta") for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"{path}: is truncated or damaged, or no safetensors file. Copy or download it again.") from error
