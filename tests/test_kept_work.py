"""A full disk and an interruption lose nothing that was computed before."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import BY_PAPER, PROBING, Command
from ldpruner.scoring.latent import PaperScorer
from refusing import BUDGET, Refused, copied, everything_in, the_line

pytestmark = pytest.mark.usefixtures("in_place")


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """A file that grows beyond `size` bytes is refused by the system in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_neither_half_a_folder_nor_harm_to_the_one_before(
    refused: Refused, command: Command, tmp_path: Path
) -> None:
    by_plan = ("prune", "ldm", "--plan", "plan.json", "--out")
    assert command(*by_plan, tmp_path / "earlier")[0] == 0
    before = everything_in(tmp_path)
    for out in (tmp_path / "earlier", tmp_path / "new"):
        with disk_full_after(20_000):
            message = refused(*by_plan, out)
        assert message.startswith(f"{out}: cannot be written (")
        assert message.endswith("File too large (os error 27)). Nothing was left behind; free space or name another folder.")
    assert everything_in(tmp_path) == before


def test_a_disk_that_fills_while_scoring_keeps_the_scores_for_the_next_try(
    refused: Refused, command: Command, tmp_path: Path
) -> None:
    run = copied("run", tmp_path)
    lines = (run / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (run / "scores.jsonl").write_bytes(b"".join(lines[:50]))
    room = sum(map(len, lines[:53])) + 40
    again = ("score", "ldm", "--out", run, *BY_PAPER)
    with disk_full_after(room):
        message = refused(*again)
    expected = "scores.jsonl: cannot be appended to (File too large). The lines before it are kept; free space and run again."
    assert message == f"{run}/{expected}"
    assert (run / "scores.jsonl").stat().st_size == room, "a line was cut in the middle"
    code, _, _ = command(*again)
    assert code == 0
    keys = [[json.loads(line)[key] for key in ("operator", "replacement", "score")] for line in lines]
    resumed = [json.loads(line) for line in (run / "scores.jsonl").read_bytes().splitlines()]
    assert [[line[key] for key in ("operator", "replacement", "score")] for line in resumed] == keys
    assert sorted(path.name for path in run.iterdir()) == ["operators.json", "pointwise.safetensors", "run.json", "scores.jsonl"]


def test_a_disk_that_fills_while_the_fast_way_measures_loses_no_measurement(
    refused: Refused, command: Command, tmp_path: Path
) -> None:
    run, words = tmp_path / "run", ("--method", "fast", "--replacements", "identity", "--budget", "macs=80%", *PROBING)
    assert command("score", "ldm", "--out", tmp_path / "whole", *words)[0] == 0
    whole = (tmp_path / "whole" / "measured-0.jsonl").read_bytes().splitlines()
    run.mkdir()
    for name in ("operators.json", "run.json"):
        (run / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    half = b"".join(line + b"\n" for line in whole[: len(whole) // 2])
    (run / "measured-0.jsonl").write_bytes(half)
    with disk_full_after(len(half) + 40):
        message = refused("score", "ldm", "--out", run, *words)
    expected = "measured-0.jsonl: cannot be appended to (File too large). The lines before it are kept; free space and run again."
    assert message == f"{run}/{expected}"
    assert command("score", "ldm", "--out", run, *words)[0] == 0
    measured = [json.loads(line) for line in (run / "measured-0.jsonl").read_bytes().splitlines()]
    assert len(measured) == len(whole), "nothing is measured twice"


def test_a_disk_that_is_full_from_the_start_leaves_no_run(refused: Refused, tmp_path: Path) -> None:
    with disk_full_after(1000):
        message = refused("score", "ldm", "--out", tmp_path / "run", *BY_PAPER, "--replacements", "zero")
    assert message == f"{tmp_path / 'run' / 'operators.json'}: cannot be written (File too large)."
    assert list((tmp_path / "run").iterdir()) == []


def test_an_interrupted_command_says_so_and_keeps_its_scores(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scores = PaperScorer.scores

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for count, score in enumerate(scores(*arguments, **options)):
            if count == 2:
                raise KeyboardInterrupt
            yield score

    run = copied("run", tmp_path)
    (run / "scores.jsonl").unlink()
    monkeypatch.setattr(PaperScorer, "scores", interrupted)
    code, out, err = command("prune", "ldm", *BUDGET, "--out", tmp_path / "out", "--run", run, *BY_PAPER)
    assert (code, out) == (130, "")
    assert the_line(err) == "interrupted; what was written so far is kept."
    assert len((run / "scores.jsonl").read_bytes().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "run"]
