"""A saved folder's card says what the folder's own record says, in the Hub's terms, and keeps what a user adds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import ldpruner
from conftest import Command, tiny_ldm
from ldpruner import Budget, Edit, Plan, cards, forms
from ldpruner.errors import ArtifactError
from ldpruner.files import write_json
from ldpruner.markdown import MARKER, header_of, merged, removed, table, with_header
from ldpruner.pipelines import Pipeline
from ldpruner.record import Measurement
from ldpruner.recovery import Distilled
from ldpruner.reporting import count, interval, milliseconds, percent
from ldpruner.workflow import Pruned
from refusing import the_line
from saving import CHOSEN, RESAMPLING, plan_for, without

SHIFT = {"metric": "latent-shift", "title": "Latent shift", "value": 0.25, "better": "lower", "samples": 12}
KERNEL = {"metric": "kernel", "title": "Kernel distance", "better": "lower", "features": "judge of zoo:x", "digest": "ab"} | {
    "samples": 12,
    "reference": 2000,
}
EVALUATED = {
    "models": [
        {"model": "tiny", "figures": [SHIFT, KERNEL | {"value": 0.0123, "error": 0.0004, "note": "few samples"}]},
        {"model": "base", "figures": [KERNEL | {"value": 0.0099, "error": 0.0003, "note": None}]},
    ],
    "probe": {"num_inference_steps": 3, "seed": 7, "guidance_scale": None},
    "environment": {"device": "a stone"},
}


@pytest.fixture(scope="module")
def pruned() -> Pruned:
    pipeline = Pipeline(tiny_ldm(), source="/home/someone/base")
    plan = without(plan_for(pipeline, CHOSEN["unconditional"]), lambda edit: edit.operator in RESAMPLING)
    return ldpruner.prune(pipeline, plan=replace(plan, budgets=(Budget.parse("macs", "80%"),), selection="by hand"))


@pytest.fixture
def folder(pruned: Pruned, tmp_path: Path) -> Path:
    pruned.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_card_says_what_the_record_says(folder: Path, pruned: Pruned) -> None:
    card, record = card_of(folder), json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ldpruner", "pruning"],
    }
    latency = {name: Measurement(**value) for name, value in record["latency"].items()}
    for name in ("params", "macs"):
        one, other = record[name]["original"], record[name]["pruned"]
        assert f"| {count(one)} | {count(other)} | {percent(other / one)} |" in card.text
    times = milliseconds(latency["original"]), milliseconds(latency["pruned"]), interval(latency["ratio"])
    assert f"| {' | '.join(times)} |" in card.text
    said = " ".join(card.text.split())
    assert "Asked for: macs=80%." in said
    assert f"Latent shift of all edits together: {record['latent_shift']:.4g}, on 3 samples of 2 steps." in said
    assert f"device {record['environment']['device']}, threads 1" in said
    assert f"{len(pruned.plan.edits)} operators were replaced: " in said
    assert all(f"| `{edit.operator}` | {edit.replacement} | {edit.reason} |" in card.text for edit in pruned.plan.edits)
    assert "It does not mean that EMA weights were stripped from a checkpoint." in said
    assert forms.loading_lines("tiny", "portable") in card.text
    assert "None: the weights that are left are the base model's own" in said
    assert "Not measured." in said
    assert "from `base`:" in said
    assert "someone" not in card.text, "no path of this machine"
    assert "licence could not be read" in said


@pytest.mark.parametrize("form", forms.FORMS)
def test_each_form_says_what_it_needs(form: str, pruned: Pruned, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path / form, form=form)
    said = " ".join(card_of(tmp_path / form).text.split())
    assert forms.loading_lines(form, form) in card_of(tmp_path / form).text
    assert f"This is the {form} form: it {forms.FORMS[form]}." in said
    assert ("`unet/ldpruner_v1.py`" in said) is (form == "portable") is (tmp_path / form / "unet" / "ldpruner_v1.py").is_file()
    assert ("pip install ldpruner" in said) is (form == "plugin")
    assert ("this form has the original's size and speed" in said) is (form == "dense")
    assert ('device_map="balanced"' in said) is (form == "portable")


def test_the_base_models_licence_is_handed_on_and_can_be_named(pruned: Pruned, tmp_path: Path, command: Command) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\ntags: [old]\n---\nBase.", encoding="utf-8")
    out = tmp_path / "out"
    replace(pruned, pipeline=Pipeline(pruned.pipeline.pipe, source=str(base))).save_pretrained(out)
    assert card_of(out).data.to_dict()["license"] == "cc-by-4.0"
    assert card_of(out).data.tags == ["ldpruner", "pruning"]
    (out / "README.md").unlink()
    code, printed, _ = command("card", out)
    assert (code, printed) == (0, f"Written to {out / 'README.md'}.\n")
    assert card_of(out).data.to_dict()["license"] == "cc-by-4.0"
    code, printed, _ = command("card", out, "--license", "mit", "--base-model", "org/base", "--json")
    told = {"license": "mit", "base_model": "org/base", "pipeline_tag": "unconditional-image-generation", "figures": 0}
    assert (code, json.loads(printed)) == (0, {"card": str(out / "README.md"), **told})
    assert command("card", out)[0] == 0, "and it stays named"
    assert card_of(out).data.to_dict()["license"] == "mit"
    assert "[org/base](https://huggingface.co/org/base)" in card_of(out).text


def test_an_evaluation_becomes_figures_of_the_card(folder: Path, command: Command, tmp_path: Path) -> None:
    write_json(tmp_path / "figures.json", EVALUATED)
    code, printed, err = command("card", folder, "--evaluation", tmp_path / "figures.json", "--json")
    assert code == 0, err
    assert json.loads(printed)["figures"] == 2
    card = card_of(folder)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"latent-shift": 0.25, "kernel": 0.0123}
    assert results["kernel"].dataset_name == "2000 real samples"
    assert results["kernel"].metric_args == {"samples": 12, "reference": 2000, "features": "judge of zoo:x", "error": 0.0004}
    assert results["latent-shift"].dataset_name == "the original's samples, same seeds"
    assert {result.task_type for result in results.values()} == {"unconditional-image-generation"}
    assert "| Latent shift, lower is better |  | 12 | the original's samples, same seeds | 0.25 |  |" in card.text
    row = "judge of zoo:x | 12 | 2000 real samples | 0.0123 ± 0.0004 | 0.0099 ± 0.0003 |"
    assert f"| Kernel distance, lower is better | {row}" in card.text
    said = " ".join(card.text.split())
    assert "Generated in 3 steps each, seeds from 7. Kernel distance: few samples." in said
    assert "Measured on: device a stone." in said
    assert command("card", folder)[0] == 0, "and the figures stay"
    assert len(card_of(folder).data.eval_results) == 2


def test_what_evaluate_prints_is_what_card_reads(folder: Path, command: Command, tmp_path: Path) -> None:
    tiny_ldm().save_pretrained(tmp_path / "base")
    asked = ("-n", "4", "--steps", "2", "--metrics", "latent-shift,latent-rmse", "--json")
    code, printed, err = command("evaluate", folder, "--against", tmp_path / "base", *asked)
    assert code == 0, err
    (tmp_path / "figures.json").write_text(printed, encoding="utf-8")
    assert command("card", folder, "--evaluation", tmp_path / "figures.json")[0] == 0
    measured = {figure["metric"]: figure["value"] for figure in json.loads(printed)["models"][0]["figures"]}
    assert {result.metric_type: result.metric_value for result in card_of(folder).data.eval_results} == measured
    write_json(tmp_path / "other.json", {"models": [{"model": str(tmp_path / "base"), "figures": [SHIFT]}]})
    code, printed, err = command("card", folder, "--evaluation", tmp_path / "other.json")
    assert (code, printed) == (2, "")
    assert the_line(err) == f"{tmp_path / 'other.json'}: is about {tmp_path / 'base'}, and this is {folder}."


def test_training_and_its_cost_are_told(learn: Callable[..., Distilled], pruned: Pruned, folder: Path, tmp_path: Path) -> None:
    distilled = learn(use_ema=True)
    student = ldpruner.load(folder)
    (folder / "README.md").write_text((folder / "README.md").read_text(encoding="utf-8").replace("tags:", "license: mit\ntags:"))
    once = replace(distilled, pipeline=student, denoiser=student.denoiser)
    ldpruner.save_distilled(once, tmp_path / "once")
    again = replace(once, pipeline=ldpruner.load(tmp_path / "once"), record={**distilled.record, "data": "other data"})
    ldpruner.save_distilled(again, tmp_path / "twice")
    said, record = " ".join(card_of(tmp_path / "twice").text.split()), distilled.record
    learnt = f"4 steps of 4 samples, {count(record['learning_parameters'])} parameters learning"
    cost = f"{record['seconds']:.0f} s in 1 process on {record['environment']['device']}"
    assert f"Distilled from `tiny-ldm` on {record['data']}: {learnt}, {cost}." in said
    assert said.index(f"on {record['data']}:") < said.index("on other data:"), "in the order in which it was done"
    assert f"| loss | {record['losses']['first']['loss']:.4g} | {record['losses']['last']['loss']:.4g} |" in said
    assert "| `use_ema` | True |" in said
    assert f"together, before distillation: {pruned.latent_shift:.4g}, on" in said
    assert "Nothing was trained" not in said
    assert card_of(tmp_path / "twice").data.to_dict()["license"] == "mit", "a student's licence is handed on"
    assert "from `base`:" in said, "and so is what it came from"


def test_a_user_s_own_words_stay(folder: Path, pruned: Pruned, command: Command) -> None:
    readme = folder / "README.md"
    written = readme.read_text(encoding="utf-8")
    assert written.endswith(f"{MARKER}\n")
    words = "\n## Seen\n\nIt makes nice cats.\n"
    readme.write_text(
        written.replace("tags:\n", "language: fr\ntags:\n- cats\n").replace("# tiny", "# gone") + words, encoding="utf-8"
    )
    assert command("card", folder)[0] == 0
    text = readme.read_text(encoding="utf-8")
    assert text.endswith(f"{MARKER}\n{words}")
    assert "# tiny" in text
    assert card_of(folder).data.to_dict()["language"] == "fr"
    assert card_of(folder).data.tags == ["ldpruner", "pruning", "cats"]
    pruned.save_pretrained(folder)
    assert readme.read_text(encoding="utf-8").endswith(f"{MARKER}\n{words}"), "also where the folder is written anew"


def test_a_readme_of_someone_else_is_left(folder: Path, command: Command) -> None:
    (folder / "README.md").write_text("All mine.", encoding="utf-8")
    code, out, err = command("card", folder)
    assert (code, out) == (2, "")
    assert the_line(err).startswith(f"{folder / 'README.md'}: was not written by ldpruner, and stays. Rename it, or put this line")
    assert (folder / "README.md").read_text(encoding="utf-8") == "All mine."
    with pytest.raises(ArtifactError, match="was not written by ldpruner"):
        cards.write(folder)


def test_a_folder_that_we_did_not_save_gets_no_card(ldm_folder: Path, command: Command, tmp_path: Path) -> None:
    for place in (ldm_folder, tmp_path / "nowhere"):
        code, out, err = command("card", place)
        assert (code, out) == (2, "")
        assert the_line(err) == f"{place}: is no folder that ldpruner saved (no record.json beside a model_index.json in it)."
    assert not (ldm_folder / "README.md").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("nothing", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ('{"models": []}', "IndexError: list index out of range"),
        ('{"models": [{"model": "x"}]}', "KeyError: 'figures'"),
    ],
)
def test_an_evaluation_that_is_none(damage: str, reason: str, folder: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(damage, encoding="utf-8")
    code, _, err = command("card", folder, "--evaluation", tmp_path / "figures.json")
    assert code == 2
    told = f"is no evaluation ({reason}). Make one with `ldpruner evaluate {folder} --json`."
    assert the_line(err) == f"{tmp_path / 'figures.json'}: {told}"


def test_a_damaged_record_is_named(folder: Path, command: Command) -> None:
    (folder / "record.json").write_text("{", encoding="utf-8")
    code, _, err = command("card", folder)
    assert code == 2
    assert the_line(err).startswith(f"{folder / 'record.json'}: cannot be read (")


def test_a_long_list_of_operators_is_folded_away() -> None:
    edits: list[dict[str, Any]] = [vars(Edit(operator=f"a.{n}", replacement="zero", options={}, score=n / 7)) for n in range(13)]
    assert "<details>" not in removed(edits[:12])
    text = removed([*edits, vars(Edit(operator="b", replacement="identity", options={}, reason="dead"))])
    assert text.startswith(
        "14 operators were replaced: 13 by `zero`, 1 by `identity`. Of these, 1 went because nothing reads their output"
    )
    assert "<summary>All 14</summary>" in text
    assert "| `a.3` | zero | chosen | 0.4286 |" in text
    assert removed([]) == "No operator was removed."
    assert table(("a",), [("x|y",)]) == "| a |\n| --- |\n| x\\|y |"


def test_cards_of_plans_and_of_pipelines_do_not_replace_each_other(pruned: Pruned) -> None:
    plan = pruned.plan._card("p", None)
    pipeline = with_header({"library_name": "diffusers", "tags": ["ldpruner"]}, "Text.")
    assert merged(plan, pipeline) is None
    assert merged(pipeline, plan) is None
    assert merged(plan, None) == merged(plan, plan) == plan
    assert header_of("---\n: : :\n---\n") == header_of("no header") == {}


def test_a_card_needs_no_torch(folder: Path) -> None:
    code = (
        f"import sys; sys.argv = ['ldpruner', 'card', {str(folder)!r}]\n"
        "from ldpruner import cli\n"
        "cli.main()\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Plan.from_pretrained(folder).edits
