"""What the original generates is made once, found again by its content, and made anew where it can no longer be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from conftest import PROBE
from ldpruner.files import cache_folder
from ldpruner.originals import Original
from ldpruner.packing import Part, packed, unpacked
from ldpruner.pipelines import Pipeline
from ldpruner.remembering import encoding_once
from ldpruner.scoring.teacher_forced import answers
from ldpruner.trajectories import spread_calls


@pytest.fixture
def calls(request: pytest.FixtureRequest) -> Any:
    """How often a pipeline's denoiser runs."""
    made: list[int] = []

    def counting(pipeline: Pipeline) -> list[int]:
        handle = pipeline.denoiser.register_forward_hook(lambda *_: made.append(1))
        request.addfinalizer(handle.remove)
        return made

    return counting


def kept() -> list[Path]:
    return sorted(cache_folder().glob("originals/*/*.safetensors"))


def test_latents_and_calls_are_made_once(text_to_image: Pipeline, calls: Any) -> None:
    probe = replace(PROBE, prompts=("a", "b"))
    plain, wanted = text_to_image.latents(probe, batch_size=2), spread_calls(text_to_image, probe, 2)
    first = Original.of(text_to_image)
    known = answers(text_to_image.denoiser, first.spread_calls(probe, 2))
    assert torch.equal(first.latents(probe, batch_size=2), plain)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(known, answers(text_to_image.denoiser, wanted), strict=True))
    made = calls(text_to_image)
    again = Original.of(text_to_image)
    assert torch.equal(again.latents(probe, batch_size=2), plain)
    found = again.spread_calls(probe, 2)
    assert not made
    assert all(torch.equal(*pair) for pair in zip(answers(text_to_image.denoiser, found), known, strict=True))


def test_another_question_is_another_answer(ldm: Pipeline, calls: Any) -> None:
    original = Original.of(ldm)
    base = original.latents(PROBE)
    for probe in (replace(PROBE, seed=7), replace(PROBE, num_inference_steps=3), replace(PROBE, samples=4)):
        assert torch.equal(original.latents(probe), ldm.latents(probe))
    next(ldm.denoiser.parameters()).data.mul_(1.5)
    try:
        assert not torch.equal(Original.of(ldm).latents(PROBE), base), "the weights are part of the question"
    finally:
        next(ldm.denoiser.parameters()).data.div_(1.5)


def test_a_damaged_file_is_made_anew(ldm: Pipeline) -> None:
    probe = replace(PROBE, seed=11)
    before = set(kept())
    made = Original.of(ldm).latents(probe)
    (file,) = set(kept()) - before
    for broken in (file.read_bytes()[:40], b"", packed_bytes(file, {"no": torch.ones(1)})):
        file.write_bytes(broken)
        assert torch.equal(Original.of(ldm).latents(probe), made)


def packed_bytes(file: Path, tensors: dict[str, Tensor]) -> bytes:
    part = Part(path=file.with_name("other.safetensors"))
    part.write(tensors)
    content = part.path.read_bytes()
    part.path.unlink()
    return content


def test_a_cache_that_cannot_be_written_costs_time_only(ldm: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LDPRUNER_CACHE", str(tmp_path / "file"))
    assert torch.equal(Original.of(ldm).latents(PROBE), ldm.latents(PROBE))


def test_prompts_are_not_encoded_again_by_the_next_run(text_to_image: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, asked = text_to_image.pipe.text_encoder, list[int]()
    whole, probe = type(encoder).forward, replace(PROBE, prompts=("quite", "another"))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(type(encoder), "forward", forward)
    with encoding_once(text_to_image):
        first = text_to_image.latents(probe)
    before = len(asked)
    assert before
    with encoding_once(text_to_image):
        assert torch.equal(text_to_image.latents(probe), first)
    assert len(asked) == before


def test_trees_come_back_as_they_were() -> None:
    shared = torch.arange(3.0)
    output = BaseModelOutputWithPooling(last_hidden_state=shared, hidden_states=(shared, torch.ones(2, dtype=torch.int64)))
    tree = {"a": [1, 2.5, None, True], "b": (shared, "text"), "c": output}
    back = unpacked(packed(tree))
    assert back["a"] == tree["a"]
    assert type(back["b"]) is tuple
    assert back["b"][1] == "text"
    assert isinstance(back["c"], BaseModelOutputWithPooling)
    assert back["c"].last_hidden_state is back["b"][0], "one tensor stays one"
    assert back["c"].hidden_states[1].dtype == torch.int64
    assert len(packed(tree)) == 3, "two tensors and the shape"


def test_only_what_can_be_read_back_is_kept() -> None:
    with pytest.raises(TypeError, match="set cannot be kept"):
        packed({"a": {1, 2}})
    with pytest.raises(TypeError, match="is no class of model outputs"):
        unpacked({"tree": torch.frombuffer(bytearray(b'["os:system", {}]'), dtype=torch.uint8)})
