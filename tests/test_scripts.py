"""The demo, the benchmarks and the evidence run, reduced."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldpruner import Pipeline

ROOT = Path(__file__).parent.parent
FEW = ["--samples", "4", "--steps", "2", "--score-samples", "2", "--score-steps", "1", "--distil-steps", "2", "--distil-batch", "2"]


def lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch, ldm_folder: Path, tmp_path: Path) -> Callable[..., None]:
    """Run the evidence of some methods in this process."""
    monkeypatch.syspath_prepend(ROOT / "evidence")
    places = {"--work": tmp_path, "--results": tmp_path / "results.jsonl", "--page": tmp_path / "evidence.md"}
    asked = ["fashion", "--budgets", "95%", "--seeds", "0", *FEW, "--distil-latents", "4", "--threads", "1", "--model", ldm_folder]

    def run(*methods: str) -> None:
        words = [*asked, *(word for pair in places.items() for word in pair), "--methods", *methods]
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
        runpy.run_path(str(ROOT / "evidence" / "run.py"), run_name="__main__")

    return run


@pytest.mark.slow
def test_each_method_is_measured_at_every_stage_and_a_second_run_adds_what_is_missing(
    evidence: Callable[..., None], tmp_path: Path
) -> None:
    evidence("magnitude")
    first = lines(tmp_path)
    assert [line["stage"] for line in first] == ["original", "pruned", "repaired", "distilled", "fine-tuned"]
    pruned, repaired, distilled = first[1:4]
    assert pruned["latency_ratio"] <= 0.95
    assert repaired["latent_shift_before_repair"] == pytest.approx(pruned["latent_shift"], rel=1e-3)
    assert distilled["distillation"]["steps"] == 2
    shifts = [line["figures"]["latent-shift"]["value"] for line in first]
    assert shifts[0] == 0, "the original is its own reference"
    assert all(shift > 0 for shift in shifts[1:])
    evidence("magnitude", "ends-and-spread")
    assert [(line["stage"], line.get("method")) for line in lines(tmp_path)[5:]] == [
        (stage, "ends-and-spread") for stage in ("pruned", "repaired", "distilled")
    ]
    page = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert page.count("| distilled |") == 2
    assert f"| {distilled['figures']['latent-shift']['value']:.4g} |" in page


@pytest.mark.slow
def test_the_demo_and_the_benchmarks_run_reduced(ldm_folder: Path, tmp_path: Path) -> None:
    demo = [ROOT / "examples" / "demo.py", "--out", tmp_path / "demo", "--samples", "2", "--steps", "1", "--latency", "95%"]
    cost = [ROOT / "benchmarks" / "scoring_cost.py", "--samples", "2", "--steps", "1", "--every", "20"]
    few = ["--samples", "4", "--steps", "1", "--score-samples", "2", "--score-steps", "1", "--budgets", "98%", "95%"]
    ladder = [
        ROOT / "benchmarks" / "quality_by_latency.py",
        "fashion",
        *few,
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "docs",
    ]
    for words in (demo, cost, ladder):
        line = [sys.executable, *words, "--model", ldm_folder]
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "original-above-pruned.png").stat().st_size > 0
    assert (tmp_path / "docs" / "zoo-fashion.png").stat().st_size > 0
    rungs = json.loads((tmp_path / "docs" / "zoo.json").read_text(encoding="utf-8"))["models"]["fashion"]["pruned"]
    assert [rung["budget"] for rung in rungs] == ["98%", "95%"]
    page = (tmp_path / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert f"| Latent shift ↓ |  | {rungs[0]['figures']['latent-shift']['value']:.4g} |" in page


@pytest.mark.slow
def test_the_demo_of_sound_leaves_something_to_listen_to(audio: Pipeline, tmp_path: Path) -> None:
    audio.pipe.save_pretrained(tmp_path / "tiny-audio")
    few = ["--samples", "2", "--steps", "1", "--latency", "98%", "--model", tmp_path / "tiny-audio", "--out", tmp_path / "demo"]
    line = [sys.executable, ROOT / "examples" / "demo.py", "digits", *few]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "demo" / "sounds-original").glob("*.wav"))) == 8
    assert len(list((tmp_path / "demo" / "sounds-pruned").glob("*.wav"))) == 8
    assert (tmp_path / "demo" / "original-above-pruned.png").stat().st_size > 0
