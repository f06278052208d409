"""What a run folder says: what was scored, how, and the scores; all but the weights of its stand-ins. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldpruner.errors import ArtifactError, RunError
from ldpruner.files import read_json_lines
from ldpruner.plans import SCHEMA, Operators, Score
from ldpruner.probes import Probe


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What can be replaced in a denoiser, what each replacement does, and how that was measured."""

    source: str
    method: str
    probe: Probe
    operators: Operators
    scores: tuple[Score, ...]
    weights: str  # digest of the denoiser that was scored

    def check_weights(self, weights: str, source: str) -> None:
        """Raise `RunError` where the weights of `source` are not those that were scored."""
        if weights != self.weights:
            raise RunError(f"{source}: its weights are not those that were scored as {self.source}. Score it anew.")


def read_scored(folder: Path) -> Scored:
    """What a run folder says. Raises `RunError` where it is none."""
    header = read_header(folder)
    if header is None:
        raise RunError(f"{folder}: is no run folder (no run.json). Make one with `ldpruner score MODEL --out {folder}`.")
    try:
        source, method, weights = header["source"], header["method"], header["weights"]
        probe = Probe.from_json(header["probe"])
    except (KeyError, TypeError) as error:
        raise damaged(folder / "run.json", error) from error
    operators, scores = read_operators(folder), tuple(read_scores(folder))
    return Scored(source=source, method=method, probe=probe, operators=operators, scores=scores, weights=weights)


def read_header(folder: Path) -> dict[str, Any] | None:
    """`run.json`, which says what was scored and how; None where there is none."""
    path = folder / "run.json"
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(header, dict):
        raise RunError(f"{path}: is no header of a run. Score again into a new folder.")
    if header.get("schema") != SCHEMA:
        raise RunError(f"{path}: schema {header.get('schema')!r} is unknown: this version reads {SCHEMA}.")
    return header


def read_operators(folder: Path) -> Operators:
    """`operators.json`. Raises `RunError` where it cannot be read."""
    path = folder / "operators.json"
    try:
        return Operators.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error


def read_scores(folder: Path) -> list[Score]:
    """The lines of `scores.jsonl`, and of its siblings where several processes scored; none where nothing is scored yet.

    Raises `RunError` where they cannot be read.
    """
    found: dict[tuple[str, str], Score] = {}
    for path in sorted(folder.glob("scores*.jsonl")):
        try:
            found |= {entry.key: entry for entry in (Score(**line) for line in read_json_lines(path))}
        except ArtifactError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise damaged(path, error) from error
    return list(found.values())


def damaged(path: Path, error: Exception) -> RunError:
    """The error of a file in a run folder that does not read as it should."""
    reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return RunError(f"{path}: cannot be read ({reason}). Score again into a new folder.")
