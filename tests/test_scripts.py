"""The demo, the benchmarks and the evidence run, reduced."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import VQModel
from PIL import Image

import ldpruner
from conftest import tiny_audio, tiny_ldm, tiny_stable_diffusion
from ldpruner import Probe
from ldpruner.files import read_json_lines
from ldpruner.opening import locate
from ldpruner.pipelines import Pipeline
from ldpruner.reporting import percent
from ldpruner.scoring import score
from ldpruner.scoring.fast import FastScorer
from ldpruner.scoring.latent import PaperScorer

ROOT = Path(__file__).parent.parent
FEW = {
    "--samples": 6,
    "--few-samples": 4,
    "--steps": 2,
    "--score-samples": 2,
    "--score-steps": 1,
    "--distil-steps": 2,
    "--distil-batch": 2,
    "--milestones": 1,
    "--taught-again": 1,
    "--task-weight": 1,
    "--guide-budget": "90%",
}


@pytest.fixture
def ldm_folder(tmp_path: Path) -> Path:
    """A pipeline of few operators: scripts do all that they do more than once."""
    tiny_ldm(small=True).save_pretrained(tmp_path / "small-ldm")
    return tmp_path / "small-ldm"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a script in this process, as if it had been typed."""

    def run(path: Path, *words: Any) -> None:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (path, *words)])
        runpy.run_path(str(path), run_name="__main__")

    return run


