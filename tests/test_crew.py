"""Several processes at one run: who measures what, and that all find what one would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_ldm
from ldpruner import Probe, load, score
from ldpruner.errors import RunError
from ldpruner.processes import Crew
from ldpruner.scoring import Run

WORDS = ("--samples", "6", "--steps", "2", "--replacements", "identity,zero,shortcut", "--device", "cpu")


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    tiny_ldm(small=True).save_pretrained(tmp_path / "small-ldm")
    return tmp_path / "small-ldm"


def started(folder: Path, out: Path, *words: str, processes: int) -> subprocess.Popen[str]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    call = [sys.executable, *launch, "-m", "ldpruner", "score", str(folder), "--out", str(out), *WORDS, *words]
    settings = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


def finished(child: subprocess.Popen[str]) -> str:
    printed, complaints = child.communicate(timeout=240)
    assert child.returncode == 0, complaints[-2000:]
    return printed


def values(run: Run) -> dict[tuple[str, str], float]:
    return {entry.key: entry.score for entry in run.scores}


def lines(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob(pattern)) for line in file.read_text().splitlines()]


def keys(entries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return sorted((entry.get("kind", ""), entry["operator"], entry["replacement"]) for entry in entries)


def test_tasks_are_shared_out_one_by_one() -> None:
    tasks = list(range(7))
    assert [list(Crew(rank, 3).share(tasks)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    alone = Crew()
    assert alone.leads
    assert alone.share(tasks) == tasks
    assert alone.gathered({"a": 1}) == {"a": 1}
    assert alone.leaders("mine") == "mine"


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Crew.joined(cpu=True) == Crew()


def test_accelerate_that_starts_one_process_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RunError, match=r"Say torchrun --nproc_per_node N -m ldpruner score"):
        Crew.joined(cpu=True)


def alone(folder: Path, out: Path, **settings: Any) -> Run:
    """The same run by one process, this one."""
    probe = Probe(samples=6, num_inference_steps=2)
    return score(load(folder), probe, replacements=["identity", "zero", "shortcut"], out=out, **settings)


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_each_measures_its_part(small_folder: Path, tmp_path: Path) -> None:
    one = alone(small_folder, tmp_path / "one", method="fast", budget={"macs": "80%"})
    two = tmp_path / "two"
    printed = finished(started(small_folder, two, "--method", "fast", "--budget", "macs=80%", "--json", processes=2))
    assert json.loads(printed)["scores"] == len(one.scores), "and one of them prints"
    assert values(Run.load(two)) == pytest.approx(values(one), rel=1e-5)
    mine, others = (lines(two, f"measured-{rank}.jsonl") for rank in (0, 1))
    assert abs(len(mine) - len(others)) <= 8
    assert keys([*mine, *others]) == keys(lines(tmp_path / "one", "measured-*.jsonl")), "nothing was measured twice"


@pytest.mark.exhaustive
def test_a_run_of_two_that_was_killed_is_ended_by_one(ldm_folder: Path, tmp_path: Path) -> None:
    out, budget = tmp_path / "run", {"macs": "80%"}
    child = started(ldm_folder, out, "--method", "fast", "--budget", "macs=80%", processes=2)
    deadline = time.monotonic() + 120
    while len(lines(out, "measured-*.jsonl")) < 6 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert len(lines(out, "measured-*.jsonl")) >= 6
    ended = alone(ldm_folder, out, method="fast", budget=budget)
    whole = alone(ldm_folder, tmp_path / "whole", method="fast", budget=budget)
    assert values(Run.load(out)) == values(ended) == pytest.approx(values(whole), rel=1e-5)
    measured = keys(lines(tmp_path / "whole", "measured-*.jsonl"))
    assert keys(lines(out, "measured-*.jsonl")) == measured, "and nothing was measured twice"
