"""The model card of a saved folder, written from what it says of itself, with a header in the Hub's terms. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldpruner import card_text, sharing
from ldpruner.card_text import EVALUATION, RECORD, Saved
from ldpruner.errors import ArtifactError, DataError, LDPrunerError
from ldpruner.files import as_json, write_json, write_text
from ldpruner.markdown import MARKER, header_of, merged, with_header
from ldpruner.sharing import CARD

LICENCE = ("license", "license_name", "license_link")
TAGS = ("ldpruner", "pruning")
TELLING = (RECORD, EVALUATION, sharing.INDEX)  # with each part's config.json, the files that say where things were loaded from
# What a pipeline does, as the Hub calls it; it has no task for unconditional sound or video, nor for classes.
HUB_TASKS = {"unconditional image": "unconditional-image-generation"} | {
    name: name for name in ("text-to-image", "text-to-video", "text-to-audio", "image-to-image", "image-to-video")
}


def write(
    folder: Path,
    *,
    name: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    inherited: Mapping[str, Any] | None = None,
    there: str | None = None,
) -> dict[str, Any]:
    """Write the card of a saved folder into it; its header.

    What a user wrote below the marker stays, of the card that is there or of `there`, and so does what the header says beyond
    what is written here. `inherited` is the header of the base model's card, looked for where it is not given. Raises
    `ArtifactError` where README.md is someone else's.
    """
    saved = Saved.open(folder)
    header = _header(saved, name or folder.name, license, base_model, inherited)
    new = with_header(header, card_text.body(saved, name or folder.name, header))
    text = merged(new, there or saved.card)
    if text is None:
        raise ArtifactError(
            f"{folder / CARD}: was not written by ldpruner, and stays. Rename it, or put this line above what to keep: {MARKER}"
        )
    write_text(folder / CARD, text)
    return header_of(text)


def shareable(folder: Path, name: str) -> dict[str, Path | str]:
    """The files of a saved folder as they go to the repository `name`: the card loads it from there, and no path of this machine
    is told.
    """
    saved = Saved.open(folder)
    header = _header(saved, name, None, None, None)
    files: dict[str, Path | str] = {**sharing.files_in(folder)}
    for part in [each for each in files if each in TELLING or each.endswith("/config.json")]:
        files[part] = as_json(_without_places(json.loads((folder / part).read_text(encoding="utf-8"))))
    card = merged(with_header(header, card_text.body(saved, name, header)), saved.card)
    return files if card is None else {**files, CARD: card}


def _without_places(data: Any) -> Any:
    """JSON whose absolute paths are cut to their last part; diffusers, too, writes down where a part was loaded from."""
    if isinstance(data, dict):
        return {key: _without_places(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_places(value) for value in data]
    return Path(data).name if isinstance(data, str) and Path(data).is_absolute() else data


def own_text(folder: Path) -> str | None:
    """What a user wrote into the card of a folder that is about to be replaced; None where that is nothing."""
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    own = card.partition(MARKER)[2]
    return MARKER + own if own.strip() else None


def base_header(source: str, folder: Path | None = None) -> dict[str, Any]:
    """The header of the base model's own card, from its folder or the Hub; empty where it cannot be had."""
    zoo = Path(__file__).parent / "zoo" / source.removeprefix("zoo:")
    place = zoo if source.startswith("zoo:") else folder or Path(source)
    try:
        if not (place / CARD).is_file() and sharing.is_hub_id(source):
            return sharing.header_there(source)
        return header_of((place / CARD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, LDPrunerError):
        return {}


def keep_evaluation(folder: Path, file: Path) -> None:
    """Keep what `ldpruner evaluate --json` printed in a saved folder, for its card to show. Raises `DataError`."""
    try:
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        model = Path(evaluation["models"][0]["model"])
        figures = evaluation["models"][0]["figures"]
        complete = all({"metric", "title", "value", "samples", "better"} <= figure.keys() for figure in figures)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{file}: is no evaluation ({reason}). Make one with `ldpruner evaluate {folder} --json`.") from error
    if not figures or not complete:
        raise DataError(f"{file}: holds no figures of {model}. Make them with `ldpruner evaluate {folder} --json`.")
    if model.is_dir() and model.resolve() != folder.resolve():
        raise DataError(f"{file}: is about {model}, and this is {folder}.")
    write_json(folder / EVALUATION, evaluation)


def _header(
    saved: Saved, name: str, license: str | None, base_model: str | None, inherited: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What was asked for, else what the header says already, else what the record and the base model's card say."""
    there = {key: value for key, value in saved.header.items() if key != "model-index"}
    if inherited is None and license is None and "license" not in there:
        inherited = base_header(str(saved.record.get("base", "")))
    found = {key: value for key, value in (inherited or {}).items() if key in (*LICENCE, "pipeline_tag")}
    tag = HUB_TASKS.get(str(saved.record.get("task")))
    header = {"base_model": saved.record.get("base_model"), **({"pipeline_tag": tag} if tag else {}), **found, **there}
    if license is not None:
        header = {key: value for key, value in header.items() if key not in LICENCE} | {"license": license}
    first = {"library_name": "diffusers", "base_model": base_model or header.pop("base_model")}
    header = first | header | {**first, "tags": [*dict.fromkeys([*TAGS, *there.get("tags", [])])]}
    results = _results(saved, str(header.get("pipeline_tag") or "other"))
    if results:
        header |= {"model_name": name.rpartition("/")[2], "eval_results": results}
    return {key: value for key, value in header.items() if value}


def _results(saved: Saved, task: str) -> list[Any]:
    """The figures of an evaluation as the Hub keeps them."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            dataset_type=figure.kind,
            dataset_name=figure.compared,
            metric_type=figure.said["metric"],
            metric_name=figure.said["title"],
            metric_value=figure.said["value"],
            metric_args={key: figure.said[key] for key in ("samples", "reference", "features", "error") if figure.said.get(key)},
        )
        for figure in saved.figures()
    ]
