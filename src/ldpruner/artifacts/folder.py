"""Saving a pipeline so that plain diffusers loads it bit for bit, or fails and says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldpruner import cards, ldpruner_v1, sharing
from ldpruner.artifacts.dense import densify
from ldpruner.card_text import RECORD
from ldpruner.errors import ArtifactError
from ldpruner.files import staged_folder, write_json
from ldpruner.forms import check_form
from ldpruner.opening import FORMAT_MODULE
from ldpruner.pipelines import Pipeline
from ldpruner.plans import PLAN, Plan
from ldpruner.probes import Probe
from ldpruner.recovery import Distilled
from ldpruner.surgery import Fitted, removed_operators


def save(
    pipeline: Pipeline,
    pruned: nn.Module,
    plan: Plan | None,
    out: str | os.PathLike[str],
    *,
    form: str = "portable",
    record: Mapping[str, Any] | None = None,
    fitted: Fitted | None = None,
) -> None:
    """Write `pipeline` around the denoiser `pruned` to `out`, with `pruning_plan.json` where there is a plan, `record.json`,
    a card, and its own `prompts.txt` and `generation.json`.

    The folder is written aside and renamed: it is whole or absent. Raises `ArtifactError` where the disk refuses, or the
    dense form cannot hold an edit.
    """
    check_form(form)
    out = Path(out)
    if form == "dense" and (removed_operators(pipeline.denoiser) or (plan is None and removed_operators(pruned))):
        raise ArtifactError("the dense form is made from the original's weights, which are not at hand. Save as portable.")
    denoiser = pruned
    if form == "dense" and plan is not None:
        denoiser = densify(pipeline.denoiser, plan, pipeline.call(plan.probe or Probe()), fitted=fitted)
    with staged_folder(out) as scratch:
        with pipeline.with_denoiser(denoiser):
            pipeline.pipe.save_pretrained(scratch)
        for name, part in {**pipeline.pipe.components, pipeline.component: denoiser}.items():
            if form == "portable" and removed_operators(part):
                _make_portable(scratch, name)
        for name, file in pipeline.own_files().items():
            shutil.copyfile(file, scratch / name)
        if plan is not None:
            plan.save(scratch / PLAN)
        write_json(scratch / RECORD, {"form": form, **_origin(pipeline, record or {}), **(record or {})})
        inherited = cards.base_header(pipeline.source, pipeline.folder)
        cards.write(scratch, name=out.name, inherited=inherited, there=cards.own_text(out))


def _origin(pipeline: Pipeline, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline does, the part that is pruned, and where it came from, unless the record says."""
    base_model = pipeline.source if sharing.is_hub_id(pipeline.source) else None
    origin = {} if "base" in record else {"base": pipeline.source, "base_model": base_model}
    return {**origin, "task": pipeline.task, "component": pipeline.component}


def save_denoiser(denoiser: nn.Module, out: str | os.PathLike[str], *, form: str = "portable") -> None:
    """Write a pruned denoiser alone to `out`, to be loaded by `diffusers.AutoModel.from_pretrained`.

    The folder is written aside and renamed: it is whole or absent. For the dense form give what `densify` made. Raises
    `ArtifactError` where the disk refuses.
    """
    check_form(form)
    if form == "dense" and removed_operators(denoiser):
        raise ArtifactError("the dense form is made from the original's weights: give what `densify` makes of it.")
    with staged_folder(Path(out)) as scratch:
        saved: Any = denoiser
        saved.save_pretrained(scratch)
        if form == "portable" and removed_operators(denoiser):
            config_file = scratch / "config.json"
            config = json.loads(config_file.read_text(encoding="utf-8"))
            write_json(config_file, {**config, "auto_map": {"AutoModel": f"{FORMAT_MODULE}.{config['_class_name']}"}})
            _put_loader_in(scratch)


def save_distilled(distilled: Distilled, out: str | os.PathLike[str], *, form: str | None = None) -> str:
    """Write a student that has learnt to `out` with the plan and record that its folder had; the form that it has now.

    The form is the student's own unless another is asked for; what was not pruned loads anywhere, as dense does. The latent
    shift in the student's record was measured before, and is renamed to say so.
    """
    student, folder = distilled.pipeline, distilled.pipeline.folder
    record = _record_in(folder)
    own = record.pop("form", "portable")
    pruned = bool(removed_operators(student.denoiser))
    form = form or (own if pruned else "dense")
    if "latent_shift" in record:
        record["latent_shift_before_distillation"] = record.pop("latent_shift")
    learnt = distilled.record | ({"before": record["distillation"]} if "distillation" in record else {})
    plan = Plan.load(folder / PLAN) if pruned and folder is not None and (folder / PLAN).is_file() else None
    save(student, distilled.denoiser, plan, out, form=form, record={**record, "distillation": learnt})
    return form


def _record_in(folder: Path | None) -> dict[str, Any]:
    if folder is None or not (folder / RECORD).is_file():
        return {}
    try:
        record: dict[str, Any] = dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{folder / RECORD}: cannot be read ({error}). Remove it, or mend it.") from error
    return record


def _make_portable(folder: Path, component: str) -> None:
    """Name our file as the denoiser's library, and put it beside the weights."""
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index[component][0] = FORMAT_MODULE
    write_json(index_file, index)
    _put_loader_in(folder / component)


def _put_loader_in(folder: Path) -> None:
    assert ldpruner_v1.__file__ is not None
    shutil.copyfile(ldpruner_v1.__file__, folder / f"{FORMAT_MODULE}.py")
