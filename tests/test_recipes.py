"""Recipes: the paper's experiments run whole, reduced, on stand-ins; what is there is not made again; what is wrong is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PNDMScheduler
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from conftest import Command, real_pictures, tiny_audio, tiny_ldm, tiny_stable_diffusion
from ldpruner import Probe, recipe, workflow
from ldpruner.datasets import Folder, resized
from ldpruner.errors import RecipeError, RunError
from ldpruner.evaluation import FeatureNet, evaluate
from ldpruner.evaluation.kept import Samples
from ldpruner.files import read_prompts
from ldpruner.opening import locate
from ldpruner.pipelines import Pipeline
from ldpruner.recipe import Recipe
from ldpruner.recovery import FIRST_SEED
from ldpruner.scoring.latent import PaperScorer
from ldpruner.surgery import removed_operators
from refusing import everything_in, the_line
from test_feature_nets import recordings, scripted, tiny_clap, tiny_clip

RECIPES = Path(__file__).parent.parent / "recipes"
EXHAUSTIVE, OF_PICTURES = pytest.mark.exhaustive, {"frechet", "kernel", "precision", "recall", "latent-shift", "ssim"}
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SMALL = """
name: small
model: {source: MODEL}
score: {samples: 2, num_inference_steps: 2, replacements: [zero, shortcut]}
plan: {budget: {macs: 85%}, selection: order}
evaluate: {samples: 2, num_inference_steps: 2}
benchmark: {num_inference_steps: 2, rounds: 2}
reduced: {score: {samples: 3}}
"""


def stable_diffusion(place: Path) -> Path:
    """A stand-in with all the parts of `CompVis/stable-diffusion-v1-4`."""
    pipe = tiny_stable_diffusion(place)
    sight = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 32,
             "patch_size": 16, "projection_dim": 8}  # fmt: skip
    pipe.register_modules(
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=StableDiffusionSafetyChecker(CLIPConfig(vision_config=sight, projection_dim=8)).eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained(place / "model")
    return place / "model"


def coco_captions(file: Path, captions: dict[int, list[str]]) -> Path:
    """Captions in the form of COCO's, out of order."""
    entries = [
        {"image_id": picture, "id": 10 * picture + number, "caption": caption}
        for picture, several in captions.items()
        for number, caption in enumerate(several)
    ]
    file.write_text(json.dumps({"images": [], "annotations": entries[::-1]}), encoding="utf-8")
    return file


