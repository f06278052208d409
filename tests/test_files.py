"""Files are whole or absent, and what someone else wrote is never replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldpruner.errors import ArtifactError
from ldpruner.files import append_json_line, check_writable, read_json_lines, staged_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_staged_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "deep" / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert names(tmp_path / "deep") == ["out"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("old")

    def fails() -> None:
        with staged_folder(tmp_path / "out") as scratch:
            (scratch / "a").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match=r"out: cannot be written \(.*No space left on device\)\. Nothing was left behind"):
        fails()
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_our_own_folder_is_replaced_in_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with staged_folder(tmp_path / "out") as scratch:
            (scratch / name).write_text("x")
    assert names(tmp_path / "out") == [".ldpruner", "second"]
    assert names(tmp_path) == ["out"]


def test_a_folder_with_files_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds files that ldpruner did not write"):
        check_writable(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def test_an_empty_folder_is_fine(tmp_path: Path) -> None:
    check_writable(tmp_path)
    with staged_folder(tmp_path / "empty"):
        pass
    assert names(tmp_path) == ["empty"]


def test_a_text_is_written_whole_and_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.json", "one")
    write_text(tmp_path / "plan.json", "two")
    assert (tmp_path / "plan.json").read_text() == "two"
    assert names(tmp_path) == ["plan.json"]


def test_lines_survive_a_process_that_died_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    append_json_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    left = path.read_bytes()
    assert read_json_lines(path) == [{"a": 1}]
    assert path.read_bytes() == left, "to read changes nothing: the other process may be alive"
    append_json_line(path, {"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]
