"""Solvers that need few steps stand in for a pipeline's scheduler while it generates, and what they rank is checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import PROBE, PROBING, Command
from ldpruner.errors import PipelineError, UnknownNameError
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.scoring import rank_agreement, score
from ldpruner.solvers import SOLVERS, place_in


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, of UniPC
@pytest.mark.parametrize("name", list(SOLVERS))
def test_each_solver_comes_to_nearly_the_same_latents(text_to_image: Pipeline, name: str) -> None:
    probe = replace(PROBE, prompts=("a",), num_inference_steps=100)
    own, latents = text_to_image.pipe.scheduler, text_to_image.latents(probe)
    near = text_to_image.latents(replace(probe, solver=name))
    far = text_to_image.latents(replace(probe, seed=77))
    assert text_to_image.pipe.scheduler is own
    assert torch.dist(near, latents) < 0.2 * torch.dist(far, latents)


def test_the_own_solver_is_the_same_to_the_bit(ldm: Pipeline) -> None:
    assert type(ldm.pipe.scheduler) is SOLVERS["ddim"]
    assert torch.equal(ldm.latents(replace(PROBE, solver="ddim")), ldm.latents(PROBE))


def test_a_probe_says_its_solver_only_where_it_has_one() -> None:
    assert "solver" not in PROBE.to_json(), "runs from before solvers go on"
    probe = replace(PROBE, solver="dpm++")
    assert Probe.from_json(probe.to_json()) == probe


def test_a_timestep_is_known_by_its_place_in_the_schedule() -> None:
    schedule = torch.arange(40)[3:33:3]
    assert [place_in(schedule, each) for each in schedule] == list(range(10))
    others = [torch.tensor(3), torch.arange(40)[4], schedule[:1], 3, torch.arange(40.0)[3]]
    assert [place_in(schedule, other) for other in others] == [None] * 5
    assert place_in(schedule, schedule[0].float()) is None
    assert place_in(None, schedule[0]) is None
    base = torch.arange(40)
    assert place_in(base[3:33:3], base[4]) is None, "between two"
    assert place_in(base[3:33:3], base[39]) is None, "after the last"


def test_what_does_not_go_together_is_told(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"solver 'dpm' is unknown.*dpm\+\+"):
        ldm.latents(replace(PROBE, solver="dpm"))
    monkeypatch.setattr(type(ldm.pipe.scheduler), "compatibles", [])
    with pytest.raises(PipelineError, match=r"solver dpm\+\+: does not go with DDIMScheduler"):
        ldm.latents(replace(PROBE, solver="dpm++"))


def test_agreement_is_one_with_itself_and_less_with_chance(ldm: Pipeline) -> None:
    probe = Probe(samples=3, num_inference_steps=3)
    run = score(ldm, probe, replacements=["identity"])
    assert rank_agreement(ldm, run, count=6, steps=3) == pytest.approx(1.0)
    turned = replace(run, scores=tuple(replace(entry, score=1 / (entry.score + 1e-9)) for entry in run.scores))
    assert rank_agreement(ldm, turned, count=6, steps=3) == pytest.approx(-1.0)
    assert rank_agreement(ldm, replace(run, scores=run.scores[:1]), count=6, steps=3) is None


def test_the_command_scores_by_a_solver_and_says_how_that_agrees(command: Command, ldm_folder: Path, tmp_path: Path) -> None:
    code, out, _ = command("score", str(ldm_folder), "--out", str(tmp_path / "run"), *PROBING, "--solver", "dpm++", "--json")
    assert code == 0
    assert -1.0 <= json.loads(out)["rank_agreement"] <= 1.0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["probe"]["solver"] == "dpm++"