def index_of(folder: Path) -> dict[str, Any]:
    """What each part of a pipeline is, but for the denoiser."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {part: entry for part, entry in index.items() if part not in ("unet", "_name_or_path")}


def of_text_to_image(place: Path) -> tuple[Path, list[str]]:
    captions = coco_captions(place / "captions_val2014.json", {9: ["a b", "x"], 2: ["c d"], 5: ["e f"], 7: ["g h"]})
    real = real_pictures(place / "val2014", 6, size=20)
    nets = f"evaluate.features=[inception={scripted(place)}, clip={tiny_clip(place / 'clip')}]"
    asked = ["evaluate.metrics=[fid, clip-score, latent-shift]", "evaluate.resize=6", f"evaluate.reference={real}"]
    return stable_diffusion(place), [*asked, nets, f"evaluate.prompts_file={captions}"]


def of_pictures(place: Path) -> tuple[Path, list[str]]:
    tiny_ldm().save_pretrained(place / "model")
    asked = [
        "evaluate.metrics=[fid, kid, precision, recall, latent-shift, ssim]",
        f"evaluate.features=[inception={scripted(place)}]",
    ]
    return place / "model", [*asked, f"evaluate.reference={real_pictures(place / 'celebahq', 6, size=9)}"]


def of_sound(place: Path) -> tuple[Path, list[str]]:
    pipe = tiny_audio()
    pipe.register_modules(scheduler=DDPMScheduler(clip_sample=False))
    pipe.save_pretrained(place / "model")
    asked = ["evaluate.metrics=[fad, latent-shift, latent-rmse, ssim]", f"evaluate.features=[clap={tiny_clap(place / 'clap')}]"]
    return place / "model", [*asked, f"evaluate.reference={recordings(place / 'recordings', 5)}"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "stand_in", "figures"),
    [
        pytest.param("stable-diffusion-v1-4", of_text_to_image, {"frechet", "clip-score", "latent-shift"}, marks=EXHAUSTIVE),
        pytest.param("ldm-celebahq-256", of_pictures, OF_PICTURES, marks=EXHAUSTIVE),
        ("latent-audio-diffusion-256", of_sound, {"frechet", "latent-shift", "latent-rmse", "ssim"}),
    ],
)
def test_an_experiment_of_the_paper_runs_whole_and_a_second_time_does_nothing(
    name: str,
    stand_in: Callable[[Path], tuple[Path, list[str]]],
    figures: set[str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, changes = stand_in(tmp_path)
    out = tmp_path / "runs" / name
    words = ["run", RECIPES / f"{name}.yaml", "--out", out, "--reduced", "--model", model, "--json"]
    words += [word for change in changes for word in ("--set", change)]
    code, printed, complaints = command(*words)
    assert code == 0, complaints

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert json.loads(printed) == {"out": str(out), **summary}
    assert {figure["metric"] for figure in summary["evaluation"]} == figures
    assert summary["edits"] > 0
    assert summary["params"]["pruned"] < summary["params"]["original"]
    assert summary["distillation"]["steps"] == 4
    assert {"denoiser_call", "generation", "decoder"} <= set(summary["benchmark"])
    assert list(summary["seconds"]) == ["score", "plan", "prune", "distil", "evaluate", "benchmark"]
    for file in summary["files"].values():
        assert Path(file).exists()
    assert len(list((out / "scores").glob("*/scores.jsonl"))) == 1

    original = DiffusionPipeline.from_pretrained(model)
    for folder in ("pruned", "distilled"):
        loaded = DiffusionPipeline.from_pretrained(out / folder, trust_remote_code=True)
        assert type(loaded) is type(original)
        assert set(loaded.components) == set(original.components)
        assert len(removed_operators(loaded.unet)) == summary["edits"]
        assert index_of(out / folder) == index_of(model)

    before = everything_in(out)
    monkeypatch.setattr(recipe, "load", lambda *_, **__: pytest.fail("a model is loaded again"))
    code, again, told = command(*words)
    assert (code, again) == (0, printed)
    assert told.count("done before") == 6
    assert everything_in(out) == before


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A recipe of a tiny pipeline without distillation, and the folder of its run."""
    tiny_ldm(small=True).save_pretrained(tmp_path / "model")
    file = tmp_path / "small.yaml"
    file.write_text(SMALL.replace("MODEL", str(tmp_path / "model")), encoding="utf-8")
    return file, tmp_path / "out"


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_a_change_makes_again_what_hangs_on_it(
    small: tuple[Path, Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = small

    def stopped(*_: Any, **__: Any) -> None:
        raise RunError("stopped.")

    with monkeypatch.context() as while_stopped:
        while_stopped.setattr(workflow, "apply", stopped)
        code, _, told = command("run", file, "--out", out)
        assert (code, told.splitlines()[-1]) == (2, "ldpruner: stopped.")
    plan = (out / "plan.json").stat().st_mtime_ns
    monkeypatch.setattr(PaperScorer, "scores", lambda *_, **__: pytest.fail("what was scored is scored again"))
    code, printed, told = command("run", file, "--out", out)
    assert code == 0
    assert [line.partition(":")[2] for line in told.splitlines() if line.startswith(("score", "plan", "prune"))] == [
        " done before, with the same settings",
        " done before, with the same settings",
        " begins",
    ]
    assert (out / "plan.json").stat().st_mtime_ns == plan
    assert "small on " in printed

    kept = everything_in(out / "pruned") | {out / "evaluation.json": (out / "evaluation.json").stat().st_mtime_ns}
    code, _, told = command("run", file, "--out", out, "--set", "benchmark.rounds=3")
    assert code == 0
    assert [line for line in told.splitlines() if line.endswith("begins")] == ["benchmark: begins"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    (out / "plan.json").write_text((out / "plan.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    code, _, told = command("run", file, "--out", out, "--set", "benchmark.rounds=3")
    begun = [line.partition(":")[0] for line in told.splitlines() if line.endswith("begins")]
    assert begun == ["prune", "evaluate", "benchmark"], "a plan that was changed by hand is pruned by"


def test_a_folder_that_no_run_left_is_kept(small: tuple[Path, Path], command: Command) -> None:
    file, out = small
    out.mkdir()
    (out / "letter.txt").write_text("dear", encoding="utf-8")
    code, _, told = command("run", file, "--out", out)
    assert (code, the_line(told)) == (2, f"{out}: holds files that no run of a recipe left. Name another folder.")
    assert [path.name for path in out.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_can_be_tried_and_reads_back_as_it_was(name: str, tmp_path: Path) -> None:
    file = RECIPES / f"{name}.yaml"
    for reduced in (False, True):
        read = Recipe.load(file, reduced=reduced)
        (tmp_path / "again.yaml").write_text(read.to_yaml(), encoding="utf-8")
        assert Recipe.load(tmp_path / "again.yaml") == read
        assert {place for _, place in read.files()} == (set() if reduced else set(read.sources))
    recipe.check_names(Recipe.load(file))
    assert Path(locate(Recipe.load(file, reduced=True).model.source)).is_dir()
    text = file.read_text(encoding="utf-8")
    for promised in ("2404.11936", "GPU hours", "Disk", "Weights:", "million passes"):
        assert promised in text.partition("\nname:")[0]


def test_three_recipes_ship() -> None:
    assert SHIPPED == ["latent-audio-diffusion-256", "ldm-celebahq-256", "stable-diffusion-v1-4"]


@pytest.mark.parametrize("name", SHIPPED)
def test_data_that_is_missing_is_told_with_where_to_get_it_before_any_work(
    name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "run", lambda *_, **__: pytest.fail("work begins"))
    code, printed, told = command("run", RECIPES / f"{name}.yaml", "--out", "out")
    line = the_line(told)
    assert (code, printed) == (2, "")
    for place, source in Recipe.load(RECIPES / f"{name}.yaml").sources.items():
        assert f"{place} is missing. Take it from {source}, and put it there" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "scores: {}\n", "scores is unknown: did you mean score or sources?"),
        (SMALL.replace("samples: 2, num", "sampels: 2, num", 1), "score.sampels is unknown: did you mean samples?"),
        (SMALL.replace("score: {samples: 3}", "score: {sampels: 3}"), "score.sampels is unknown: did you mean samples?"),
        (SMALL.replace("samples: 2", "samples: many", 1), "score.samples: expected a whole number, found 'many'."),
        (SMALL.replace("samples: 2", "samples: 2.5", 1), "score.samples: expected a whole number, found 2.5."),
        (SMALL.replace("samples: 2", "samples: true", 1), "score.samples: expected a whole number, found True."),
        (SMALL.replace("samples: 2", "samples: 0", 1), "score: samples=0: 1 or more are needed."),
        (SMALL.replace("[zero, shortcut]", "zero"), "score.replacements: expected a list, found 'zero'."),
        (SMALL.replace("[zero, shortcut]", "[1]"), "score.replacements[0]: expected text, found 1."),
        (SMALL.replace("MODEL}", "MODEL, dtype: int8}"), "model.dtype: 'int8' is unknown: known: bfloat16, float16, float32"),
        (SMALL.replace("85%", "much"), "plan: budget macs=much: give a positive number, or a share such as macs=65%."),
        (SMALL.replace("plan: {", "plan: {repair: no, "), "plan.repair: 'no' is unknown: did you mean none?"),
        (SMALL.replace("plan: {", "plan: {stage_cap: 2, "), "plan: priors: protect_ends and apart are 0 or more"),
        (SMALL + "prune: {form: portabel}\n", "prune: form 'portabel' is unknown: did you mean portable?"),
        (SMALL + "distil: {training: {max_train_steps: 0}}\n", "distil.training: max_train_steps=0: 1 or more is needed."),
        (SMALL + "distil: {training: {learning_rate: fast}}\n", "distil.training.learning_rate: expected a number, found 'fast'."),
        (SMALL.replace("name: small\n", ""), "name is missing."),
        (SMALL.replace("model: {source: MODEL}\n", ""), "model is missing."),
        (SMALL.replace("model: {source: MODEL}", "model: MODEL"), "model: expected names with values, found 'MODEL'."),
        (SMALL + "name: other\n", "is no YAML (name is said twice"),
        (SMALL + "prune: [\n", "is no YAML ("),
        ("- a\n- b\n", "is no recipe: it has no sections."),
        ("", "is no recipe: it has no sections."),
        (SMALL.replace("score: {samples: 3}", ""), "reduced: holds nothing that would be other. Leave --reduced out."),
    ],
)
def test_a_recipe_that_cannot_be_meant(text: str, message: str, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    code, printed, told = command("run", file, "--out", tmp_path / "out", "--reduced")
    assert (code, printed) == (2, "")
    assert the_line(told).startswith(f"{file}: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("score.sampels=3", "FILE: score.sampels is unknown: did you mean samples?"),
        ("score.samples", "FILE: --set score.samples: say SECTION.KEY=VALUE, such as score.samples=8."),
        ("name.of=x", "FILE: --set name.of=x: there is no section before of."),
        ("score.samples=[", "FILE: --set score.samples=[: is no YAML ("),
        ("score.method=papr", "scoring method 'papr' is unknown: did you mean paper?"),
        ("score.solver=dim", "solver 'dim' is unknown: did you mean ddim?"),
        ("score.replacements=[zeros]", "replacement 'zeros' is unknown: did you mean zero?"),
        ("plan.selection=ordr", "selection 'ordr' is unknown: did you mean order?"),
        ("evaluate.metrics=[latent-shft]", "metric 'latent-shft' is unknown: did you mean latent-shift or"),
        ("evaluate.features=[clipp]", "feature net 'clipp' is unknown: did you mean clip"),
        ("evaluate.reference=nowhere", "evaluate.reference: nowhere is missing. Put it there; or name another with --set"),
        ("distil.data=nowhere", "distil.data: nowhere is missing. Put it there; or name another with --set distil.data=PLACE."),
        ("evaluate.prompts_file=nowhere", "evaluate.prompts_file: nowhere is missing. Put it there; or name another with --set"),
        ("model.source=./nowhere", "./nowhere: no such folder. Give a diffusers folder, a hub id such as org/name, or zoo:NAME."),
    ],
)
def test_a_change_that_cannot_be_meant(change: str, message: str, small: tuple[Path, Path], command: Command) -> None:
    file, out = small
    code, printed, told = command("run", file, "--out", out, "--set", change)
    assert (code, printed) == (2, "")
    assert the_line(told).startswith(message.replace("FILE", str(file)))
    assert not list(out.glob("*.json"))


def test_what_the_last_stages_cannot_do_is_told_before_the_first(
    small: tuple[Path, Path], command: Command, own_cache: Path
) -> None:
    file, out = small
    model = file.parent / "model"
    asked = {
        "evaluate.metrics=[fid]": f"inception: {own_cache}/inception-2015-12-05.pt is missing. Fetch https://",
        "evaluate.metrics=[frechet]": f"frechet: cannot be measured on {model}, for want of a feature net",
        "evaluate.prompts=[a cat]": f"{model}: LDMPipeline takes no prompt. Leave it out.",
        "benchmark.call={height: 8}": f"{model}: LDMPipeline takes no height: ",
        "model.dtype=float16": f"{model}: LDMPipeline refuses to run (",
    }
    for change, message in asked.items():
        code, _, told = command("run", file, "--out", out, "--set", change)
        assert code == 2
        assert the_line(told).startswith(message)
        assert not (out / "scores").exists()


def test_a_recipe_that_is_not_there(command: Command, tmp_path: Path) -> None:
    code, _, told = command("run", tmp_path / "nowhere.yaml", "--out", tmp_path / "out")
    assert (code, the_line(told)) == (2, f"{tmp_path / 'nowhere.yaml'}: cannot be read (No such file or directory).")


def test_several_processes_are_refused(small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="a recipe runs in one process, and several were started"):
        recipe.run(Recipe.load(small[0]), small[1])


def test_a_change_goes_over_the_reduced_section_and_a_section_over_nothing(small: tuple[Path, Path]) -> None:
    file, _ = small
    assert Recipe.load(file).score.samples == 2
    assert Recipe.load(file, reduced=True).score == replace(Recipe.load(file).score, samples=3)
    assert Recipe.load(file, reduced=True, changes=["score.samples=4"]).score.samples == 4
    assert Recipe.load(file, model="org/name", changes=["model.revision=v1"]).model.source == "org/name"
    made = Recipe.load(
        file, changes=["distil.training.mixed_precision=no", "distil.training.learning-rate=1e-3", "plan.budget.params=50%"]
    )
    assert made.distil is not None
    assert (made.distil.training.mixed_precision, made.distil.training.learning_rate) == ("no", 1e-3)
    assert made.distil.seed == FIRST_SEED
    assert made.plan.budget == {"macs": "85%", "params": "50%"}


def test_the_first_caption_of_every_picture_is_a_prompt(tmp_path: Path) -> None:
    file = coco_captions(tmp_path / "captions.json", {30: ["last"], 4: ["one  cat.\n", "another"], 11: ["two"]})
    assert read_prompts(file) == ("one cat.", "two", "last")
    file.write_text('{"annotations": [{"image_id": 1}]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"captions.json: no prompts can be read \(KeyError"):
        read_prompts(file)


def test_nets_look_at_pictures_of_the_size_that_is_asked_for(ldm: Pipeline, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def observe(pictures: Tensor) -> dict[str, Tensor]:
        seen.append(tuple(pictures.shape))
        return {"features": pictures.flatten(1).float()}

    net = FeatureNet(name="pixels", digest="pixels", observe=observe)
    real = tmp_path / "real"
    real.mkdir()
    for number in range(5):
        Image.new("L", (30, 20), 40 * number).save(real / f"{number}.png")
    probe = Probe(samples=4, num_inference_steps=1)
    result = evaluate(ldm, probe=probe, features=[net], reference=real, metrics=["frechet"], resize=2)
    assert sorted(seen) == [(4, 1, 2, 2), (5, 1, 2, 2)]
    assert result.figures[0][0].features == "pixels at 2 x 2"
    with pytest.raises(ValueError, match="resize=0: a side of 1 pixel or more is needed"):
        evaluate(ldm, probe=probe, features=[net], reference=real, resize=0)


def test_samples_of_another_call_are_others(text_to_image: Pipeline, tmp_path: Path) -> None:
    probe = text_to_image.completed(Probe(samples=1, num_inference_steps=1))
    probes = [probe, replace(probe, call={"height": 4}), replace(probe, solver="unipc")]
    parts = [next(Samples.of(text_to_image, each, batch_size=1, cache=tmp_path)._parts())[1].path for each in probes]
    assert len(set(parts)) == 3


def test_samples_are_resized_as_real_pictures_are(tmp_path: Path) -> None:
    pictures = torch.randint(0, 255, (2, 3, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    folder = Folder.open(tmp_path)
    real = torch.stack([folder.picture(name, channels=3, size=(2, 2)) for name in folder.names])
    assert torch.equal(resized(pictures, (2, 2)), real)
    assert resized(pictures, (6, 9)) is pictures
