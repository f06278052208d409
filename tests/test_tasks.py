"""Every stage works for text-to-image, for unconditional pictures and for sound, on the command line as in Python."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from scipy.io import wavfile
from torch import nn

from conftest import PROBE, Command, tiny_audio, tiny_ldm, tiny_stable_diffusion
from ldpruner import Probe, benchmarking, load, plan, prune, score
from ldpruner.evaluation.judges import PictureClassifier, save_judge, save_reference
from ldpruner.pipelines import Pipeline
from ldpruner.scoring import Run

TASKS = {"ldm": "unconditional image", "sd": "text-to-image", "audio": "unconditional audio"}
FEW = ("--samples", "2", "--steps", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny pipeline for each task, with a judge and what it saw of real data."""
    place = tmp_path_factory.mktemp("models")
    made = {"ldm": tiny_ldm(), "sd": tiny_stable_diffusion(place), "audio": tiny_audio()}
    torch.manual_seed(0)
    for name, pipe in made.items():
        pipe.save_pretrained(place / name)
        channels = 3 if name == "sd" else 1
        judge = PictureClassifier(classes=("a", "b"), channels=channels).eval()
        save_judge(judge, place / name / "judge")
        save_reference(judge.observe(torch.rand(9, channels, 16, 16) * 2 - 1), place / name / "judge")
    return {name: place / name for name in made}


def told(command: Command, *arguments: Any) -> dict[str, Any]:
    """What a command prints with --json."""
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.mark.parametrize("name", list(TASKS))
def test_score_plan_prune_save_load_sample_evaluate_and_benchmark(
    name: str, models: dict[str, Path], command: Command, tmp_path: Path
) -> None:
    model = models[name]
    assert load(model).task == TASKS[name]
    told(command, "score", model, "--out", tmp_path / "run", *FEW, "--replacements", "identity,zero,pointwise")
    told(command, "plan", tmp_path / "run", "--budget", "macs=85%", "--out", tmp_path / "plan.json")
    summary = told(command, "prune", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "pruned")
    assert summary["macs_ratio"] <= 0.85

    plain = DiffusionPipeline.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    ours = load(tmp_path / "pruned")
    both = [Pipeline(pipe, source="").latents(PROBE) for pipe in (plain, ours.pipe)]
    assert torch.equal(*both)
    assert not torch.equal(both[0], load(model).latents(PROBE)), "something was pruned"

    sampled = told(command, "sample", tmp_path / "pruned", "--out", tmp_path / "out", *FEW)
    assert sampled["files"] == [f"seed-0000{seed}.{'wav' if name == 'audio' else 'png'}" for seed in (0, 1)]
    assert (tmp_path / "out" / "sheet.png").exists()

    measured = told(command, "evaluate", tmp_path / "pruned", "--against", model, "-n", "6", "--steps", "1", "--batch-size", "4")
    assert measured["task"] == TASKS[name]
    pruned, original = ({figure["metric"]: figure for figure in each["figures"]} for each in measured["models"])
    assert {"latent-shift", "latent-rmse", "latent-frechet", "ssim", "psnr", "frechet", "kernel", "class-balance"} <= set(pruned)
    assert {"frechet", "kernel", "precision", "recall", "inception-score", "class-balance", "confidence"} == set(original)
    assert pruned["latent-shift"]["value"] > 0
    assert pruned["frechet"]["features"] == f"judge of {name}"

    timed = told(command, "benchmark", tmp_path / "pruned", "--against", model, "--rounds", "6", "--steps", "1")
    assert {"denoiser_call", "generation", "decoder"} <= set(timed["times"])
    assert ("text_encoder" in timed["times"]) == (name == "sd")
    assert ("vocoder" in timed["times"]) == (name == "audio")


