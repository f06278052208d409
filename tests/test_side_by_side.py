"""Several edits that share a denoiser call give what each gives alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import PROBE
from ldpruner import Pipeline, Probe, arrangements, discover, score
from ldpruner.errors import OperatorError
from ldpruner.operators import Call
from ldpruner.plans import Edit, Operators, Score
from ldpruner.scoring import Asked, fast
from ldpruner.scoring.fast import FastScorer
from ldpruner.scoring.side_by_side import side_by_side, tiled
from ldpruner.surgery import trial
from test_operators import conditional_unet, discovered, transformer, unet

Family = Callable[[], tuple[nn.Module, Call]]


def edits_of(operators: Operators) -> list[Edit]:
    return [
        Edit(operator=o.name, replacement=c.replacement, options=c.options)
        for o, c in operators.pairs()
        if c.replacement != "pointwise"
    ]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("family", [unet, conditional_unet, transformer])
def test_in_every_family_each_edit_is_made_in_its_own_samples_alone(family: Family, copies: int) -> None:
    model, call, operators = discovered(family)
    samples = call.batch // copies
    edits = edits_of(operators)
    groups = [edits[start::7] for start in range(7)]
    assert any(len({edit.operator for edit in group}) < len(group) or _nested(group) for group in groups)
    with torch.no_grad():
        for group in groups:
            with side_by_side(model, group, copies=copies, fitted={}):
                together = tiled(call, len(group), copies=copies).run(model)[0]
            parts = together.reshape(copies, len(group), samples, *together.shape[1:])
            for place, edit in enumerate(group):
                with trial(model, [edit]):
                    alone = call.run(model)[0]
                assert torch.allclose(parts[:, place].flatten(0, 1), alone, atol=1e-4, rtol=1e-4), edit.operator


def _nested(edits: list[Edit]) -> bool:
    return any(a.operator.startswith(f"{b.operator}.") for a in edits for b in edits)


def asked(pipeline: Pipeline, operators: Operators, at_once: int) -> Asked:
    probe = pipeline.completed(Probe(samples=6, num_inference_steps=2))
    return Asked(
        pipeline=pipeline,
        edits=edits_of(operators)[::3],
        probe=probe,
        operators=operators,
        targets=({"macs": 0.8},),
        edits_at_once=at_once,
    )


def values(scores: list[Score]) -> list[float]:
    return [number for entry in scores for number in (entry.score, entry.output_error or 0.0)]


@pytest.mark.parametrize("name", ["ldm", "text_to_image", "audio"])
def test_fast_scores_are_the_same_however_many_share_a_call(name: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(name)
    operators = discover(pipeline.denoiser, pipeline.call(PROBE), timing_repeats=0)
    alone, together = (list(FastScorer(few=2, allowance=30.0).scores(asked(pipeline, operators, n))) for n in (1, 3))
    assert [entry.judged for entry in alone] == [entry.judged for entry in together]
    assert len({entry.judged for entry in alone}) == 4, "all rungs"
    assert values(together) == pytest.approx(values(alone), rel=1e-3, abs=1e-5)


def test_what_does_not_share_a_call_is_measured_alone(ldm: Pipeline, operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    @contextmanager
    def full(_: nn.Module, edits: list[Edit], **__: object) -> Iterator[None]:
        tried.append(len(edits))
        raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    alone = list(FastScorer(few=2, allowance=30.0).scores(asked(ldm, operators, 1)))
    monkeypatch.setattr(fast, "side_by_side", full)
    instead = list(FastScorer(few=2, allowance=30.0).scores(asked(ldm, operators, 3)))
    assert set(tried) <= {2, 3}
    assert tried
    assert values(instead) == values(alone)


class Placed(nn.Module):
    """Adds a position that knows nothing of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(3, 3)
        self.map = nn.Linear(3, 3)

    def forward(self, latents: Tensor) -> Tensor:
        result: Tensor = latents + self.map(latents) + self.position(torch.ones_like(latents[:1]))
        return result


def test_an_output_without_samples_is_told() -> None:
    model = Placed()
    operators = discover(model, Call((torch.randn(2, 3),), {}), timing_repeats=0)
    edits = [edit for edit in edits_of(operators) if edit.replacement == "zero"]
    assert {edit.operator for edit in edits} == {"position", "map"}
    with side_by_side(model, edits, copies=1, fitted={}), pytest.raises(OperatorError, match="position: its output has no rows"):
        model(torch.randn(4, 3))
    assert not model._forward_pre_hooks
    assert not model.position._forward_hooks


@pytest.mark.parametrize(("ratio", "at_once"), [(0.3, 3), (0.9, 1)])
def test_calls_are_shared_where_that_was_measured_to_pay_and_a_run_goes_on_so(
    ldm: Pipeline, operators: Operators, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ratio: float, at_once: int
) -> None:
    monkeypatch.setattr(arrangements, "sharing_ratio", lambda *_: ratio)
    seen, told = [], list[str]()
    whole = FastScorer.scores

    def noted(self: FastScorer, question: Asked) -> Iterator[Score]:
        seen.append(question.edits_at_once)
        return whole(self, question)

    monkeypatch.setattr(FastScorer, "scores", noted)
    probe = Probe(samples=24, num_inference_steps=1)
    made = score(ldm, probe, method="fast", operators=operators, replacements=["zero"], out=tmp_path, tell=told.append)
    assert f"Measured: 3 replacements in one denoiser call take {ratio:.0%} of the time of 3 calls" in "\n".join(told)
    assert json.loads((tmp_path / "run.json").read_text())["edits_at_once"] == at_once
    (tmp_path / "scores.jsonl").unlink()
    monkeypatch.setattr(arrangements, "sharing_ratio", lambda *_: pytest.fail("measured again"))
    again = score(ldm, replace(probe), method="fast", operators=operators, replacements=["zero"], out=tmp_path)
    assert seen == [at_once, at_once]
    assert [entry.score for entry in again.scores] == [entry.score for entry in made.scores]
