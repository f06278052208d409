"""Checkpoints of a distillation: `checkpoint-<step>/` folders of safetensors and JSON, whole or absent, no pickle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldpruner.errors import RunError
from ldpruner.files import staged_folder, write_json
from ldpruner.recovery.settings import LATEST

TENSORS = "training.safetensors"
FACTS = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder of the state after `step` steps."""

    folder: Path
    step: int

    def facts(self) -> dict[str, Any]:
        """What it was made with. Raises `RunError` where it is damaged."""
        try:
            facts: dict[str, Any] = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
            return {"made_with": dict(facts["made_with"]), "seconds": float(facts["seconds"]), "scaler": facts["scaler"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what it holds into the live tensors of the same names. Raises `RunError` where it is damaged."""
        try:
            with safe_open(self.folder / TENSORS, framework="pt") as stored:
                for name, tensor in tensors.items():
                    tensor.copy_(stored.get_tensor(name))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self._damaged(error) from error

    def check_made_with(self, wanted: Mapping[str, Any]) -> None:
        """Raise `RunError` that names the first setting in which the run that made it differs."""
        for name, found in self.facts()["made_with"].items():
            if found != wanted.get(name):
                raise RunError(
                    f"{self.folder}: was made with {name}={_short(found)}, and this run has {_short(wanted.get(name))}. "
                    "Run with that, or name another folder with --work."
                )

    def _damaged(self, error: Exception) -> RunError:
        return RunError(
            f"{self.folder}: cannot be read ({' '.join(str(error).split())[:200]}). "
            "Remove this folder to go on from the checkpoint before it."
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints in a work folder."""

    work: Path

    def all(self) -> list[Checkpoint]:
        """Every checkpoint, oldest first."""
        numbered = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.work.glob("checkpoint-*"))
        return sorted((Checkpoint(folder=path, step=int(match[1])) for match, path in numbered if match), key=lambda c: c.step)

    def chosen(self, resume_from: str | None) -> Checkpoint | None:
        """The one to go on from, None to begin. Raises `RunError` where checkpoints lie and none was asked for."""
        found = self.all()
        if resume_from is None and found:
            raise RunError(
                f"{self.work}: holds {found[-1].folder.name}. Go on from it with --resume_from_checkpoint latest, "
                "or name another folder with --work."
            )
        if resume_from is None or resume_from == LATEST:
            return found[-1] if found else None
        folder = Path(resume_from) if Path(resume_from).is_dir() else self.work / resume_from
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if not folder.is_dir() or match is None:
            raise RunError(f"resume_from_checkpoint={resume_from}: is no checkpoint-<step> folder. Say `latest`, or name one.")
        return Checkpoint(folder=folder, step=int(match[1]))

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, limit: int | None) -> None:
        """Write a checkpoint, then remove the oldest beyond `limit`. Raises `ArtifactError` where the disk refuses."""
        with staged_folder(self.work / f"checkpoint-{step}") as scratch:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch / TENSORS)
            write_json(scratch / FACTS, facts)
        for old in self.all()[:-limit] if limit else []:
            shutil.rmtree(old.folder, ignore_errors=True)

    def clear_partial(self) -> None:
        """Remove what a killed run left half-written."""
        for scratch in self.work.glob(".checkpoint-*"):
            shutil.rmtree(scratch, ignore_errors=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12]
