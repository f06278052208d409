"""Scoring: the paper's formula on shared noise, exact where nothing changes, resumable where it is interrupted."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import PROBE
from ldpruner import Edit, Probe, scoring
from ldpruner.fitting import fit_pointwise, trajectories
from ldpruner.ldpruner_v1 import resample
from ldpruner.operators import discover
from ldpruner.pipelines import Pipeline, load
from ldpruner.plans import Operators
from ldpruner.remembering import encoding_once
from ldpruner.scoring import SCORERS, Asked, Run
from ldpruner.scoring.latent import BROKEN, Statistics, latent_shift, shifts
from ldpruner.scoring.output_mse import OutputErrorScorer

CHEAP = ["identity", "shortcut"]
score = functools.partial(scoring.score, method="paper")


def test_the_score_is_the_formula_of_the_paper() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(5, 4, 3, 3)), generator.normal(1, 2, size=(5, 4, 3, 3))
    by_hand = np.sqrt(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.sqrt(((a.std(0, ddof=1) - b.std(0, ddof=1)) ** 2).sum())
    assert latent_shift(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(by_hand, rel=1e-12)


def test_a_score_is_the_formula_on_the_latents_of_both_models(ldm: Pipeline, operators: Operators) -> None:
    run = score(ldm, PROBE, operators=operators, replacements=["shortcut"])
    original = ldm.latents(PROBE).numpy()
    entry = run.scores[0]
    block = ldm.denoiser.get_submodule(entry.operator)
    block.forward = lambda hidden, *_: block.conv_shortcut(hidden)  # what a shortcut is, said without our code
    changed = ldm.latents(PROBE).numpy()
    mean = np.linalg.norm(original.mean(0) - changed.mean(0))
    std = np.linalg.norm(original.std(0, ddof=1) - changed.std(0, ddof=1))
    assert entry.score == pytest.approx(mean + std, rel=1e-5)
    assert entry.mean_shift == pytest.approx(mean, rel=1e-5)


def test_changing_nothing_scores_exactly_zero(ldm: Pipeline) -> None:
    assert latent_shift(ldm.latents(PROBE), ldm.latents(PROBE)) == 0.0
    options = {"returns": [[0, "x"]], "many": False}
    edit = Edit(operator="mid_block.resnets.0.dropout", replacement="identity", options=options)
    nothing = SCORERS["paper"]().scores(Asked(pipeline=ldm, edits=[edit], probe=PROBE))
    assert next(iter(nothing)).score == 0.0


def test_a_rerun_is_equal_to_the_bit_and_order_does_not_matter(ldm: Pipeline, operators: Operators) -> None:
    first = {entry.key: entry.score for entry in score(ldm, PROBE, operators=operators, replacements=CHEAP).scores}
    turned = replace(operators, operators=operators.operators[::-1])
    second = {entry.key: entry.score for entry in score(ldm, PROBE, operators=turned, replacements=CHEAP).scores}
    assert first == second
    assert len(first) > 20
    assert len(set(first.values())) > 15


def test_batch_size_does_not_matter(ldm: Pipeline, operators: Operators) -> None:
    whole = score(ldm, PROBE, operators=operators, replacements=["shortcut"]).scores
    split = score(ldm, PROBE, operators=operators, replacements=["shortcut"], batch_size=2).scores
    assert [entry.score for entry in whole] == pytest.approx([entry.score for entry in split], rel=1e-5)


def test_every_replacement_that_fits_is_scored(ldm: Pipeline, operators: Operators) -> None:
    run = score(ldm, PROBE, operators=operators)
    assert {entry.key for entry in run.scores} == {(o.name, c.replacement) for o, c in operators.pairs()}
    assert {"identity", "zero", "shortcut", "pointwise"} == {entry.replacement for entry in run.scores}
    assert all(np.isfinite(entry.score) for entry in run.scores)


def test_latents_that_blow_up_score_worst_and_stay_a_number() -> None:
    fine, broken = torch.zeros(3, 4), torch.full((3, 4), torch.nan)
    assert shifts(Statistics.of(fine), Statistics.of(broken)) == (BROKEN, BROKEN)


def test_an_interrupted_run_goes_on_where_it_stopped(ldm: Pipeline, operators: Operators, tmp_path: Path) -> None:
    def stop_after_five(scores, done, total):
        for count, entry in enumerate(scores):
            yield entry
            if count == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(ldm, PROBE, operators=operators, replacements=CHEAP, out=tmp_path / "run", progress=stop_after_five)
    lines = (tmp_path / "run" / "scores.jsonl").read_bytes()
    kept = lines.splitlines()[:5]
    (tmp_path / "run" / "scores.jsonl").write_bytes(b"\n".join(kept) + b'\n{"operator": "mid_bl')  # killed while writing

    seen: list[tuple[int, int]] = []

    def watch(scores, done, total):
        seen.append((done, total))
        return scores

    resumed = score(ldm, PROBE, operators=operators, replacements=CHEAP, out=tmp_path / "run", progress=watch)
    assert seen == [(5, len(resumed.scores))]
    assert (tmp_path / "run" / "scores.jsonl").read_bytes().splitlines()[:5] == kept
    unbroken = score(ldm, PROBE, operators=operators, replacements=CHEAP)
    assert {e.key: e.score for e in resumed.scores} == {e.key: e.score for e in unbroken.scores}


def test_a_run_folder_can_be_read_back(ldm: Pipeline, operators: Operators, tmp_path: Path) -> None:
    run = score(ldm, PROBE, operators=operators, replacements=["shortcut", "pointwise"], out=tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    assert loaded.scores == run.scores
    assert loaded.operators == operators
    assert loaded.probe == PROBE
    assert all(torch.equal(loaded.fitted[name][0], weight) for name, (weight, _) in run.fitted.items())


def test_scores_of_another_probe_are_not_mixed_in(ldm: Pipeline, operators: Operators, tmp_path: Path) -> None:
    score(ldm, PROBE, operators=operators, replacements=["shortcut"], out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: holds scores of another probe\. Name another folder\."):
        score(ldm, replace(PROBE, seed=1), operators=operators, replacements=["shortcut"], out=tmp_path / "run")
    with torch.no_grad():
        ldm.denoiser.conv_in.bias += 1
    with pytest.raises(ValueError, match=r"run: holds scores of another weights\."):
        score(ldm, PROBE, operators=operators, replacements=["shortcut"], out=tmp_path / "run")


def test_one_sample_has_no_standard_deviation(ldm: Pipeline) -> None:
    with pytest.raises(ValueError, match="samples=1: a standard deviation over samples needs 2 or more"):
        score(ldm, Probe(samples=1))


def test_the_denoiser_is_restored_after_scoring(ldm: Pipeline, operators: Operators) -> None:
    modules = dict(ldm.denoiser.named_modules())
    score(ldm, PROBE, operators=operators, replacements=["shortcut"])
    assert dict(ldm.denoiser.named_modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())


def test_a_pointwise_stand_in_is_the_least_squares_map(ldm: Pipeline, operators: Operators) -> None:
    name = "mid_block.resnets.0"
    options = operators[name].candidate("pointwise").options
    given: list[torch.Tensor] = []
    made: list[torch.Tensor] = []

    def watch(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        given.append(args[0])
        made.append(output)

    hook = ldm.denoiser.get_submodule(name).register_forward_hook(watch)
    for trajectory in trajectories(PROBE, PROBE.samples):
        ldm.latents(trajectory)
    hook.remove()
    rows = [torch.cat(tensors).movedim(1, -1).reshape(-1, 16).double().numpy() for tensors in (given, made)]
    with_ones = np.concatenate([rows[0], np.ones((len(rows[0]), 1))], axis=1)
    expected, *_ = np.linalg.lstsq(with_ones, rows[1], rcond=None)
    weight, bias = fit_pointwise(ldm, {name: options}, PROBE, ridge=0.0)[name]
    assert np.allclose(weight.numpy(), expected[:-1].T, atol=1e-4)
    assert np.allclose(bias.numpy(), expected[-1], atol=1e-4)


@pytest.mark.usefixtures("usual_calls")
def test_stand_ins_are_fitted_on_other_noise_and_timesteps_than_they_are_scored_on(ldm: Pipeline) -> None:
    def timesteps(steps: int) -> set[int]:
        ldm.pipe.scheduler.set_timesteps(steps)
        return set(ldm.pipe.scheduler.timesteps.tolist())

    fitted_on = list(trajectories(replace(PROBE, samples=4, prompts=("a", "b", "c")), 4))
    noises = [each.seed + sample for each in fitted_on for sample in range(each.samples)]
    assert sorted(set(noises)) == noises
    assert noises[0] == PROBE.seed + 4
    seen = set().union(*(timesteps(each.num_inference_steps) for each in fitted_on))
    assert len(seen) >= 45
    assert all(len(timesteps(steps) - seen) >= 0.8 * steps for steps in (6, 10, 20, 25, 50))
    assert [each.prompts[0] for each in fitted_on] == ["a", "b", "c", "a"]


@pytest.mark.slow
def test_a_linear_time_embedding_is_told_from_the_real_one() -> None:
    """Fitted at the probe's own timesteps it scored 0.0001 here, and moved the latents of 20 steps by 4.5."""
    pipeline = load("zoo:fashion")
    candidate = discover(pipeline.denoiser, pipeline.call(Probe()), timing_repeats=0)["time_embedding"].candidate("pointwise")
    edit = Edit(operator="time_embedding", replacement="pointwise", options=candidate.options)
    few = Probe(samples=4, num_inference_steps=6)
    fitted = fit_pointwise(pipeline, {edit.operator: edit.options}, few)
    told, truth = (
        next(iter(SCORERS["paper"]().scores(Asked(pipeline=pipeline, edits=[edit], probe=probe, fitted=fitted)))).score
        for probe in (few, replace(few, num_inference_steps=20))
    )
    assert told == pytest.approx(truth, rel=0.75)
    assert told > 0.05


