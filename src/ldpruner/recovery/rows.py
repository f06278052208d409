"""Rows of tensors made once and kept in parts on disk: a second run finds them, a killed run makes only what is missing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ldpruner.errors import ArtifactError, DataError
from ldpruner.files import refused_by_disk

Named = dict[str, Tensor]
PART = 32  # rows of one file


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A table of named tensors, `(count, ...)` each, in parts. Parts from files are paged in by the system as they are read."""

    parts: Sequence[Named]
    size: int  # rows of every part but the last
    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each tensor."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.parts[0].items()}

    def take(self, rows: Sequence[int]) -> Named:
        """These rows, in this order, repeats allowed."""
        return {name: torch.stack([self.parts[row // self.size][name][row % self.size] for row in rows]) for name in self.parts[0]}


def key_of(*what: Any) -> str:
    """A name for what some rows were made from."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Where rows are kept, who shares the work, and how many are made at a time."""

    work: Path
    accelerator: Accelerator
    batch_size: int

    def rows(self, name: str, count: int, make: Callable[[range], Named], *, what: str) -> Rows:
        """`count` rows, each part made by `make`, a batch at a time, unless the folder `name` of `work` has it.

        Raises `ArtifactError` where the disk refuses; the parts before are kept.
        """
        ranges = [range(first, min(first + PART, count)) for first in range(0, count, PART)]
        files = [self.work / name / f"{number:05d}.safetensors" for number in range(len(ranges))]
        missing = [number for number, file in enumerate(files) if _read(file) is None]
        self.accelerator.wait_for_everyone()  # before anyone makes what another still looks for
        own = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        silent = not self.accelerator.is_main_process or not own
        for number in tqdm(own, desc=what, unit="part", mininterval=1, disable=silent):
            _write(files[number], self._part(ranges[number], make))
        self.accelerator.wait_for_everyone()
        return Rows(parts=[_read_again(file) for file in files], size=PART, count=count)

    def _part(self, rows: range, make: Callable[[range], Named]) -> Named:
        batches = [make(rows[first : first + self.batch_size]) for first in range(0, len(rows), self.batch_size)]
        return {name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]}


def _read(file: Path) -> Named | None:
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return None


def _read_again(file: Path) -> Named:
    held = _read(file)
    if held is None:
        raise DataError(f"{file}: has gone, or is damaged. Run again: it is made anew.")
    return held


def _write(file: Path, tensors: Named) -> None:
    scratch = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, scratch)
        scratch.replace(file)
    except Exception as error:
        if not refused_by_disk(error):
            raise
        raise ArtifactError(
            f"{file.parent}: cannot be written ({error}). What is there is kept; free space, or name another --work, and run again."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
