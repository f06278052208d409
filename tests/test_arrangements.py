"""Weights lie channels-last while scoring runs if calls were measured to be faster so, and as before when it has ended."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import PROBE, Command, tiny_ldm
from ldpruner import arrangements
from ldpruner.arrangements import arrangement, arranges, channels_last_pays, channels_last_ratio, fastest
from ldpruner.operators import discover
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit
from ldpruner.probes import Probe
from ldpruner.processes import Crew
from ldpruner.scoring import score
from ldpruner.surgery import trial, uncompiled


@pytest.mark.parametrize(("ratio", "laid"), [(0.8, True), (0.99, False), (1.3, False)])
def test_what_is_faster_is_taken_and_told(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch, ratio: float, laid: bool) -> None:
    monkeypatch.setattr(arrangements, "channels_last_ratio", lambda *_: ratio)
    before, told = {name: p.clone() for name, p in ldm.denoiser.named_parameters()}, list[str]()
    pays = channels_last_pays(ldm.denoiser, ldm.call(PROBE), told.append)
    with fastest(ldm.denoiser, ldm.call(PROBE), Crew(), told.append, channels_last=pays):
        assert arrangement(ldm.denoiser) == [laid, False]
    (line,) = told
    assert line.startswith(f"Measured: with channels last a denoiser call takes {ratio:.0%} of its time; scoring runs ")
    assert line.endswith("so." if laid else "as it is.")
    for name, parameter in ldm.denoiser.named_parameters():
        assert parameter.is_contiguous()
        assert torch.equal(parameter, before[name])


def test_rounds_are_timed_in_turn_and_the_median_counts(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([(2.0, 4.0), (9.0, 1.0), (3.0, 4.0)])
    laid: list[bool] = []

    def times() -> Iterator[float]:
        for pair in taken:
            for value in pair:
                yield from [(value + 1) / 16, value / 16, (value + 2) / 16]

    clock = times()

    def seconds(*_: object) -> float:
        laid.append(arrangement(ldm.denoiser)[0])
        return next(clock)

    monkeypatch.setattr(arrangements, "seconds", seconds)
    assert channels_last_ratio(ldm.denoiser, ldm.call(PROBE)) == 0.75
    assert laid == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


def test_calls_that_take_long_are_timed_once_a_round(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([7.0, 8.0, 7.0, 7.0, 8.0, 7.0])
    monkeypatch.setattr(arrangements, "seconds", lambda *_: next(taken))
    assert channels_last_ratio(ldm.denoiser, ldm.call(PROBE)) == 1.0


def test_a_method_of_few_calls_measures_nothing(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrangements, "channels_last_ratio", lambda *_: pytest.fail("measured"))
    assert score(ldm, PROBE, method="magnitude", tell=pytest.fail).scores


@pytest.fixture
def ldm() -> Pipeline:
    """Few operators: all of them are scored again and again."""
    return Pipeline(tiny_ldm(small=True), source="small-ldm")


def test_what_the_user_laid_otherwise_stays(ldm: Pipeline) -> None:
    ldm.denoiser.to(memory_format=torch.channels_last)
    assert not channels_last_pays(ldm.denoiser, ldm.call(PROBE), pytest.fail)
    for wanted in (True, False):
        with fastest(ldm.denoiser, ldm.call(PROBE), Crew(), pytest.fail, channels_last=wanted):
            pass
        assert arrangement(ldm.denoiser) == [True, False]
    assert not arranges(torch.nn.Linear(3, 3)), "and what has no convolution has no choice"


def test_scores_are_the_same_either_way(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for ratio in (0.5, 1.0):
        monkeypatch.setattr(arrangements, "_kept_ratio", lambda *_, ratio=ratio: ratio)
        made.append([entry.score for entry in score(ldm, PROBE, replacements=["shortcut"]).scores])
    assert made[0] == pytest.approx(made[1], rel=1e-4, abs=1e-5)
    assert channels_last_ratio(ldm.denoiser, ldm.call(PROBE)) > 0
    assert not any(parameter.is_inference() for parameter in ldm.denoiser.parameters()), "they can still be trained"


def test_a_run_goes_on_as_it_began(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = {}
    for ratio, name in ((0.5, "laid"), (1.0, "stopped")):
        monkeypatch.setattr(arrangements, "_kept_ratio", lambda *_, ratio=ratio: ratio)
        if name == "stopped":
            shutil.copytree(tmp_path / "laid", tmp_path / "stopped")
            lines = (tmp_path / "stopped" / "scores.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "stopped" / "scores.jsonl").write_text("".join(lines[:2]))
        made = score(ldm, PROBE, replacements=["shortcut"], out=tmp_path / name)
        runs[name] = [entry.score for entry in made.scores]
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["channels_last"] is True
    assert runs["stopped"] == runs["laid"]


def test_the_command_says_what_was_measured(command: Command, ldm_folder: str, tmp_path: object) -> None:
    words = ("--samples", "2", "--steps", "1", "--replacements", "zero")
    code, _, err = command("score", str(ldm_folder), "--out", f"{tmp_path}/run", *words)
    assert code == 0
    assert "Measured: with channels last a denoiser call takes" in err


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """What other tests compiled is not taken for what this one asks."""
    torch._dynamo.reset()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compiling is worth it however short the run, and takes PyTorch's tracing but no compiler; which blocks ran so."""
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        def run(*args: object) -> object:
            ran.append("compiled")
            return graph.forward(*args)

        return run

    monkeypatch.setattr(arrangements, "COMPILED_S", 0.0)
    monkeypatch.setattr(arrangements, "COMPILING", {"backend": backend})
    return ran


