"""Every denoiser class of diffusers goes the whole way: discovered, every replacement tried, pruned, saved, loaded, trained.

A chosen dozen runs with the other tests, the rest by `make test-all`. What each has to stand is in `families/walk.py`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
from diffusers.models.modeling_utils import ModelMixin

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "families"))

from loading import LIBRARY, Loader  # noqa: E402
from run import kept_lines  # noqa: E402
from specimens import specimens  # noqa: E402
from table import page  # noqa: E402
from walk import walk  # noqa: E402

KNOWN = specimens()
DOZEN = {
    "AllegroTransformer3DModel",
    "CogView4Transformer2DModel",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "GlmImageTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "OmniGenTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "StableAudioDiTModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
}
NO_DENOISERS = {"MotionAdapter"}  # weights that UNetMotionModel is made of, without a forward of its own


@pytest.fixture(scope="module")
def loaders() -> Iterator[dict[str, Loader]]:
    """Other processes that load what was saved."""
    started = {form: Loader(form) for form in LIBRARY}
    yield started
    for loader in started.values():
        loader.close()


def rows(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=[] if name in DOZEN else [pytest.mark.exhaustive]) for name in sorted(names)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what diffusers' classes warn of is not ours to mend
@pytest.mark.parametrize("name", rows([name for name in KNOWN if not KNOWN[name].fails]))
def test_a_denoiser_goes_the_whole_way(name: str, loaders: dict[str, Loader], tmp_path: Path) -> None:
    found = walk(KNOWN[name], KNOWN[name].stated_call(), tmp_path, loaders)
    assert found.tried == sum(found.candidates.values()) > 0
    assert found.edits > 0


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(name for name in KNOWN if KNOWN[name].fails))
def test_what_does_not_get_to_the_end_is_known_with_its_cause(name: str, loaders: dict[str, Loader], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=KNOWN[name].fails):
        walk(KNOWN[name], KNOWN[name].stated_call(), tmp_path, loaders)


def test_no_denoiser_class_of_diffusers_is_left_out() -> None:
    classes = (getattr(diffusers, name) for name in dir(diffusers) if name[0].isupper())
    found = {
        each.__name__
        for each in classes
        if inspect.isclass(each)
        and issubclass(each, ModelMixin)
        and each.__module__.startswith(("diffusers.models.unets.", "diffusers.models.transformers."))
    }
    assert found - NO_DENOISERS <= KNOWN.keys()


def test_the_page_of_families_says_what_the_lines_say() -> None:
    lines = kept_lines(ROOT / "families" / "results.jsonl")
    assert {line["name"] for line in lines} == KNOWN.keys()
    assert page(lines, KNOWN) == (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
