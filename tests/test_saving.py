"""Saved folders load in plain diffusers, in a process of their own, with the same output bit for bit; or fail and say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

import ldpruner
from conftest import PROBE, tiny_ldm, tiny_stable_diffusion
from ldpruner import Edit, Plan, ldpruner_v1
from ldpruner.errors import ArtifactError, PipelineError, UnknownNameError
from ldpruner.operators.tracing import architecture
from ldpruner.pipelines import Pipeline
from ldpruner.replacements import REPLACEMENTS
from saving import (
    DIFFUSERS_FIRST,
    FAMILIES,
    LDPRUNER_FIRST,
    WITHOUT_US,
    Child,
    Saved,
    edit_config,
    job,
    pruned_family,
    run_child,
    without,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {family: pruned_family(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def without_us(saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> Child:
    """A process that cannot import ldpruner. What has to fail comes first: a portable folder brings our loader along."""
    jobs = {}
    for family, entry in saved.items():
        stock = type(entry.pruned.denoiser).__name__
        jobs[f"{family} untrusted"] = job(entry, "portable")
        jobs[f"{family} untrusted component"] = job(entry, "portable", via=stock, subfolder="unet")
        jobs[f"{family} plugin"] = job(entry, "plugin")
        jobs[f"{family} dense"] = job(entry, "dense")
    for family, entry in saved.items():
        trusted = {"trust_remote_code": True}
        jobs[f"{family} portable"] = job(entry, "portable", resave=entry.folder / "resaved", **trusted)
        jobs[f"{family} half"] = job(entry, "portable", resave=entry.folder / "resaved-half", dtype="float16", **trusted)
        edit_config(entry.folder / "portable", entry.folder / "damaged", lambda config: config["operators"].popitem())
        jobs[f"{family} damaged"] = job(entry, "damaged", **trusted)
    return run_child(WITHOUT_US, jobs, tmp_path_factory.mktemp("without-us"))


@pytest.fixture(scope="module")
def ldpruner_first(saved: dict[str, Saved], without_us: Child, tmp_path_factory: pytest.TempPathFactory) -> Child:
    """A process that imports ldpruner before anything else; it also loads what the process without it saved."""
    jobs = {}
    for family, entry in saved.items():
        jobs[f"{family} plugin"] = job(entry, "plugin")
        jobs[f"{family} portable component"] = job(entry, "portable", via="AutoModel", subfolder="unet")
        jobs[f"{family} resaved"] = job(entry, "resaved")
        jobs[f"{family} resaved-half"] = job(entry, "resaved-half", dtype="float16")
    return run_child(LDPRUNER_FIRST, jobs, tmp_path_factory.mktemp("ldpruner-first"))


@pytest.fixture(scope="module")
def diffusers_first(saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> Child:
    jobs = {f"{family} plugin": job(entry, "plugin") for family, entry in saved.items()}
    return run_child(DIFFUSERS_FIRST, jobs, tmp_path_factory.mktemp("diffusers-first"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plans_hold_every_replacement_and_dead_operators(family: str, saved: dict[str, Saved]) -> None:
    edits = saved[family].pruned.plan.edits
    assert {edit.replacement for edit in edits} == set(REPLACEMENTS)
    assert {edit.reason for edit in edits} == {"chosen", "dead"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_portable_folder_gives_the_same_bits_where_ldpruner_cannot_be_imported(
    family: str, saved: dict[str, Saved], without_us: Child
) -> None:
    assert "ldpruner" in without_us.report["import ldpruner"]
    expected = saved[family].output(saved[family].pruned.denoiser)
    assert torch.equal(without_us.output(f"{family} portable"), expected)
    assert not torch.allclose(expected, saved[family].output(saved[family].pruned.pipeline.denoiser), atol=1e-3), "nothing pruned"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("child", ["ldpruner_first", "diffusers_first"])
def test_a_plugin_folder_gives_the_same_bits_after_one_import(
    family: str, child: str, saved: dict[str, Saved], request: pytest.FixtureRequest
) -> None:
    loaded = request.getfixturevalue(child).output(f"{family} plugin")
    assert torch.equal(loaded, saved[family].output(saved[family].pruned.denoiser))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_folder_computes_the_same_with_nothing_of_ours(family: str, saved: dict[str, Saved], without_us: Child) -> None:
    expected = saved[family].output(saved[family].dense.denoiser)
    torch.testing.assert_close(without_us.output(f"{family} dense"), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((saved[family].folder / "dense" / "unet" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_component_of_a_portable_folder_loads_by_itself_once_ldpruner_is_imported(
    family: str, saved: dict[str, Saved], ldpruner_first: Child
) -> None:
    loaded = ldpruner_first.output(f"{family} portable component")
    assert torch.equal(loaded, saved[family].output(saved[family].pruned.denoiser))


def test_the_loaded_denoiser_is_exactly_the_stock_class(without_us: Child, ldpruner_first: Child, diffusers_first: Child) -> None:
    classes = {"unconditional": UNet2DModel.__name__, "text-to-image": UNet2DConditionModel.__name__}
    for child in (without_us, ldpruner_first, diffusers_first):
        loaded = {name: entry for name, entry in child.report.items() if "class" in entry}
        assert len(loaded) >= 2
        for name, entry in loaded.items():
            assert entry == {"class": classes[name.split()[0]], "stock": True}, name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrusted_portable_folder_fails_and_says_to_trust_it(family: str, without_us: Child) -> None:
    assert "trust_remote_code=True" in without_us.error(f"{family} untrusted")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["plugin", "untrusted component"])
def test_without_our_loader_loading_fails_and_says_what_to_install(family: str, what: str, without_us: Child) -> None:
    assert "pip install ldpruner" in without_us.error(f"{family} {what}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_portable_folder_fails_where_ldpruner_cannot_be_imported(family: str, without_us: Child) -> None:
    assert "its config.json and its weights do not belong together" in without_us.error(f"{family} damaged")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_save_of_a_loaded_folder_is_a_plugin_folder_with_the_same_bits(
    family: str, saved: dict[str, Saved], ldpruner_first: Child
) -> None:
    resaved = saved[family].folder / "resaved"
    assert torch.equal(ldpruner_first.output(f"{family} resaved"), saved[family].output(saved[family].pruned.denoiser))
    index = json.loads((resaved / "model_index.json").read_text(encoding="utf-8"))
    assert index["unet"] == ["diffusers", type(saved[family].pruned.denoiser).__name__]
    assert not list(resaved.rglob("*.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_survives_loading_saving_and_loading_again(
    family: str, saved: dict[str, Saved], without_us: Child, ldpruner_first: Child
) -> None:
    pruned = ldpruner.load(saved[family].folder / "portable").denoiser.half()
    expected = saved[family].output(pruned)
    assert expected.dtype == torch.float16
    assert torch.equal(without_us.output(f"{family} half"), expected)
    assert torch.equal(ldpruner_first.output(f"{family} resaved-half"), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["portable", "plugin"])
def test_our_own_load_trusts_no_code_and_gives_a_denoiser_that_can_be_cast(family: str, form: str, saved: dict[str, Saved]) -> None:
    denoiser = ldpruner.load(saved[family].folder / form).denoiser
    before = saved[family].output(denoiser)
    assert torch.equal(before, saved[family].output(saved[family].pruned.denoiser))
    assert torch.equal(saved[family].output(denoiser.to(torch.float64)).float(), before) is False, "computed in double precision"
    torch.testing.assert_close(saved[family].output(denoiser).float(), before)
    assert {parameter.dtype for parameter in denoiser.half().parameters()} == {torch.float16}


def test_a_pipeline_pruned_in_half_precision_loads_in_it(saved: dict[str, Saved], tmp_path: Path) -> None:
    entry = saved["text-to-image"]
    pipeline = Pipeline(tiny_stable_diffusion(tmp_path).to(torch.float16), source="half")
    pruned = ldpruner.prune(pipeline, plan=entry.pruned.plan)
    pruned.save_pretrained(tmp_path / "half")
    assert all(tensor.dtype == torch.float16 for tensor in weights_of(tmp_path / "half").values())
    loaded = ldpruner.load(tmp_path / "half", dtype=torch.float16).denoiser
    assert torch.equal(entry.output(loaded), entry.output(pruned.denoiser))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_weights_in_shards_load_with_the_same_bits(saved: dict[str, Saved], tmp_path: Path) -> None:
    entry = saved["unconditional"]
    entry.pruned.denoiser.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(entry.output(UNet2DModel.from_pretrained(tmp_path)), entry.output(entry.pruned.denoiser))


def test_a_pruned_folder_can_be_pruned_further_and_saved_again(saved: dict[str, Saved], tmp_path: Path) -> None:
    entry = saved["unconditional"]
    pipeline = ldpruner.load(entry.folder / "portable")
    more = Edit(operator="conv_norm_out", replacement="identity", options={"returns": [[0, "input"]], "many": False})
    plan = Plan(model=architecture(pipeline.denoiser), denoiser="UNet2DModel", edits=(more,), probe=PROBE)
    pruned = ldpruner.prune(pipeline, plan=plan)
    pruned.save_pretrained(tmp_path / "more")
    loaded = ldpruner.load(tmp_path / "more").denoiser
    assert set(loaded.config.quantization_config["operators"]) == {*entry.pruned.plan.operators_config(), "conv_norm_out"}
    assert torch.equal(entry.output(loaded), entry.output(pruned.denoiser))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("usual_calls")
def test_the_saved_plan_is_small_and_prunes_the_base_model_to_the_same_output(family: str, saved: dict[str, Saved]) -> None:
    entry = saved[family]
    path = entry.folder / "portable" / "pruning_plan.json"
    assert path.stat().st_size < 20_000
    again = ldpruner.prune(entry.pruned.pipeline, plan=path)
    torch.testing.assert_close(entry.output(again.denoiser), entry.output(entry.pruned.denoiser), rtol=1e-4, atol=1e-5)


def test_a_saved_plan_without_fitted_weights_prunes_the_base_model_to_the_same_bits(
    saved: dict[str, Saved], tmp_path: Path
) -> None:
    entry = saved["unconditional"]
    pruned = ldpruner.prune(entry.pruned.pipeline, plan=without(entry.pruned.plan, lambda edit: edit.replacement == "pointwise"))
    pruned.save_pretrained(tmp_path / "out")
    again = ldpruner.prune(Pipeline(tiny_ldm(), source="base"), plan=tmp_path / "out" / "pruning_plan.json")
    assert torch.equal(entry.output(again.denoiser), entry.output(pruned.denoiser))
    assert torch.equal(entry.output(ldpruner.load(tmp_path / "out").denoiser), entry.output(pruned.denoiser))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["portable", "plugin"])
def test_the_config_says_what_was_removed_and_the_weights_hold_only_the_rest(
    family: str, form: str, saved: dict[str, Saved]
) -> None:
    entry = saved[family]
    config = json.loads((entry.folder / form / "unet" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["format_version"] == 1
    assert config["operators"] == json.loads(json.dumps(entry.pruned.plan.operators_config()))
    weights = weights_of(entry.folder / form)
    assert sum(tensor.numel() for tensor in weights.values()) == entry.pruned.params[1] < entry.pruned.params[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_holds_no_pickle_and_code_only_in_the_portable_form(family: str, saved: dict[str, Saved]) -> None:
    for form in ("portable", "plugin", "dense"):
        folder = saved[family].folder / form
        files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        assert {Path(file).suffix for file in files - {".ldpruner"}} <= {".json", ".safetensors", ".txt", ".py", ".jinja", ".md"}
        assert {file for file in files if file.endswith(".py")} == ({"unet/ldpruner_v1.py"} if form == "portable" else set())
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        assert (record["form"], record["base"]) == (form, f"tiny-{family}")


def test_the_code_in_a_portable_folder_is_the_package_s_own_file(saved: dict[str, Saved]) -> None:
    copied = (saved["unconditional"].folder / "portable" / "unet" / "ldpruner_v1.py").read_bytes()
    assert copied == Path(ldpruner_v1.__file__).read_bytes()


def test_a_save_over_an_earlier_one_leaves_nothing_of_it(saved: dict[str, Saved], tmp_path: Path) -> None:
    for form in ("portable", "plugin"):
        saved["unconditional"].pruned.save_pretrained(tmp_path / "out", form=form)
    assert not list(tmp_path.rglob("*.py"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("replacement", sorted(REPLACEMENTS))
def test_a_config_that_forgets_an_operator_does_not_load(
    family: str, replacement: str, saved: dict[str, Saved], tmp_path: Path
) -> None:
    entry = saved[family]
    forgotten = next(edit.operator for edit in entry.pruned.plan.edits if edit.replacement == replacement)
    folder = edit_config(entry.folder / "plugin", tmp_path / "damaged", lambda config: config["operators"].pop(forgotten))
    with pytest.raises(ValueError, match=r"weights of this pruned model (lack|hold) .* first .*do not belong together"):
        type(entry.pruned.denoiser).from_pretrained(folder, subfolder="unet")
    with pytest.raises(PipelineError, match="do not belong together"):
        ldpruner.load(folder)


@pytest.mark.parametrize("replacement", ["identity", "zero"])
def test_a_config_that_removes_more_than_the_weights_lack_does_not_load(
    replacement: str, saved: dict[str, Saved], tmp_path: Path
) -> None:
    options = {"returns": [[0, "input"]], "many": False}
    if replacement == "zero":
        options = {"returns": [{"source": [0, "input"], "shape": [[0, 1, 1], 16, [2, 1, 1], [3, 1, 1]]}], "many": False}
    more = {"mid_block.resnets.0.conv1": {"replacement": replacement, "options": options}}
    entry = saved["unconditional"]
    folder = edit_config(entry.folder / "plugin", tmp_path / "damaged", lambda config: config["operators"].update(more))
    message = r"hold 2 tensors too many, first mid_block\.resnets\.0\.conv1\.bias: .* do not belong together"
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(folder, subfolder="unet")
    with pytest.raises(PipelineError, match=message):
        ldpruner.load(folder)


def test_a_config_that_names_an_operator_the_model_lacks_does_not_load(saved: dict[str, Saved], tmp_path: Path) -> None:
    unknown = {"mid_block.resnets.9": {"replacement": "identity", "options": {"returns": [[0, "input"]], "many": False}}}
    entry = saved["unconditional"]
    folder = edit_config(entry.folder / "plugin", tmp_path / "damaged", lambda config: config["operators"].update(unknown))
    with pytest.raises(AttributeError, match="9"):
        UNet2DModel.from_pretrained(folder, subfolder="unet")


def test_a_format_of_the_future_asks_for_an_upgrade(saved: dict[str, Saved], tmp_path: Path) -> None:
    entry = saved["unconditional"]
    folder = edit_config(entry.folder / "plugin", tmp_path / "future", lambda config: config.update(format_version=2))
    message = r"pruned with ldpruner's format 2, and this loader reads 1: update with `pip install --upgrade ldpruner`"
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(folder, subfolder="unet")
    with pytest.raises(PipelineError, match=message):
        ldpruner.load(folder)


def test_the_dense_form_refuses_what_no_weights_can_do_and_names_it(saved: dict[str, Saved], tmp_path: Path) -> None:
    message = r"cannot hold 1 of \d+ edits \(pointwise at down_blocks\.0\.downsamplers\.0\)\. Save as portable, or plan with"
    with pytest.raises(ArtifactError, match=message):
        saved["unconditional"].pruned.save_pretrained(tmp_path / "out", form="dense")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_form_is_refused_before_anything_is_written(saved: dict[str, Saved], tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"form 'portabel' is unknown: did you mean portable\?"):
        saved["unconditional"].pruned.save_pretrained(tmp_path / "out", form="portabel")
    assert list(tmp_path.iterdir()) == []


def test_importing_ldpruner_brings_neither_torch_nor_diffusers(ldpruner_first: Child) -> None:
    assert ldpruner_first.report["brought"] == []
