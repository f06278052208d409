"""The evidence run, reduced: every stage of a method beside the controls, one line a result, and nothing made twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FEW = ["--samples", "4", "--steps", "2", "--score-samples", "2", "--score-steps", "1", "--distil-steps", "2", "--distil-batch", "2"]


def lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def run(model: Path, work: Path, *more: str) -> None:
    places = ["--work", work, "--results", work / "results.jsonl", "--page", work / "evidence.md", "--model", model]
    asked = ["fashion", "--budgets", "95%", "--seeds", "0", *FEW, "--distil-latents", "4", "--threads", "1", *more]
    words = [sys.executable, ROOT / "evidence" / "run.py", *asked, *places]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_each_method_is_measured_at_every_stage_and_a_second_run_adds_what_is_missing(ldm_folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(ldm_folder, work, "--methods", "magnitude")
    first = lines(work)
    assert [line["stage"] for line in first] == ["original", "pruned", "repaired", "distilled", "fine-tuned"]
    pruned, repaired, distilled = first[1:4]
    assert pruned["latency_ratio"] <= 0.95
    assert repaired["latent_shift_before_repair"] == pytest.approx(pruned["latent_shift"], rel=1e-3)
    assert distilled["distillation"]["steps"] == 2
    shifts = [line["figures"]["latent-shift"]["value"] for line in first]
    assert shifts[0] == 0, "the original is its own reference"
    assert all(shift > 0 for shift in shifts[1:])
    run(ldm_folder, work, "--methods", "magnitude", "ends-and-spread")
    assert [(line["stage"], line.get("method")) for line in lines(work)[5:]] == [
        (stage, "ends-and-spread") for stage in ("pruned", "repaired", "distilled")
    ]
    page = (work / "evidence.md").read_text(encoding="utf-8")
    assert page.count("| distilled |") == 2
    assert f"| {distilled['figures']['latent-shift']['value']:.4g} |" in page
