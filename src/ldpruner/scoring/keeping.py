"""A run folder: what a plan needs, kept so that a run can be resumed and planned from again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldpruner.errors import ArtifactError, RunError
from ldpruner.files import append_json_line, refused_by_disk, write_json
from ldpruner.fitting import Weights
from ldpruner.plans import Operators, Score
from ldpruner.runs import damaged, read_header, read_operators, read_scores


class Store:
    """`run.json`, `operators.json`, `pointwise.safetensors`, and `scores.jsonl` that only ever grows.

    Where several processes score, number `rank` appends to `scores-rank.jsonl`, and only the first writes the rest. Raises
    `RunError` where `folder` holds scores of other weights, another probe or another method.
    """

    def __init__(self, folder: Path, header: dict[str, Any], rank: int = 0) -> None:
        self.folder = folder
        self.header = header
        self.lines = folder / (f"scores-{rank}.jsonl" if rank else "scores.jsonl")
        found = read_header(folder)
        differing = [key for key in ("weights", "probe", "method") if found and found.get(key) != header[key]]
        if differing:
            raise RunError(f"{folder}: holds scores of another {' and '.join(differing)}. Name another folder.")
        self.resumed = found is not None
        self.channels_last: bool | None = (found or {}).get("channels_last")  # how weights lay when the run began
        self.edits_at_once: int | None = (found or {}).get("edits_at_once")  # and how many edits shared a denoiser call
        self.judged_anew = found is not None and found.get("targets", []) != header["targets"]

    def operators(self) -> Operators | None:
        return read_operators(self.folder) if self.resumed else None

    def fitted(self, wanted: Collection[str]) -> Weights | None:
        kept = read_fitted(self.folder / "pointwise.safetensors")
        return kept if set(wanted) <= set(kept) else None

    def scores(self) -> list[Score]:
        """What is known already; nothing where it was judged for other targets."""
        return [] if self.judged_anew else read_scores(self.folder)

    def begin(self, operators: Operators, fitted: Weights, *, channels_last: bool, edits_at_once: int) -> None:
        """Write what scores refer to, the header last: a folder with a header is whole."""
        if not self.resumed:
            write_json(self.folder / "operators.json", operators.to_json())
        path = self.folder / "pointwise.safetensors"
        if fitted and set(read_fitted(path)) != set(fitted):
            _write_fitted(path, fitted)
        if self.judged_anew:
            for file in self.folder.glob("scores*.jsonl"):
                file.unlink()
        write_json(self.folder / "run.json", self.header | {"channels_last": channels_last, "edits_at_once": edits_at_once})

    def append(self, entry: Score) -> None:
        append_json_line(self.lines, asdict(entry))


def read_fitted(path: Path) -> Weights:
    """The weights of pointwise stand-ins; none where there is no file. Raises `RunError`."""
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
        names = [name.removesuffix(":weight") for name in tensors if name.endswith(":weight")]
        return {name: (tensors[f"{name}:weight"], tensors[f"{name}:bias"]) for name in names}
    except (OSError, KeyError, SafetensorError) as error:
        raise damaged(path, error) from error


def _write_fitted(path: Path, fitted: Weights) -> None:
    scratch = path.with_suffix(".partial")
    tensors: dict[str, torch.Tensor] = {}
    for name, (weight, bias) in fitted.items():
        tensors |= {f"{name}:weight": weight, f"{name}:bias": bias}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, scratch)
        scratch.replace(path)
    except Exception as error:
        scratch.unlink(missing_ok=True)
        if not refused_by_disk(error):
            raise
        raise ArtifactError(f"{path}: cannot be written ({error}).") from error
