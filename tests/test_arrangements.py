"""Weights lie channels-last while scoring runs if calls were measured to be faster so, and as before when it has ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from conftest import PROBE, Command
from ldpruner import arrangements
from ldpruner.arrangements import arranges, channels_last, channels_last_ratio, fastest
from ldpruner.pipelines import Pipeline
from ldpruner.processes import Crew
from ldpruner.scoring import score


@pytest.mark.parametrize(("ratio", "laid"), [(0.8, True), (0.99, False), (1.3, False)])
def test_what_is_faster_is_taken_and_told(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch, ratio: float, laid: bool) -> None:
    monkeypatch.setattr(arrangements, "channels_last_ratio", lambda *_: ratio)
    before, told = {name: p.clone() for name, p in ldm.denoiser.named_parameters()}, list[str]()
    with fastest(ldm.denoiser, ldm.call(PROBE), Crew(), told.append):
        assert channels_last(ldm.denoiser) is laid
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
                yield from [value + 1, value, value + 2]

    clock = times()

    def seconds(*_: object) -> float:
        laid.append(channels_last(ldm.denoiser))
        return next(clock)

    monkeypatch.setattr(arrangements, "seconds", seconds)
    assert channels_last_ratio(ldm.denoiser, ldm.call(PROBE)) == 0.75
    assert laid == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


def test_what_the_user_laid_otherwise_stays(ldm: Pipeline) -> None:
    ldm.denoiser.to(memory_format=torch.channels_last)
    assert not arranges(ldm.denoiser)
    with fastest(ldm.denoiser, ldm.call(PROBE), Crew(), pytest.fail):
        pass
    assert channels_last(ldm.denoiser)
    assert not arranges(torch.nn.Linear(3, 3)), "and what has no convolution has no choice"


def test_scores_are_the_same_either_way(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for ratio in (0.5, 1.0):
        monkeypatch.setattr(arrangements, "channels_last_ratio", lambda *_, ratio=ratio: ratio)
        made.append([entry.score for entry in score(ldm, PROBE, replacements=["identity"]).scores])
    assert made[0] == pytest.approx(made[1], rel=1e-4, abs=1e-5)


def test_the_command_says_what_was_measured(command: Command, ldm_folder: str, tmp_path: object) -> None:
    words = ("--samples", "2", "--steps", "1", "--replacements", "zero")
    code, _, err = command("score", str(ldm_folder), "--out", f"{tmp_path}/run", *words)
    assert code == 0
    assert "Measured: with channels last a denoiser call takes" in err