def test_a_pointwise_stand_in_resamples_where_the_grid_changes() -> None:
    latents = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(resample(latents, [[1, 2], [1, 2]])[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert resample(latents, [[2, 1], [2, 1]]).shape == (1, 1, 8, 8)


def test_the_error_of_the_output_is_measured_beside(ldm: Pipeline, operators: Operators) -> None:
    edits = [Edit(operator=o.name, replacement=c.replacement, options=c.options) for o, c in operators.pairs(["identity"])][:4]
    probe = replace(PROBE, samples=6)
    asked = Asked(pipeline=ldm, edits=edits, probe=probe)
    errors = OutputErrorScorer(timesteps=4).scores(replace(asked, probe=replace(probe, samples=3)))
    beside = [entry.output_error for entry in SCORERS["paper"]().scores(asked)]
    assert beside == pytest.approx([entry.score**0.5 for entry in errors], rel=1e-5)


def test_prompts_are_encoded_once_for_all_candidates(text_to_image: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = text_to_image.pipe.text_encoder
    asked, whole = list[int](), type(encoder).forward

    def forward(self: nn.Module, input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        asked.append(len(input_ids))
        return whole(self, input_ids, *args, **kwargs)

    probe = replace(PROBE, prompts=("a", "b"))
    alone = latent_shift(text_to_image.latents(probe), text_to_image.latents(replace(probe, prompts=("b", "c"))))
    monkeypatch.setattr(type(encoder), "forward", forward)
    with encoding_once(text_to_image):
        before = text_to_image.latents(probe)
        first = len(asked)
        again = text_to_image.latents(probe)
        assert len(asked) == first, "nothing new was asked"
        assert torch.equal(before, again)
        assert latent_shift(before, text_to_image.latents(replace(probe, prompts=("b", "c")))) == pytest.approx(alone)
        assert len(asked) > first, "other prompts are"
    assert "forward" not in vars(encoder)


def test_text_prompts_reach_the_denoiser_in_turn(text_to_image: Pipeline) -> None:
    both = text_to_image.latents(replace(PROBE, prompts=("a", "b")))
    only_a = text_to_image.latents(replace(PROBE, prompts=("a",)))
    assert torch.equal(both[0], only_a[0])
    assert not torch.equal(both[1], only_a[1])
