"""Runs a scorer over every operator and keeps what it gives: a folder that can be resumed, and planned from again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldpruner.errors import ArtifactError, OperatorError, RunError
from ldpruner.files import append_json_line, refused_by_disk, write_json
from ldpruner.fitting import Weights, fit_pointwise, pointwise_wanted
from ldpruner.operators import discover
from ldpruner.operators.tracing import weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import SCHEMA, Edit, Operators, Score
from ldpruner.probes import Probe
from ldpruner.replacements import REPLACEMENTS
from ldpruner.runs import Scored, damaged, read_header, read_operators, read_scored, read_scores
from ldpruner.scoring.base import SCORERS

Progress = Callable[[Iterable[Score], int, int], Iterable[Score]]  # scores to come, done before, in all


@dataclass(frozen=True, kw_only=True)
class Run(Scored):
    """Everything that a plan needs: what was scored, and the weights of fitted stand-ins."""

    fitted: Weights
    folder: Path | None = None

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run folder. Raises `RunError` where it is none."""
        scored = read_scored(folder)
        return cls(**vars(scored), fitted=_read_fitted(folder / "pointwise.safetensors"), folder=folder)


def score(
    pipeline: Pipeline,
    probe: Probe,
    *,
    method: str = "paper",
    replacements: Sequence[str] | None = None,
    operators: Operators | None = None,
    out: Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Run:
    """Score every operator with every replacement that fits it, and return the run.

    With `out`, each score is appended there as it comes, and what an earlier run left there is kept. `replacements` limits
    what is tried. Raises `RunError` where `out` holds scores of other weights, another probe or another method.
    """
    scorer = SCORERS[method]()
    if probe.samples < 2:
        raise RunError(f"samples={probe.samples}: a standard deviation over samples needs 2 or more.")
    for name in replacements or ():
        REPLACEMENTS[name]
    probe = pipeline.completed(probe)
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "source": pipeline.source,
        "method": method,
        "probe": probe.to_json(),
        "weights": weights_digest(pipeline.denoiser),
    }
    store = _Store(out, header) if out else None
    operators = operators or (store and store.operators()) or discover(pipeline.denoiser, pipeline.call(probe))
    edits = [Edit(operator=o.name, replacement=c.replacement, options=c.options) for o, c in operators.pairs(replacements)]
    if not edits:
        raise OperatorError(f"{pipeline.source}: none of {', '.join(replacements or REPLACEMENTS)} fits any operator.")
    done = store.scores() if store else []
    known = {entry.key for entry in done}
    to_do = [edit for edit in edits if (edit.operator, edit.replacement) not in known]
    wanted = pointwise_wanted(edits)
    fitted = (store and store.fitted(wanted)) or fit_pointwise(pipeline, wanted, probe, batch_size=batch_size)
    if store:
        store.begin(operators, fitted)
    coming = scorer.scores(pipeline, to_do, probe, fitted=fitted, batch_size=batch_size) if to_do else iter(())
    scores = list(done)
    for entry in progress(coming, len(done), len(edits)) if progress else coming:
        scores.append(entry)
        if store:
            store.append(entry)
    asked = {(edit.operator, edit.replacement) for edit in edits}
    return Run(
        source=pipeline.source,
        method=method,
        probe=probe,
        operators=operators,
        scores=tuple(entry for entry in scores if entry.key in asked),
        fitted=fitted,
        weights=header["weights"],
        folder=out,
    )


class _Store:
    """A run folder: `run.json`, `operators.json`, `pointwise.safetensors`, and `scores.jsonl` that only ever grows."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.header = header
        found = read_header(folder)
        differing = [key for key in ("weights", "probe", "method") if found and found.get(key) != header[key]]
        if differing:
            raise RunError(f"{folder}: holds scores of another {' and '.join(differing)}. Name another folder.")
        self.resumed = found is not None

    def operators(self) -> Operators | None:
        return read_operators(self.folder) if self.resumed else None

    def fitted(self, wanted: dict[str, Any]) -> Weights | None:
        kept = _read_fitted(self.folder / "pointwise.safetensors")
        return kept if set(wanted) <= set(kept) else None

    def scores(self) -> list[Score]:
        return read_scores(self.folder)

    def begin(self, operators: Operators, fitted: Weights) -> None:
        """Write what scores refer to, the header last: a folder with a header is whole."""
        if not self.resumed:
            write_json(self.folder / "operators.json", operators.to_json())
        path = self.folder / "pointwise.safetensors"
        if fitted and set(_read_fitted(path)) != set(fitted):
            _write_fitted(path, fitted)
        write_json(self.folder / "run.json", self.header)

    def append(self, entry: Score) -> None:
        append_json_line(self.folder / "scores.jsonl", asdict(entry))


def _read_fitted(path: Path) -> Weights:
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