def test_blocks_are_compiled_where_that_pays_and_forgotten_afterwards(
    ldm: Pipeline, monkeypatch: pytest.MonkeyPatch, compiling: list[str]
) -> None:
    call, told = ldm.call(PROBE), list[str]()
    wanted = call.run(ldm.denoiser)[0]
    whole = arrangements.compiled_ratio
    for ratio, stays in ((0.7, True), (0.99, False)):
        monkeypatch.setattr(arrangements, "compiled_ratio", lambda *args, ratio=ratio: (ratio, whole(*args)[1]))
        with fastest(ldm.denoiser, call, Crew(), told.append, calls=10), torch.inference_mode():
            assert any(block._compiled_call_impl for block in ldm.denoiser.modules()) is stays
            compiling.clear()
            assert torch.allclose(call.run(ldm.denoiser)[0], wanted, atol=1e-5)
            assert bool(compiling) is stays
        assert not any(block._compiled_call_impl for block in ldm.denoiser.modules())
    assert "of compiling its blocks a denoiser call takes 70% of its time; scoring runs so." in told[0]
    assert told[1].endswith("scoring runs as it is.")


def test_an_edited_block_runs_as_it_is_written(ldm: Pipeline, compiling: list[str]) -> None:
    for block in arrangements.blocks_of(ldm.denoiser):
        block.compile(dynamic=False, **arrangements.COMPILING)
    edit = Edit(operator="up_blocks.0.resnets.0.conv1", replacement="zero", options=zero_of(ldm, "up_blocks.0.resnets.0.conv1"))
    up, call = ldm.denoiser.get_submodule("up_blocks.0"), ldm.call(PROBE)
    with torch.inference_mode():
        with trial(ldm.denoiser, [edit]):
            assert up._compiled_call_impl is None
            assert ldm.denoiser.get_submodule("mid_block")._compiled_call_impl is not None
            changed = call.run(ldm.denoiser)[0]
        assert up._compiled_call_impl is not None
        with uncompiled(ldm.denoiser.modules()), trial(ldm.denoiser, [edit]):
            assert torch.allclose(call.run(ldm.denoiser)[0], changed, atol=1e-5)
    assert compiling


def zero_of(pipeline: Pipeline, name: str) -> dict[str, Any]:
    operator = discover(pipeline.denoiser, pipeline.call(PROBE), timing_repeats=0)[name]
    return dict(operator.candidate("zero").options)


def test_where_nothing_compiles_scoring_runs_as_it_is(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(arrangements, "COMPILED_S", 0.0)
    monkeypatch.setattr(arrangements, "COMPILING", {"backend": refusing})
    told: list[str] = []
    with fastest(ldm.denoiser, ldm.call(PROBE), Crew(), told.append, calls=10):
        ldm.call(PROBE).run(ldm.denoiser)
    assert "does not run; scoring runs as it is." in told[-1]


@pytest.mark.slow
def test_compiled_or_not_scores_are_the_same(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch, compiling: list[str]) -> None:
    probe = Probe(samples=4, num_inference_steps=2)
    made = []
    for threshold in (math.inf, 0.0):
        monkeypatch.setattr(arrangements, "COMPILED_S", threshold)
        monkeypatch.setattr(arrangements, "WORTH_IT", math.inf)
        run = score(ldm, probe, method="fast", replacements=["shortcut"], budget={"macs": "80%"})
        made.append([entry.score for entry in run.scores])
        assert bool(compiling) is not bool(threshold)
    assert made[0] == pytest.approx(made[1], rel=1e-4, abs=1e-5)