def test_a_ratio_is_the_model_s_to_the_one_it_is_held_against(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, against = load(models["ldm"]), load(models["ldm"])
    ran: list[nn.Module] = []
    for pipeline, times in ((model, 3), (against, 1)):
        forward = pipeline.denoiser.forward
        pipeline.denoiser.__dict__["forward"] = functools.partial(_counted, forward, ran, pipeline.denoiser, times)

    def counting(run: Callable[[], object], _: torch.device) -> float:
        ran.clear()
        run()
        return float(len(ran) or 1)

    monkeypatch.setattr(benchmarking, "seconds", counting)
    timed = benchmarking.benchmark(model, against, probe=Probe(samples=1, num_inference_steps=2), rounds=8)["times"]
    assert timed["denoiser_call"]["ratio"]["value"] == timed["generation"]["ratio"]["value"] == 3
    assert [reading["value"] for reading in timed["generation"]["models"]] == [6000, 2000]


def _counted(forward: Any, ran: list[nn.Module], denoiser: nn.Module, times: int, *args: Any, **kwargs: Any) -> Any:
    ran += [denoiser] * times
    return forward(*args, **kwargs)


def test_the_benchmark_says_what_was_measured_where_and_how_surely(models: dict[str, Path], command: Command) -> None:
    timed = told(command, "benchmark", models["ldm"], "--against", models["ldm"], "--rounds", "8", "--samples", "2", "--steps", "2")
    for name, entry in timed["times"].items():
        assert len(entry["models"]) == 2
        for reading in (*entry["models"], entry["ratio"]):
            assert reading["n"] == (2 if name == "generation" else 8)
            assert reading["spread"] >= 0
        ratio = entry["ratio"]
        if name == "generation":
            assert ratio["low"] is None, "two readings bound nothing"
        else:
            assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert timed["times"]["generation"]["models"][0]["how"] == "2 x 2 steps, decoded"
    assert (timed["batch"], timed["latents"], timed["resolution"]) == (2, [4, 4, 4], [1, 4, 4])
    assert timed["params"][0] == timed["params"][1] > 0
    assert timed["file_bytes"][0] > timed["weights_bytes"][0], "the file holds the autoencoder too"
    assert {"device", "threads", "dtype", "torch", "diffusers"} <= set(timed["environment"])
    for memory in timed["memory"]:
        assert memory["kind"] == "resident"
        assert memory["peak_bytes"] is None or memory["peak_bytes"] > 1e7
        assert memory["added_bytes"] is None or 0 <= memory["added_bytes"] < memory["peak_bytes"]
    modules = dict(load(models["ldm"]).denoiser.named_modules())
    for times in timed["operators"]:
        assert {row["operator"] for row in times["times"]} <= {*modules, "(the denoiser itself)"}
        assert times["sum_ms"] == pytest.approx(sum(row["own_ms"] for row in times["times"]))
        assert times["sum_to_whole"] == pytest.approx(times["sum_ms"] / times["whole_ms"])
        taken = [row["own_ms"] for row in times["times"]]
        assert taken == sorted(taken, reverse=True)


def test_the_tables_are_for_people(models: dict[str, Path], command: Command) -> None:
    code, out, _ = command("benchmark", models["sd"], "--rounds", "6", "--steps", "1", "--operators", "3")
    assert code == 0
    for words in (
        "text encoder: batch 1",
        "decoder: batch 1",
        "weights on disk",
        "modules add up to",
        "own ms",
        "text-to-image, batch 1",
    ):
        assert words in out, words
    code, out, _ = command("evaluate", models["sd"], "-n", "4", "--steps", "1")
    assert code == 0
    told = "text-to-image; generating"
    for words in ("Fréchet distance ↓", "Class balance ↑", "judge of sd", "4 to 9", told, "4 samples generated"):
        assert words in out, words


def test_sound_comes_out_as_wav(models: dict[str, Path], command: Command, tmp_path: Path) -> None:
    code, out, _ = command("sample", models["audio"], "--out", tmp_path / "out", *FEW)
    assert code == 0
    assert "2 sounds with their spectrograms" in out
    rate, wave = wavfile.read(tmp_path / "out" / "seed-00001.wav")
    assert rate == 8000
    assert wave.dtype == np.int16
    assert len(wave) == pytest.approx(16 * 128, rel=0.1)
    assert np.abs(wave).max() > 0
    told(command, "sample", models["audio"], "--out", tmp_path / "again", *FEW)
    assert (tmp_path / "again" / "seed-00001.wav").read_bytes() == (tmp_path / "out" / "seed-00001.wav").read_bytes()
    upright = np.asarray(Image.open(tmp_path / "out" / "seed-00000.png"))
    kept = np.asarray(load(models["audio"]).images(Probe(samples=1, num_inference_steps=1))[0])
    assert np.array_equal(upright[::-1], kept), "low pitch is drawn at the bottom"


def test_a_pipeline_that_wants_prompts_and_gets_none_takes_those_that_ship(models: dict[str, Path], tmp_path: Path) -> None:
    pipeline = load(models["sd"])
    probe = pipeline.completed(Probe(samples=3))
    assert len(set(probe.prompts)) == 3
    assert load(models["ldm"]).completed(Probe()) == Probe()
    (models["sd"] / "prompts.txt").write_text("a red b\n\na blue c\n", encoding="utf-8")
    try:
        assert pipeline.completed(Probe(samples=5)).prompts == ("a red b", "a blue c")
        run = score(pipeline, Probe(samples=2, num_inference_steps=1), replacements=["zero"], out=tmp_path / "run")
        assert run.probe.prompts == ("a red b", "a blue c")
        assert Run.load(tmp_path / "run").probe == run.probe
        plan(pipeline, run, {"macs": "99%"}).plan.save(tmp_path / "plan.json")
        prune(pipeline, plan=tmp_path / "plan.json").save_pretrained(tmp_path / "pruned")
        assert load(tmp_path / "pruned").completed(Probe(samples=5)).prompts == ("a red b", "a blue c"), "they go with the model"
    finally:
        (models["sd"] / "prompts.txt").unlink()


def test_prompts_come_from_a_file(models: dict[str, Path], command: Command, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a b c\nd e f\n", encoding="utf-8")
    (tmp_path / "metadata.jsonl").write_text('{"text": "a b c"}\n{"text": "d e f"}\n', encoding="utf-8")
    made = []
    for name, given in (
        ("lines", ("--prompts-file", tmp_path / "lines.txt")),
        ("jsonl", ("--prompts-file", tmp_path / "metadata.jsonl")),
        ("typed", ("--prompt", "a b c", "--prompt", "d e f")),
        ("other", ("--prompt", "x y z")),
    ):
        told(command, "sample", models["sd"], "--out", tmp_path / name, *FEW, *given)
        made.append((tmp_path / name / "seed-00001.png").read_bytes())
    assert made[0] == made[1] == made[2] != made[3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prompts.txt: no prompts can be read (No such file or directory)."),
        ("\n \n", "prompts.txt: holds no prompts. Write one a line."),
    ],
)
def test_a_file_without_prompts_is_refused(
    content: str | None, message: str, models: dict[str, Path], command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    code, out, err = command("sample", models["sd"], "--out", tmp_path / "out", "--prompts-file", file)
    assert (code, out) == (2, "")
    assert err.strip() == f"ldpruner: {tmp_path}/{message}"


def test_prompts_for_a_pipeline_that_takes_none_are_refused(models: dict[str, Path], command: Command, tmp_path: Path) -> None:
    code, _, err = command("sample", models["audio"], "--out", tmp_path / "out", "--prompt", "a dog", *FEW)
    assert code == 2
    assert "AudioDiffusionPipeline takes no prompt. Leave it out." in err


def test_guidance_is_the_folder_s_own_where_it_has_one(models: dict[str, Path]) -> None:
    usual = models["sd"] / "generation.json"
    usual.write_text('{"guidance_scale": 2.5}', encoding="utf-8")
    pipeline, probe = load(models["sd"]), Probe(samples=2, num_inference_steps=1)
    try:
        assert pipeline.completed(probe).guidance_scale == 2.5
        assert torch.equal(pipeline.latents(probe), pipeline.latents(replace(probe, guidance_scale=2.5)))
        assert pipeline.completed(replace(probe, guidance_scale=1.0)).guidance_scale == 1.0
        usual.write_text("{}", encoding="utf-8")
        with pytest.raises(ValueError, match=r"generation\.json: cannot be read \('guidance_scale'\)\. Expected"):
            pipeline.latents(probe)
    finally:
        usual.unlink()


def test_guidance_changes_what_is_generated_and_scored(models: dict[str, Path]) -> None:
    pipeline = load(models["sd"])
    weak, strong = (Probe(samples=2, num_inference_steps=1, guidance_scale=scale) for scale in (1.0, 7.5))
    assert not torch.equal(pipeline.latents(weak), pipeline.latents(strong))
    assert torch.equal(pipeline.latents(Probe(samples=2, num_inference_steps=1)), pipeline.latents(strong)), (
        "7.5 is the pipeline's own"
    )
    assert pipeline.call(strong).batch == 2 * pipeline.call(weak).batch
