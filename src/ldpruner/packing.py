"""Trees of tensors as files: safetensors, with the shape of the tree as JSON beside them. Nothing that runs is ever read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import ModelOutput

from ldpruner.errors import ArtifactError
from ldpruner.files import refused_by_disk

Packed = dict[str, Tensor]  # what a safetensors file holds

_TREE = "tree"  # under this name, the tree's shape: UTF-8 JSON
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file of the cache, whether it is there yet or not. It is whole or absent."""

    path: Path

    def read(self) -> Packed | None:
        """What it holds; None where it is not there, or was damaged."""
        try:
            return load_file(self.path)
        except (OSError, SafetensorError):
            return None

    def or_made(self, make: Callable[[], Packed]) -> Packed:
        """What it holds, made and written first where it is not there."""
        held = self.read()
        if held is None:
            held = make()
            self.write(held)
        return held

    def write(self, tensors: Packed) -> None:
        """Fill it. Raises `ArtifactError` where the disk refuses; the parts before it are kept."""
        scratch = self.path.with_suffix(f".{os.getpid()}.partial")  # another process may be making the same part
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)
            scratch.replace(self.path)
        except Exception as error:
            if not refused_by_disk(error):
                raise
            raise ArtifactError(
                f"{self.path.parent}: the cache cannot be written ({error}). What is there is kept; free space, "
                "or name another folder with --cache or LDPRUNER_CACHE, and run again."
            ) from error
        finally:
            with suppress(OSError):
                scratch.unlink()


def packed(tree: Any) -> Packed:
    """Tensors of a tree of lists, tuples, mappings, model outputs and plain values, and its shape.

    One tensor in several places is stored once. Raises `TypeError` where the tree holds anything else.
    """
    tensors: dict[int, Tensor] = {}  # by identity, in the order in which they are met
    shape = json.dumps(_taken_apart(tree, tensors)).encode()
    held = {str(place): tensor.detach().cpu().clone() for place, tensor in enumerate(tensors.values())}
    return held | {_TREE: torch.frombuffer(bytearray(shape), dtype=torch.uint8)}


def unpacked(parts: Packed, device: torch.device | str = "cpu") -> Any:
    """The tree again, with its tensors on a device. Raises `TypeError` where it names a class that no library here has."""
    tensors = {name: tensor.to(device, copy=True) for name, tensor in parts.items() if name != _TREE}  # a file's are not aligned
    return _put_together(json.loads(parts[_TREE].numpy().tobytes()), tensors)


def _taken_apart(tree: Any, tensors: dict[int, Tensor]) -> Any:
    if isinstance(tree, _PLAIN):
        return tree
    if isinstance(tree, Tensor):
        tensors[id(tree)] = tree
        return ["tensor", str(list(tensors).index(id(tree)))]
    if type(tree) in (list, tuple):
        return [type(tree).__name__, *(_taken_apart(branch, tensors) for branch in tree)]
    if type(tree) is dict or isinstance(tree, (ModelOutput, BaseOutput)):
        kind = "dict" if type(tree) is dict else f"{type(tree).__module__}:{type(tree).__qualname__}"
        return [kind, {str(name): _taken_apart(branch, tensors) for name, branch in tree.items()}]
    raise TypeError(f"a {type(tree).__name__} cannot be kept")


def _put_together(shape: Any, tensors: Packed) -> Any:
    if not isinstance(shape, list):
        return shape
    kind, *rest = shape
    if kind == "tensor":
        return tensors[rest[0]]
    if kind in ("list", "tuple"):
        branches = [_put_together(branch, tensors) for branch in rest]
        return branches if kind == "list" else tuple(branches)
    items = {name: _put_together(branch, tensors) for name, branch in rest[0].items()}
    return items if kind == "dict" else _output_class(kind)(**items)


def _output_class(name: str) -> type[Any]:
    """A class of model outputs, of a module that is loaded: a file can name no other, nor have one loaded."""
    module, _, attribute = name.partition(":")
    found = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, (ModelOutput, BaseOutput))):
        raise TypeError(f"{name} is no class of model outputs that is loaded")
    return found
