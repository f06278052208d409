"""Saving a pipeline so that plain diffusers loads it bit for bit, or fails and says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldpruner import ldpruner_v1
from ldpruner.artifacts.dense import densify
from ldpruner.errors import UnknownNameError, suggest
from ldpruner.files import staged_folder, write_json
from ldpruner.pipelines import FORMAT_MODULE, Pipeline
from ldpruner.plans import Plan
from ldpruner.surgery import Fitted, removed_operators

FORMS = {
    "portable": "loads in plain diffusers with trust_remote_code=True, nothing to install",
    "plugin": "loads in plain diffusers after `import ldpruner`, no code in the folder",
    "dense": "loads anywhere with the same output, at the original's size and speed",
}


def save(
    pipeline: Pipeline,
    pruned: nn.Module,
    plan: Plan,
    out: Path,
    *,
    form: str = "portable",
    record: Mapping[str, Any] | None = None,
    fitted: Fitted | None = None,
) -> None:
    """Write `pipeline` around the denoiser `pruned` to `out`, with `pruning_plan.json`, `record.json`, and its own
    `prompts.txt` and `generation.json`.

    The folder is written aside and renamed: it is whole or absent. Raises `ArtifactError` where the disk refuses, or the
    dense form cannot hold an edit.
    """
    check_form(form)
    denoiser = densify(pipeline, plan, fitted=fitted) if form == "dense" else pruned
    with staged_folder(out) as scratch:
        with pipeline.with_denoiser(denoiser):
            pipeline.pipe.save_pretrained(scratch)
        if form == "portable" and removed_operators(denoiser):
            _make_portable(scratch, pipeline.component)
        for name, file in pipeline.own_files().items():
            shutil.copyfile(file, scratch / name)
        plan.save(scratch / "pruning_plan.json")
        write_json(scratch / "record.json", {"form": form, "base": pipeline.source, **(record or {})})


def check_form(form: str) -> None:
    """Raise `UnknownNameError` for a form that does not exist."""
    if form not in FORMS:
        raise UnknownNameError(f"form {form!r} is unknown: {suggest(form, FORMS)}")


def loading_lines(out: str, form: str) -> str:
    """The lines of Python that load a saved folder in plain diffusers."""
    trust = ", trust_remote_code=True" if form == "portable" else ""
    first = "import ldpruner\n" if form == "plugin" else ""
    return f'{first}from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{out}"{trust})'


def _make_portable(folder: Path, component: str) -> None:
    """Name our file as the denoiser's library, and put it beside the weights."""
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index[component][0] = FORMAT_MODULE
    write_json(index_file, index)
    assert ldpruner_v1.__file__ is not None
    shutil.copyfile(ldpruner_v1.__file__, folder / component / f"{FORMAT_MODULE}.py")
