"""What goes wrong ends as one line that says where, what and what to do, with exit code 2 and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import BY_PAPER, Command
from ldpruner import opening
from ldpruner.scoring.latent import PaperScorer
from refusing import BUDGET, Refused, copied, everything_in, the_line

pytestmark = pytest.mark.usefixtures("in_place")

IDENTITY = {"returns": [[0, "input"]], "many": False}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "nowhere: no such folder. Give a diffusers folder, a hub id such as org/name, or zoo:NAME."),
        ("./no/where", "./no/where: no such folder. Give a diffusers folder, a hub id such as org/name, or zoo:NAME."),
        ("empty", "empty: is no diffusers pipeline (no model_index.json in it)."),
        ("file", "file: is no diffusers pipeline (no model_index.json in it)."),
        ("zoo:fashoin", "zoo:fashoin does not exist: did you mean fashion?"),
        ("zoo:nonsense", "zoo:nonsense does not exist: known: fashion, letters"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "score", "prune", "sample", "benchmark"])
def test_a_model_that_is_not_there(
    verb: str, model: str, message: str, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("fashion", "letters"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").touch()
    monkeypatch.setattr(opening, "_ZOO", tmp_path)
    out = {"inspect": (), "benchmark": (), "prune": ("--out", "deep/out", *BUDGET)}.get(verb, ("--out", "deep/out"))
    assert refused(verb, model, *out) == message


def test_a_hub_model_that_cannot_be_had(refused: Refused) -> None:
    assert refused("inspect", "nobody/nothing").startswith("nobody/nothing: cannot be loaded (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--replacements", "identiy"), "replacement 'identiy' is unknown: did you mean identity?"),
        (("--replacements", ","), "--replacements ',': names none. Leave it out to allow all."),
        (("--method", "papr"), "scoring method 'papr' is unknown: did you mean paper?"),
        (("--selection", "ordr"), "selection 'ordr' is unknown: did you mean order?"),
        (("--form", "portabel"), "form 'portabel' is unknown: did you mean portable?"),
        (("--bugdet", "macs=75%"), "No such option '--bugdet'."),
        (("--guidance-scale", "much"), "Invalid value for '--guidance-scale': 'much' is not a valid float."),
        (("--samples", "few"), "Invalid value for '--samples': 'few' is not a valid integer."),
        (("--batch-size", "0"), "Invalid value for '--batch-size': 0 is not in the range x>=1."),
        (("--dtype", "int8"), "Invalid value for '--dtype': 'int8' is not one of 'float32', 'float16', 'bfloat16'."),
        (("--device", "gpu"), "ldm: cannot be moved to device 'gpu' ("),
        (("--samples", "1"), "samples=1: a standard deviation over samples needs 2 or more."),
        (("--steps", "0"), "num_inference_steps=0: 1 or more are needed."),
        (("--steps", "100000"), "ldm: LDMPipeline refuses to run (`num_inference_steps`: 100000 cannot be larger than"),
        (("--prompt", "a"), "ldm: LDMPipeline takes no prompt. Leave it out."),
        (("--guidance-scale", "3"), "ldm: LDMPipeline takes no guidance_scale. Leave it out."),
        (("--plan", "plan.json"), "give either --budget, such as --budget latency=65%, or --plan FILE."),
        (("surplus",), "Got unexpected extra argument (surplus)"),
    ],
)
def test_an_option_that_cannot_be_meant(arguments: tuple[str, ...], message: str, refused: Refused) -> None:
    """Refused before anything is scored: the default probe would take minutes."""
    assert refused("prune", "ldm", "--out", "out", *BUDGET, *arguments).startswith(message)


def test_what_has_to_be_given(refused: Refused) -> None:
    assert refused("prune") == "Missing argument 'MODEL'."
    assert refused("prune", "ldm", *BUDGET) == "Missing option '--out'."
    assert refused("prune", "ldm", "--out", "out") == "give either --budget, such as --budget latency=65%, or --plan FILE."
    settled = "--samples goes with --budget: a plan has settled it. Leave it out."
    assert refused("prune", "ldm", "--plan", "plan.json", "--out", "out", "--samples", "4") == settled
    assert (
        refused("plan", "run", "--out", "out") == "no budget was given: say --budget QUANTITY=LIMIT, such as --budget latency=65%."
    )
    assert refused("zoo") == "Missing command."
    assert refused("prun", "ldm").startswith("No such command 'prun'.")


def test_no_arguments_show_the_help(command: Command) -> None:
    code, out, err = command()
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("latency", "budget 'latency': say QUANTITY=LIMIT, such as latency=65%."),
        ("latency=abc", "budget latency=abc: give a positive number, or a share such as latency=65%."),
        ("latency=-5", "budget latency=-5: give a positive number, or a share such as latency=65%."),
        ("latency=0", "budget latency=0: give a positive number, or a share such as latency=65%."),
        ("latency=120%", "budget latency=120%: give a positive number, or a share such as latency=65%."),
        ("latency=nan", "budget latency=nan: give a positive number, or a share such as latency=65%."),
        ("latency=1e999", "budget latency=1e999: give a positive number, or a share such as latency=65%."),
        ("latency=1.2.3", "budget latency=1.2.3: give a positive number, or a share such as latency=65%."),
        ("speed=50%", "budget 'speed' is unknown: known: latency, macs, params"),
        ("parms=50%", "budget 'parms' is unknown: did you mean params?"),
        ("", "budget '': say QUANTITY=LIMIT, such as latency=65%."),
    ],
)
def test_a_budget_that_cannot_be_read(budget: str, message: str, refused: Refused) -> None:
    assert refused("prune", "ldm", "--out", "out", "--budget", budget) == message
    assert refused("plan", "run", "--out", "out", "--budget", budget) == message


def test_a_budget_out_of_reach_says_what_can_be_reached_and_keeps_the_scores(
    refused: Refused, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(PaperScorer, "scores", lambda *_, **__: pytest.fail("what was scored is scored again"))
    asked = ("prune", "ldm", "--run", copied("run", tmp_path), *BY_PAPER, "--out")
    message = refused(*asked, "out", "--budget", "params=0.1%")
    floor = message.removeprefix("params 0.1% cannot be met: all 89 removable operators together reach params ").partition("%")[0]
    assert message.endswith("%. Ask for that or more, or allow more replacements.")
    assert 0.1 < float(floor) < 10
    assert refused("plan", "run", "--out", "out", "--budget", "params=0.1%") == message
    code, _, _ = command(*asked, tmp_path / "out", "--budget", f"params={float(floor) + 0.1}%")
    assert code == 0


def plan_with(folder: Path, **changes: Any) -> Path:
    """The good plan with entries changed by hand."""
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(Path("plan.json").read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return path


def edit(operator: str, replacement: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"operator": operator, "replacement": replacement, "options": options}


def test_a_plan_for_another_model(refused: Refused) -> None:
    message = refused("prune", "sd", "--plan", "plan.json", "--out", "out")
    assert message.startswith("this plan was made for another model: it fits the UNet2DModel ")
    assert message.endswith(" Score and plan this model anew.")


@pytest.mark.parametrize("text", ["", "nothing", "{", "[]", "null", '"plan"', '{"schema": 1}'])
def test_a_file_that_is_no_plan(text: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    message = refused("prune", "ldm", "--plan", tmp_path / "plan.json", "--out", "out")
    assert message.startswith(f"{tmp_path / 'plan.json'}: is no plan (")
    assert message.endswith("). Make one with `ldpruner plan`.")


@pytest.mark.parametrize(("path", "reason"), [("nowhere", "No such file or directory"), ("empty", "Is a directory")])
def test_a_plan_that_is_not_there(path: str, reason: str, refused: Refused) -> None:
    assert (
        refused("prune", "ldm", "--plan", path, "--out", "out") == f"{path}: is no plan ({reason}). Make one with `ldpruner plan`."
    )


def test_a_plan_of_an_unknown_schema(refused: Refused, tmp_path: Path) -> None:
    path = plan_with(tmp_path, schema=9)
    assert refused("prune", "ldm", "--plan", path, "--out", "out") == f"{path}: plan schema 9 is unknown: this version reads 1."


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            [edit("mid_block.resnet.0", "identity", IDENTITY)],
            "'mid_block.resnet.0' is no operator of this UNet2DModel: did you mean mid_block.resnets.0 or",
        ),
        ([edit("mid_block.resnets.99", "pointwise", {})], "'mid_block.resnets.99' is no operator of this UNet2DModel: "),
        (
            [edit("conv_norm_out", "identiy", IDENTITY)],
            "conv_norm_out: replacement 'identiy' is unknown: did you mean identity?",
        ),
        (
            [edit("mid_block", "identity", IDENTITY), edit("mid_block.resnets.0.conv1", "identity", IDENTITY)],
            "mid_block.resnets.0.conv1: a plan holds a block or its parts, never both.",
        ),
        (
            [edit("conv_norm_out", "identity", {})],
            "the plan's stand-ins do not fit this UNet2DModel (KeyError: 'returns'). Make the plan anew with `ldpruner plan`.",
        ),
        (
            [edit("conv_in", "pointwise", {"source": [0, "input"], "channels": [4, 7], "grid": None})],
            "the plan's stand-ins do not fit this UNet2DModel (",
        ),
        ([edit("conv_in", "pointwise", {})], "the plan's stand-ins do not fit this UNet2DModel (KeyError: 'channels')."),
    ],
)
def test_a_plan_that_asks_for_what_the_model_cannot_do(
    edits: list[dict[str, Any]], message: str, refused: Refused, tmp_path: Path
) -> None:
    assert refused("prune", "ldm", "--plan", plan_with(tmp_path, edits=edits), "--out", "out").startswith(message)


def test_weights_that_are_not_finite(refused: Refused, tmp_path: Path) -> None:
    model = copied("ldm", tmp_path)
    weights = load_file(model / WEIGHTS)
    weights["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    message = f"{model}: unet.conv_in.weight holds NaN or infinite weights; nothing can be scored with it."
    assert refused("prune", model, "--out", "out", *BUDGET) == message


@pytest.mark.parametrize("part", ["unet", "vqvae"])
@pytest.mark.parametrize("kept", [-1, 100, 4, 0])
def test_a_truncated_file_is_named(part: str, kept: int, refused: Refused, tmp_path: Path) -> None:
    model = copied("ldm", tmp_path)
    name = f"{part}/diffusion_pytorch_model.safetensors"
    (model / name).write_bytes((model / name).read_bytes()[:kept])
    assert refused("inspect", model) == f"{model}: {name} is truncated or damaged. Copy or download it again."


def test_weights_that_lack_a_tensor(refused: Refused, tmp_path: Path) -> None:
    model = copied("ldm", tmp_path)
    weights = load_file(model / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    assert refused("inspect", model) == f"{model}: the weights of unet lack conv_in.weight."


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_cannot_be_read(name: str, text: str, refused: Refused, tmp_path: Path) -> None:
    model = copied("ldm", tmp_path)
    (model / name).write_text(text, encoding="utf-8")
    assert refused("inspect", model).startswith(f"{model}: cannot be loaded (")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "file: is a file; name a folder to write to."),
        ("sd", "sd: holds files that ldpruner did not write. Empty it, or name another folder."),
        ("file/out", "file/out: cannot be written (File exists). Name a folder that you may write to."),
        ("file/deep/out", "file/deep/out: cannot be written (Not a directory). Name a folder that you may write to."),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "sample"])
def test_a_target_that_cannot_be_written_is_told_before_any_work(verb: str, out: str, message: str, refused: Refused) -> None:
    budget = BUDGET if verb == "prune" else ()
    assert refused(verb, "nowhere", "--out", out, *budget) == message


def test_a_plan_file_that_cannot_be_written(refused: Refused) -> None:
    assert refused("plan", "run", *BUDGET, "--out", "empty") == "empty: cannot be written (Is a directory)."
    assert refused("plan", "run", *BUDGET, "--out", "file/plan.json") == "file/plan.json: cannot be written (File exists)."


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("empty", "empty: is no run folder (no run.json). Make one with `ldpruner score MODEL --out empty`."),
        ("nowhere", "nowhere: is no run folder (no run.json). Make one with `ldpruner score MODEL --out nowhere`."),
        ("file", "file/run.json: cannot be read (Not a directory). Score again into a new folder."),
    ],
)
def test_a_folder_that_is_no_run(path: str, message: str, refused: Refused) -> None:
    assert refused("plan", path, *BUDGET, "--out", "out") == message


def test_a_run_below_a_file(refused: Refused) -> None:
    message = "file/run.json: cannot be read (Not a directory). Score again into a new folder."
    assert refused("score", "ldm", "--out", "file") == message
    assert refused("prune", "ldm", *BUDGET, "--out", "out", "--run", "file") == message


@pytest.mark.parametrize(
    ("model", "changed", "what"),
    [("sd", (), "weights and probe"), ("ldm", ("--seed", "7"), "probe"), ("ldm", ("--samples", "4"), "probe")],
)
def test_a_run_of_something_else(model: str, changed: tuple[str, ...], what: str, refused: Refused) -> None:
    message = refused("prune", model, *BUDGET, "--out", "out", "--run", "run", *BY_PAPER, *changed)
    assert message.startswith(f"run: holds scores of another {what}. Name another folder")
    assert refused("score", model, "--out", "run", *BY_PAPER, *changed) == message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", '{"schema": 9}'),
        ("operators.json", "[]"),
        ("scores.jsonl", "nothing\n"),
        ("scores.jsonl", '{"operator": "conv_in"}\n'),
        ("pointwise.safetensors", "nothing"),
    ],
)
def test_a_damaged_run(name: str, text: str, refused: Refused, tmp_path: Path) -> None:
    run = copied("run", tmp_path)
    (run / name).write_text(text, encoding="utf-8")
    message = refused("plan", run, *BUDGET, "--out", "out")
    assert message.startswith(f"{run / name}: ")
    assert refused("prune", "ldm", *BUDGET, "--out", "out", "--run", run, *BY_PAPER) == message


def test_a_replacement_that_no_plan_can_use(refused: Refused) -> None:
    message = "replacement 'identiy' is unknown: did you mean identity?"
    assert refused("plan", "run", *BUDGET, "--out", "out", "--replacements", "identiy") == message


def test_in_a_process_of_its_own_nothing_else_is_printed(place: Path, tmp_path: Path) -> None:
    """Other libraries log and draw progress bars; in this process the test suite has silenced them already."""
    emptied = copied("ldm", tmp_path)
    (emptied / WEIGHTS).unlink()
    commands = {
        f"{emptied}: cannot be loaded (OSError: Error no file named": ("inspect", emptied),
        "this plan was made for another model": ("prune", "sd", "--plan", "plan.json", "--out", "out"),
    }
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    before = everything_in(place)
    started = {
        message: subprocess.Popen(
            [sys.executable, "-m", "ldpruner", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for message, arguments in commands.items()
    }
    for message, process in started.items():
        out, err = process.communicate()
        assert (process.returncode, out) == (2, ""), err
        assert the_line(err).startswith(message)
    assert everything_in(place) == before