@pytest.fixture
def evidence(script: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the evidence of some methods in this process; every line that is there then.

    The model is tiny and untrained, of 32x32 pictures, with the judge of zoo:fashion.
    """
    monkeypatch.syspath_prepend(ROOT / "evidence")
    pictures = tmp_path / "data" / "fashion-mnist" / "train" / "bags"
    pictures.mkdir(parents=True)
    for shade in range(8):
        Image.new("L", (32, 32), 30 * shade).save(pictures / f"{shade}.png")
    pipe = tiny_ldm(small=True)
    pipe.vqvae = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=16,
    ).eval()
    pipe.save_pretrained(tmp_path / "tiny")
    shutil.copytree(Path(locate("zoo:fashion")) / "judge", tmp_path / "tiny" / "judge")
    places = {
        "--model": tmp_path / "tiny",
        "--data": tmp_path / "data",
        "--work": tmp_path / "work",
        "--results": tmp_path / "results",
        "--guides": tmp_path / "guides",
    }
    pairs = FEW | places | {"--page": tmp_path / "evidence.md", "--budgets": "95%", "--seeds": 0, "--threads": 1}

    def run(*words: str) -> list[dict[str, Any]]:
        script(ROOT / "evidence" / "run.py", "fashion", *(word for pair in pairs.items() for word in pair), *words)
        return read_json_lines(tmp_path / "results" / "fashion.jsonl")

    return run


@pytest.mark.exhaustive
def test_each_method_is_measured_at_every_stage_and_a_second_run_adds_what_is_missing(
    evidence: Callable[..., list[dict[str, Any]]], script: Callable[..., None], tmp_path: Path
) -> None:
    first = evidence("--methods", "magnitude")
    stages = ["original", "pruned", "repaired", "distilled", "fine-tuned", "from random weights", "taught again"]
    assert [line["stage"] for line in first] == stages
    original, pruned, repaired, distilled, tuned, fresh, again = first
    assert pruned["latency_ratio"] <= 0.95
    assert {line["commit"] for line in first} == {runpy.run_path(str(ROOT / "evidence" / "run.py"))["commit"]()}
    assert pruned["figures"]["4"]["latent-shift"]["value"] != repaired["figures"]["4"]["latent-shift"]["value"]
    assert distilled["distillation"]["steps"] == 2
    assert [point["steps"] for point in distilled["course"]] == [0, 1]
    assert distilled["course"][0]["figures"] == repaired["figures"]["4"], "distillation begins with what repair left"
    assert fresh["course"][0]["figures"] != distilled["course"][0]["figures"], "and here with other weights"
    shifts = [line["figures"]["6"]["latent-shift"]["value"] for line in (original, distilled, tuned, fresh)]
    assert shifts[0] == 0, "the original is its own reference"
    assert 0 < shifts[2] < shifts[3]
    assert again["operators"] == distilled["operators"], "the same plan"
    assert again["figures"] != distilled["figures"], "under another seed of distillation"
    guide = tmp_path / "guides" / "fashion.json"
    made = guide.read_bytes()
    second = evidence("--methods", "magnitude", "ends-and-spread")
    assert second[:7] == first
    assert guide.read_bytes() == made, "one guide for all"
    added = [(line["stage"], line["method"]) for line in second[7:]]
    assert added == [(stage, "ends-and-spread") for stage in ("pruned", "repaired", "distilled")]
    script(ROOT / "evidence" / "latency.py", "--model", tmp_path / "tiny", "--results", tmp_path / "results", "--rounds", 3)
    words = [
        "--model",
        tmp_path / "tiny",
        "--results",
        tmp_path / "results",
        "--plans",
        "magnitude-*",
        "--samples",
        8,
        "--steps",
        2,
    ]
    script(ROOT / "evidence" / "shifts.py", *words)
    script(ROOT / "evidence" / "page.py", "--results", tmp_path / "results", "--page", tmp_path / "evidence.md")
    shifts = json.loads((tmp_path / "results" / "shifts" / "fashion.json").read_text(encoding="utf-8"))["magnitude-95-0"]["rows"]
    assert [row["samples"] for row in shifts] == [2, 4, 8]
    alone = json.loads((tmp_path / "results" / "latencies" / "fashion.json").read_text(encoding="utf-8"))["ratios"]
    assert all(0 < ratio["predicted"] < 1 for ratio in alone.values())
    assert set(alone) == {"magnitude-95-0", "ends-and-spread-95-0", "ld-pruner-90-0"}, "the guide is a plan too"
    page = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    for method in ("magnitude", "ends-and-spread"):
        assert f"| {percent(alone[f'{method}-95-0']['value'])} |" in page
    for row in shifts:
        assert f"| {row['samples']} | {row['pruned']:.4g} | {row['repaired']:.4g} |" in page
    for line in (distilled, again):
        assert f"| {line['figures']['6']['frechet']['value']:.4g} |" in page
    named = {tmp_path / place for place in re.findall(r"!\[[^]]*\]\((evidence/[^)]+)\)", page)}
    assert len(named) == 2 + 5, "two plots, and a strip for each model that is finished"
    for file in named:
        with Image.open(file) as picture:
            assert min(picture.size) > 50


def test_how_far_predicted_latencies_are_off_is_a_share_of_the_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "evidence")
    off = runpy.run_path(str(ROOT / "evidence" / "latency.py"))["prediction_error"]
    readings = [{"predicted": 0.6, "value": 0.5}, {"predicted": 0.5, "value": 0.5}, {"predicted": 0.4, "value": 0.8}]
    assert off(readings) == pytest.approx({"median": 0.2, "worst": 0.5})


@pytest.mark.slow
def test_captions_that_no_picture_of_the_training_data_has_are_asked_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "evidence")
    made = runpy.run_path(str(ROOT / "evidence" / "run.py"))
    (tmp_path / "emoji64.zip").mkdir()
    entries = []
    for number in range(10):
        Image.new("RGB", (64, 64), (25 * number, 0, 0)).save(tmp_path / "emoji64.zip" / f"{number}.png")
        entry = {"file_name": f"{number}.png", "text": f"red {number}", "style": "google"}
        entries.append(entry | {"split": "train" if number < 2 else "test"})
    (tmp_path / "emoji64.zip" / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    places = ["--data", tmp_path, "--work", tmp_path / "work", "--results", tmp_path / "results", "--page", tmp_path / "page.md"]
    words = map(str, [*places, "--samples", 4, "--few-samples", 4, "--steps", 1])
    bench = made["Bench"]("emoji", "65%", made["arguments"](["emoji", *words]))
    assert bench.unseen == tuple(f"red {number}, google style" for number in range(2, 10))
    bench.one({"stage": "original"}, lambda: (bench.original, {}))
    (line,) = read_json_lines(tmp_path / "results" / "emoji.jsonl")
    shares = {name: figure["value"] for name, figure in line["figures"]["4"].items() if name.startswith("unseen-")}
    assert set(shares) == {"unseen-retrieval-5", "unseen-class-accuracy"}
    assert all(share * 8 == round(share * 8) for share in shares.values()), "shares of these eight, not of the four samples"


@pytest.mark.slow
def test_the_demo_and_the_benchmarks_run_reduced(script: Callable[..., None], ldm_folder: Path, tmp_path: Path) -> None:
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
        script(*words, "--model", ldm_folder)
    assert (tmp_path / "demo" / "original-above-pruned.png").stat().st_size > 0
    assert (tmp_path / "docs" / "zoo-fashion.png").stat().st_size > 0
    rungs = json.loads((tmp_path / "docs" / "zoo.json").read_text(encoding="utf-8"))["models"]["fashion"]["pruned"]
    assert [rung["budget"] for rung in rungs] == ["98%", "95%"]
    page = (tmp_path / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert f"| Latent shift ↓ |  | {rungs[0]['figures']['latent-shift']['value']:.4g} |" in page


@pytest.mark.exhaustive
def test_both_ways_of_scoring_are_counted_and_compared(
    script: Callable[..., None], ldm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--samples", "4", "--steps", "2", "--judged", "4", "--noise", "2", "--improved", "0.65"]
    script(ROOT / "benchmarks" / "scoring.py", *few, "--model", ldm_folder, "--work", tmp_path / "work")
    made = json.loads(capsys.readouterr().out)
    reference, beside = 4 * 2 + 2 * 2 + 2 * 2, 2 * 2  # four samples; two for the output's error, recorded and asked at both steps
    assert made["paper"]["passes"] == reference + made["edits"] * (4 * 2 + beside)
    assert made["times_fewer_passes"] == made["paper"]["passes"] / made["fast"]["passes"]
    assert sum(made["judged"].values()) == made["edits"]
    assert [budget["latency"] for budget in made["budgets"]] == [0.8, 0.65, 0.5]
    for budget in made["budgets"]:
        assert budget["agreed"].keys() == made["noise_of_a_logarithm"].keys() == {"seeds"}, "it takes no prompts"
        assert 0 <= budget["agreed"]["seeds"] <= 1
        ordered = {"paper, order", "paper, other seeds, order", "fast, order"}
        improved = {"fast, improved"} if budget["latency"] == 0.65 else set()
        assert budget["plans"].keys() == ordered | {"paper, sweep", "fast, sweep"} | improved
        first = budget["plans"]["paper, order"]
        assert (first["to_paper"], first["to_paper_by_halves"], first["movement_to_paper"]) == (1, [1, 1], 1)
        for name, plan in budget["plans"].items():
            assert plan["to_paper"] == plan["joint_shift"] / first["joint_shift"]
            assert all(ratio > 0 for ratio in plan["to_paper_by_halves"])
            assert ("passes" in plan) == (name not in ordered)


def test_scores_of_other_samples_are_of_other_seeds_and_then_of_other_prompts_too(tmp_path: Path) -> None:
    pipeline = Pipeline(pipe=tiny_stable_diffusion(tmp_path), source="tiny")
    probe = Probe(samples=2, num_inference_steps=1, prompts=("a red b", "a blue c"))
    run = score(pipeline, probe, method="magnitude")
    again = runpy.run_path(str(ROOT / "benchmarks" / "scoring.py"))["scored_again"](pipeline, run, 2)
    assert list(again) == ["seeds", "seeds and prompts"]
    seeds, prompts = ({key: entry.score for key, entry in scores.items()} for scores in again.values())
    assert len(seeds) == 2
    assert seeds.keys() == prompts.keys()
    assert all(seeds[key] != prompts[key] for key in seeds)


@pytest.mark.exhaustive
def test_growth_is_counted_drawn_and_told_of_a_size_that_no_machine_here_runs(
    script: Callable[..., None], ldm_folder: Path, tmp_path: Path
) -> None:
    few = ["--samples", "4", "--steps", "2", "--halvings", "1", "--no-size", "--every", "12"]
    script(ROOT / "benchmarks" / "scoring_growth.py", *few, "--model", ldm_folder, "--out", tmp_path / "growth")
    made = json.loads((tmp_path / "growth" / "growth.json").read_text())
    assert {name: [entry[key] for entry in made["points"][name]] for name, key in (("samples", "samples"), ("steps", "steps"))} == {
        "samples": [2, 4],
        "steps": [1, 2],
    }
    first, last = made["points"]["operators"]
    assert first["edits"] == math.ceil(last["edits"] / 2)
    assert last["paper"]["passes"] == PaperScorer().cost(last["edits"], Probe(samples=4, num_inference_steps=2))
    assert 0.5 < made["growth"]["steps"]["paper"]["passes"] < 1.1
    probe, small = Probe(samples=4, num_inference_steps=2), {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    size = runpy.run_path(str(ROOT / "benchmarks" / "scoring_growth.py"))["stable_diffusion"](probe, **small)
    assert size["fast_at_most"] == FastScorer().cost(size["edits"], probe) < size["edits"] * 81
    with Image.open(tmp_path / "growth" / "growth.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.slow
def test_what_scoring_costs_at_real_size_is_told_of_a_smaller_one(script: Callable[..., None], tmp_path: Path) -> None:
    few = ["--samples", 4, "--steps", 2, "--batch-size", 2, "--size", 16, "--layers", 1, "--channels", 32]
    script(ROOT / "benchmarks" / "scoring_size.py", *few, "--no-compile", "--device", "cpu", "--out", tmp_path / "size.json")
    made = json.loads((tmp_path / "size.json").read_text())
    assert made["seconds_of_a_call"].keys() == {"1", "2"}
    assert made["papers_way_each"]["passes"] == 4 * 2
    assert 0.5 < statistics.median(made["generation_to_its_calls"]) < 5
    fast = made["fast_way"]
    assert sum(fast["judged"].values()) == fast["edits"] > 40
    probe = Probe(samples=4, num_inference_steps=2)
    assert FastScorer().fixed(probe) < fast["passes"] <= FastScorer().cost(fast["edits"], probe) + 4 * 48 + 8, (
        "fitting, and a trial"
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", ["sd15", "sdxl"])
def test_the_whole_way_at_real_size_is_watched_in_small(size: str, tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "real_size.py"))
    small = {"sample_size": 16, "block_out_channels": (32,) * (4 if size == "sd15" else 3), "attention_head_dim": 8}
    made["UNETS"][size].update(small | ({} if size == "sd15" else {"transformer_layers_per_block": 1}))
    made["write_folder"](size, tmp_path / "original")
    asked = {"height": 128, "width": 128} if made["CALLS"][size] else {}
    found = made["whole_way"](tmp_path / "original", tmp_path, 3, asked)
    assert list(found["stages"])[:3] == ["load", "one call", "inspect"]
    assert list(found["stages"])[-3:] == ["save", "load again", "one generation step"]
    for stage in found["stages"].values():
        assert -1e-3 < stage["seconds_beside_the_model"] <= stage["seconds"]
        assert stage["peak_bytes"] > found["limit"]["weights"] > 0
    assert found["latency_ratio"] < 0.9
    assert found["edits"] > 5
    counted = made["counted"](made["UNETS"][size])
    assert counted["params"] == sum(p.numel() for p in ldpruner.load(tmp_path / "original").denoiser.parameters())
    assert 0 < counted["macs_but_for_attention"] < counted["macs"]


@pytest.mark.exhaustive
def test_several_processes_are_timed_against_one(
    script: Callable[..., None], ldm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--samples", "2", "--steps", "1", "--every", "12", "--rounds", "1"]
    script(ROOT / "benchmarks" / "scoring_processes.py", *few, "--model", ldm_folder)
    made = json.loads(capsys.readouterr().out)
    (one,), (two,) = made["seconds"]["1"], made["seconds"]["2"]
    assert made["times_faster"] == one / two
    assert made["ideal"] > 0


@pytest.mark.slow
def test_predicted_latencies_are_compared_with_those_measured_twice(
    script: Callable[..., None], ldm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--plans", "3", "--calibration", "2", "--rounds", "3"]
    script(ROOT / "benchmarks" / "latency_model.py", *few, "--model", ldm_folder)
    made = json.loads(capsys.readouterr().out)
    assert made["calibration"]["plans"] == 2
    assert len(made["plans"]) == 3
    for plan in made["plans"]:
        assert plan["error"] == pytest.approx(abs(plan["predicted"] - plan["measured"]) / plan["measured"])
        assert plan["predicted"] != plan["predicted_by_hooks"]
    assert made["errors"]["error"]["worst"] == max(plan["error"] for plan in made["plans"])


@pytest.mark.exhaustive
def test_the_demo_of_sound_leaves_something_to_listen_to(script: Callable[..., None], tmp_path: Path) -> None:
    tiny_audio(small=True).save_pretrained(tmp_path / "tiny-audio")
    few = ["--samples", "2", "--steps", "1", "--latency", "98%", "--model", tmp_path / "tiny-audio", "--out", tmp_path / "demo"]
    script(ROOT / "examples" / "demo.py", "digits", *few)
    assert len(list((tmp_path / "demo" / "sounds-original").glob("*.wav"))) == 8
    assert len(list((tmp_path / "demo" / "sounds-pruned").glob("*.wav"))) == 8
    assert (tmp_path / "demo" / "original-above-pruned.png").stat().st_size > 0
