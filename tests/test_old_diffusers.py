"""Folders that we save load in older releases of diffusers, in a process of their own, with the same output bit for bit.

`LDPRUNER_OLD_DIFFUSERS` names a folder with an older diffusers in it, which another process then imports in place of the installed
one; `make test-all` fills one. Releases up to 0.41 want huggingface_hub before 2, and that wants httpx:

    pip install --no-deps --target old/0.41.0 diffusers==0.41.0 "huggingface_hub<2" httpx httpcore
    LDPRUNER_OLD_DIFFUSERS=old/0.41.0 python -m pytest tests/test_old_diffusers.py -m apart
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ldpruner
from conftest import PROBE
from ldpruner import artifacts
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
)

OLD = os.environ.get("LDPRUNER_OLD_DIFFUSERS", "")
VERSION = "import diffusers\nreport['diffusers'] = {'version': diffusers.__version__}\n"
TRUSTED = {"trust_remote_code": True}

pytestmark = pytest.mark.apart


@pytest.fixture(scope="module")
def older() -> Iterator[None]:
    """New processes import what is in the folder first."""
    assert OLD, "LDPRUNER_OLD_DIFFUSERS names no folder with an older diffusers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(OLD).resolve()), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Two families, whole pipelines in three forms and their denoisers alone."""
    families = {family: pruned_family(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
    for entry in families.values():
        pruned, dense, folder = entry.pruned, entry.dense, entry.folder
        artifacts.save_denoiser(pruned.denoiser, folder / "portable alone")
        artifacts.save_denoiser(pruned.denoiser, folder / "plugin alone", form="plugin")
        whole = artifacts.densify(dense.pipeline.denoiser, dense.plan, dense.pipeline.call(PROBE), fitted=dense.fitted)
        artifacts.save_denoiser(whole, folder / "dense alone", form="dense")
    return families


def half(given: dict[str, Any]) -> dict[str, Any]:
    """The job in half precision, by the argument's old name, which all releases understand."""
    return {**given, "options": {**given["options"], "dtype": "float16"}, "dtype_keyword": "torch_dtype"}


@pytest.fixture(scope="module")
def without_us(saved: dict[str, Saved], older: None, tmp_path_factory: pytest.TempPathFactory) -> Child:
    """A process that cannot import ldpruner. What has to fail comes first: a portable folder brings our loader along."""
    jobs = {}
    for family, entry in saved.items():
        stock = type(entry.pruned.denoiser).__name__
        jobs[f"{family} untrusted alone"] = job(entry, "portable alone", via=stock)
        jobs[f"{family} plugin"] = job(entry, "plugin")
        jobs[f"{family} plugin alone"] = job(entry, "plugin alone", via="AutoModel")
        jobs[f"{family} dense"] = job(entry, "dense")
        jobs[f"{family} dense alone"] = job(entry, "dense alone", via="AutoModel")
    for family, entry in saved.items():
        jobs[f"{family} untrusted"] = job(entry, "portable")
        jobs[f"{family} portable"] = job(entry, "portable", resave=entry.folder / "resaved", **TRUSTED)
        jobs[f"{family} portable alone"] = job(entry, "portable alone", via="AutoModel", **TRUSTED)
        jobs[f"{family} half"] = half(job(entry, "portable", **TRUSTED))
        edit_config(entry.folder / "portable", entry.folder / "damaged", lambda config: config["operators"].popitem())
        jobs[f"{family} damaged"] = job(entry, "damaged", **TRUSTED)
    return run_child(WITHOUT_US + VERSION, jobs, tmp_path_factory.mktemp("without-us"))


@pytest.fixture(scope="module", params=[LDPRUNER_FIRST, DIFFUSERS_FIRST], ids=["ldpruner first", "diffusers first"])
def with_us(
    request: pytest.FixtureRequest,
    saved: dict[str, Saved],
    without_us: Child,
    older: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Child:
    """A process that imports ldpruner; it also loads what the process without it saved."""
    jobs = {}
    for family, entry in saved.items():
        jobs[f"{family} plugin"] = job(entry, "plugin")
        jobs[f"{family} plugin alone"] = job(entry, "plugin alone", via="AutoModel")
        jobs[f"{family} component"] = job(entry, "portable", via=type(entry.pruned.denoiser).__name__, subfolder="unet")
        jobs[f"{family} resaved"] = job(entry, "resaved")
    return run_child(request.param + VERSION, jobs, tmp_path_factory.mktemp("with-us"))


def test_another_diffusers_than_the_installed_one_is_tried(without_us: Child, with_us: Child) -> None:
    tried = {child.report["diffusers"]["version"] for child in (without_us, with_us)}
    assert len(tried) == 1
    assert tried != {importlib.metadata.version("diffusers")}


def expected(saved: Saved, cast: torch.dtype = torch.float32) -> torch.Tensor:
    """What the installed diffusers gives, with the inputs of convolutional shortcuts laid contiguous, as diffusers 0.36 lays them.

    Newer ones leave them as they are, and on some processors last bits differ by that.
    """
    denoiser: nn.Module = (
        saved.pruned.denoiser if cast is torch.float32 else ldpruner.load(saved.folder / "portable").denoiser.to(cast)
    )
    with ExitStack() as stack:
        for name, module in denoiser.named_modules():
            if name.endswith("conv_shortcut"):
                stack.callback(module.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:])).remove)
        return saved.output(denoiser)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["portable", "portable alone"])
def test_a_portable_folder_gives_the_same_bits(family: str, what: str, saved: dict[str, Saved], without_us: Child) -> None:
    assert torch.equal(without_us.output(f"{family} {what}"), expected(saved[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_portable_folder_gives_the_same_bits_in_half_precision(family: str, saved: dict[str, Saved], without_us: Child) -> None:
    assert torch.equal(without_us.output(f"{family} half"), expected(saved[family], torch.float16))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["plugin", "plugin alone", "component", "resaved"])
def test_a_plugin_folder_gives_the_same_bits_after_one_import(
    family: str, what: str, saved: dict[str, Saved], with_us: Child
) -> None:
    assert torch.equal(with_us.output(f"{family} {what}"), expected(saved[family]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["dense", "dense alone"])
def test_a_dense_folder_computes_the_same(family: str, what: str, saved: dict[str, Saved], without_us: Child) -> None:
    wanted = saved[family].output(saved[family].dense.denoiser)
    torch.testing.assert_close(without_us.output(f"{family} {what}"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_loaded_says_what_to_do(family: str, without_us: Child) -> None:
    for what in ("untrusted alone", "plugin", "plugin alone"):
        assert "pip install ldpruner" in without_us.error(f"{family} {what}")
    assert "its config.json and its weights do not belong together" in without_us.error(f"{family} damaged")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_portable_folder_that_is_not_trusted_says_so_or_gives_the_same_bits(
    family: str, saved: dict[str, Saved], without_us: Child
) -> None:
    """Some old releases trust whatever lies in a local folder."""
    if "error" in without_us.report[f"{family} untrusted"]:
        assert "trust_remote_code=True" in without_us.error(f"{family} untrusted")
    else:
        assert torch.equal(without_us.output(f"{family} untrusted"), expected(saved[family]))


def test_the_loaded_denoiser_is_exactly_the_stock_class(without_us: Child, with_us: Child) -> None:
    loaded = [entry for child in (without_us, with_us) for entry in child.report.values() if isinstance(entry, dict)]
    assert all(entry["stock"] for entry in loaded if "class" in entry)
    assert sum("class" in entry for entry in loaded) >= 18
