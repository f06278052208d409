"""Files that are whole or absent: written aside, then renamed. No torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ldpruner.errors import ArtifactError, DataError, LDPrunerError

MARKER = ".ldpruner"  # in every folder that we wrote: only such a folder, or an empty one, is ever replaced


def cache_folder() -> Path:
    """Where samples, features, latencies and downloaded weights are kept: $LDPRUNER_CACHE, or ~/.cache/ldpruner."""
    return Path(os.environ.get("LDPRUNER_CACHE") or Path.home() / ".cache" / "ldpruner")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends well, and vanishes when it does not.

    A `target` that is empty, or that an earlier call wrote, is replaced in whole. Raises `ArtifactError` where it holds
    anything else, or the disk refuses.
    """
    scratch = _scratch_beside(target)
    try:
        yield scratch
        (scratch / MARKER).write_text("Written by ldpruner, which may replace this folder.\n", encoding="utf-8")
        _replace_folder(scratch, target)
    except LDPrunerError:
        raise
    except Exception as error:
        if not refused_by_disk(error):
            raise
        raise ArtifactError(
            f"{target}: cannot be written ({error}). Nothing was left behind; free space or name another folder."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refused_by_disk(error: BaseException) -> bool:
    """Whether the file system, not our code, is the cause; safetensors wraps the system's error in a class of its own."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def check_writable(target: Path) -> None:
    """Raise `ArtifactError` now, not after hours of work, where a folder `target` could not be written. Leaves no trace."""
    missing = [parent for parent in target.parents if not parent.exists()]
    _scratch_beside(target).rmdir()
    for parent in missing:
        parent.rmdir()


def _scratch_beside(target: Path) -> Path:
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target}: is a file; name a folder to write to.")
    if target.exists() and any(target.iterdir()) and not (target / MARKER).exists():
        raise ArtifactError(f"{target}: holds files that ldpruner did not write. Empty it, or name another folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        scratch.chmod(0o755)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror}). Name a folder that you may write to.") from error
    return scratch


def _replace_folder(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "old"
    target.rename(retired)
    try:
        scratch.rename(target)
    except OSError:
        retired.rename(target)
        raise
    finally:
        shutil.rmtree(retired.parent, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never half of it. Raises `ArtifactError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror}).") from error
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        scratch.chmod(0o644)
        scratch.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, whole or not at all."""
    write_text(path, as_json(data))


def as_json(data: Any) -> str:
    """`data` as the text of a JSON file."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def append_json_line(path: Path, data: Any) -> None:
    """Append one line and hand it to the system before returning, so that a killed run keeps it.

    A last line that a killed process left unfinished is cut first.
    """
    try:
        with path.open("a+b") as stream:
            _cut_unfinished(stream)
            stream.write(json.dumps(data, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be appended to ({error.strerror}). The lines before it are kept; free space and run again."
        ) from error


def _cut_unfinished(stream: IO[bytes]) -> None:
    if stream.seek(0, os.SEEK_END) == 0:
        return
    stream.seek(-1, os.SEEK_END)
    if stream.read(1) != b"\n":
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSONL file, which another process may be writing; a last line without its end is passed over."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line, or the `text` of every entry of a `.jsonl` file. Raises `DataError`.

    Of a `.json` file in the form of COCO's captions, one caption of every picture.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        prompts = [str(json.loads(line)["text"]) for line in lines] if path.suffix == ".jsonl" else lines
        if path.suffix == ".json":
            prompts = _first_captions(json.loads(text)["annotations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: no prompts can be read ({reason}).") from error
    if not prompts:
        raise DataError(f"{path}: holds no prompts. Write one a line.")
    return tuple(prompts)


def _first_captions(annotations: list[dict[str, Any]]) -> list[str]:
    """The caption with the lowest number of every picture, in the order of the pictures' numbers; spaces are made even."""
    first: dict[int, str] = {}
    for entry in sorted(annotations, key=lambda entry: (int(entry["image_id"]), int(entry["id"]))):
        first.setdefault(int(entry["image_id"]), " ".join(str(entry["caption"]).split()))
    return list(first.values())


def first_damaged(folder: Path) -> Path | None:
    """The first safetensors file in a folder that is cut off or was written over; None where all are whole, or it is no folder."""
    return next((file for file in sorted(folder.rglob("*.safetensors")) if not _readable(file)), None) if folder.is_dir() else None


def _readable(file: Path) -> bool:
    """Whether the header of a safetensors file accounts for every byte of it."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        if length > size - 8:
            return False
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(size == 8 + length + max(ends, default=0))
