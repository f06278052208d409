"""The fast way: what it measures, what it believes of the rest, how sure it is, and what it keeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from conftest import PROBE
from ldpruner import Edit, Probe, score
from ldpruner.errors import PipelineError, RunError
from ldpruner.memory import ran_out, samples_at_once, within_memory
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators
from ldpruner.scoring import SCORERS, Asked, engine, fast
from ldpruner.scoring.beliefs import LEAST, UNKNOWN, Belief, Step, beliefs
from ldpruner.scoring.fast import FastScorer, gap
from ldpruner.scoring.latent import BROKEN, PaperScorer, latent_shift, tamed
from ldpruner.scoring.teacher_forced import answers, mean_squared_error
from ldpruner.selection import choose
from ldpruner.surgery import trial
from ldpruner.trajectories import counted, spread_calls

WIDE = Probe(samples=4, num_inference_steps=2)
MACS = ({"macs": 0.8},)


def asked(pipeline: Pipeline, known: Operators, **changed: object) -> Asked:
    edits = [Edit(operator=o.name, replacement=c.replacement, options=c.options) for o, c in known.pairs(["identity", "zero"])]
    return replace(Asked(pipeline=pipeline, edits=edits, probe=WIDE, operators=known, targets=MACS), **changed)  # type: ignore[arg-type]


def test_a_step_between_rungs_is_read_from_what_was_measured_on_both() -> None:
    x = np.linspace(-3, 3, 40)
    step = Step.of([(each, 0.5 + 1.2 * each) for each in x])
    assert (step.intercept, step.slope) == pytest.approx((0.5, 1.2), abs=0.03)
    assert step.spread < 0.05
    few = Step.of([(0.0, 1.0), (1.0, 2.5)])
    assert few.spread == UNKNOWN, "two say nothing of their spread"
    assert 1.0 < few.slope < 1.5, "and little of the slope"
    assert Step.of([(0.0, 1.0), (0.001, -3.0), (0.002, -4.0)]).slope == LEAST, "alike by one kind: their order is chance"
    assert Step.of([]) == Step(intercept=0.0, slope=1.0, spread=UNKNOWN)


def test_a_cheap_value_is_carried_to_the_scale_of_the_dear_one_with_its_doubt() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 50)
    low = {("o", str(place)): math.exp(place / 10) for place in range(60)}
    high = {key: 3 * low[key] * math.exp(noise[place]) for place, key in enumerate(list(low)[:50])}
    found = beliefs([low, high])
    measured, carried = found["o", "0"], found["o", "59"]
    assert (measured.rung, carried.rung) == (1, 0)
    assert measured.mean == pytest.approx(math.log(high["o", "0"]))
    assert carried.mean == pytest.approx(5.9 + math.log(3), abs=0.1)
    assert carried.doubt == pytest.approx(0.1, abs=0.03)


def test_few_samples_are_weighed_against_what_the_kind_before_says() -> None:
    """Values by samples whose noise is known, above a proxy that misses the truth by as much: the mean of both is best."""
    draw, place = np.random.default_rng(1), np.arange(400.0)
    truth = place / 100
    proxy = truth + draw.normal(0, 0.2, 400)
    parts = truth + draw.normal(0, 0.2 * math.sqrt(2), (2, 400))  # two halves of the samples: together a noise of 0.2
    kinds = [proxy, parts[0], parts.mean(0)]
    rungs = [{("o", str(number)): math.exp(value) for number, value in enumerate(kind)} for kind in kinds]
    found = beliefs(rungs, sampled=2)
    means, doubts = (np.array([getattr(found["o", str(number)], name) for number in range(400)]) for name in ("mean", "doubt"))
    off = np.std(means - truth)
    assert off < 0.85 * np.std(kinds[-1] - truth)
    assert doubts == pytest.approx(off, rel=0.25)
    fewer = beliefs([rungs[0], rungs[1], dict(list(rungs[2].items())[:200])], sampled=2)
    assert fewer["o", "300"].rung == 1
    assert found["o", "300"].doubt < fewer["o", "300"].doubt < 0.2, "half of the samples leave more doubt, and less than none"
    alone = beliefs([rungs[0], dict(list(rungs[1].items())[:200])], sampled=1)
    assert alone["o", "3"].mean == pytest.approx(parts[0][3]), "of one rung of samples nothing says how far it is off"


def test_a_gap_is_counted_in_doubts() -> None:
    assert gap(Belief(mean=1.0, doubt=0.5, rung=0), 3.0) == pytest.approx(4.0)


def test_with_all_that_it_may_spend_every_edit_that_matters_gets_the_papers_score(ldm: Pipeline, operators: Operators) -> None:
    """With doubts of everything none is clear, and all reach the last rung: the paper's formula, no sample moved far."""
    question = asked(ldm, operators)
    scorer = FastScorer(few=2, allowance=math.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "CLEAR", 1e9)
        entries = {entry.key: entry for entry in scorer.scores(question)}
    on_top = [entry for entry in entries.values() if entry.judged == "latents of 4"]
    assert len(on_top) > len(entries) / 2
    sums = [entry.mean_shift + entry.std_shift for entry in on_top if entry.mean_shift is not None and entry.std_shift is not None]
    assert spearmanr(sums, [entry.score for entry in on_top])[0] > 0.9, "the score weighs that against the error of the output"
    reference = ldm.latents(WIDE)
    for entry in on_top[::7]:
        options = operators[entry.operator].candidate(entry.replacement).options
        with trial(ldm.denoiser, [Edit(operator=entry.operator, replacement=entry.replacement, options=options)]):
            truth = latent_shift(reference, tamed(reference, ldm.latents(WIDE)))
        assert entry.mean_shift is not None
        assert entry.std_shift is not None
        assert entry.mean_shift + entry.std_shift == pytest.approx(truth, rel=1e-3)


def test_with_nothing_to_spend_all_are_screened_and_told_so(ldm: Pipeline, operators: Operators) -> None:
    entries = list(FastScorer(allowance=0.0).scores(asked(ldm, operators)))
    assert {entry.judged for entry in entries} == {"screen"}
    assert all(entry.doubt and entry.doubt > 0.8 * UNKNOWN for entry in entries)


@pytest.mark.parametrize(("few", "allowance"), [(2, 8.0), (2, 13.7), (3, 0.0), (2, math.inf)])
def test_no_more_is_spent_than_is_said(ldm: Pipeline, operators: Operators, few: int, allowance: float) -> None:
    question, scorer = asked(ldm, operators), FastScorer(few=few, allowance=allowance)
    with counted(ldm.denoiser) as passes:
        list(scorer.scores(question))
    if allowance < math.inf:
        assert scorer.fixed(WIDE) <= passes.count <= scorer.cost(len(question.edits), WIDE)
    if not allowance:
        assert passes.count == scorer.fixed(WIDE)


def test_what_the_papers_way_costs_is_counted(ldm: Pipeline, operators: Operators) -> None:
    question = asked(ldm, operators)
    with counted(ldm.denoiser) as passes:
        list(PaperScorer().scores(question))
    assert passes.count == PaperScorer().cost(len(question.edits), WIDE)


def test_what_is_near_a_cut_is_measured_and_what_is_far_is_not(ldm: Pipeline, operators: Operators) -> None:
    entries = list(FastScorer(few=2, allowance=16.0).scores(asked(ldm, operators)))
    by = {judged: [entry for entry in entries if entry.judged == judged] for judged in {entry.judged for entry in entries}}
    assert len(by) > 1
    better = [entry for entry in entries if entry.judged != "screen"]
    assert len(better) < len(entries)


def test_nothing_is_taken_on_the_screens_word(ldm: Pipeline, operators: Operators) -> None:
    entries = {entry.key: entry for entry in FastScorer(few=2, allowance=16.0).scores(asked(ldm, operators))}
    taken = choose(operators, list(entries.values()), MACS[0]).edits
    judged = {entries[edit.operator, edit.replacement].judged for edit in taken if edit.reason == "chosen"}
    assert judged
    assert "screen" not in judged


def test_the_error_of_the_output_is_measured_or_told_from_the_screen(ldm: Pipeline, operators: Operators) -> None:
    question = asked(ldm, operators)
    scorer = FastScorer(few=2, allowance=16.0)
    entries = list(scorer.scores(question))
    steps = scorer.calls(question, copies=1)
    calls = [call for _, call in steps]
    whole = spread_calls(ldm, WIDE, scorer.timesteps)
    assert [step for step, _ in steps] == [0, 1]
    assert torch.equal(calls[0].args[0], whole[0].args[0][0::2]), "each of the four samples once, at one of the two steps"
    assert torch.equal(calls[1].args[0], whole[1].args[0][1::2])
    singly = scorer.calls(replace(question, batch_size=1), copies=1)
    assert [step for step, _ in singly] == [0, 1, 0, 1], "also where a call holds one"
    assert torch.allclose(torch.cat([call.args[0] for _, call in singly[::2]]), calls[0].args[0], atol=1e-5)
    entry = next(entry for entry in entries if entry.judged == "output")
    options = operators[entry.operator].candidate(entry.replacement).options
    known = answers(ldm.denoiser, calls)
    with trial(ldm.denoiser, [Edit(operator=entry.operator, replacement=entry.replacement, options=options)]) as changed:
        truth = mean_squared_error(known, answers(changed, calls)) ** 0.5
    assert entry.output_error == pytest.approx(truth, rel=1e-5)
    assert all(each.output_error is not None for each in entries)


def test_two_samples_are_enough(ldm: Pipeline, operators: Operators) -> None:
    few = replace(WIDE, samples=2)
    entries = list(FastScorer(allowance=math.inf).scores(asked(ldm, operators, probe=few)))
    assert {entry.judged for entry in entries} <= {"screen", "output", "latents of 2"}
    assert all(0 <= entry.score < BROKEN for entry in entries)


def test_what_edits_save_has_to_be_told(ldm: Pipeline, operators: Operators) -> None:
    with pytest.raises(RunError, match="the fast way needs to know what operators cost"):
        list(FastScorer().scores(asked(ldm, operators, operators=None)))


def test_a_run_that_stopped_goes_on_from_its_ledger(
    ldm: Pipeline, operators: Operators, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastScorer, "few", 2)
    monkeypatch.setattr(engine, "sharing_pays", lambda *_: False)  # which edits share a call decides last bits on some processors
    whole = score(ldm, WIDE, method="fast", operators=operators, replacements=["identity", "zero"], out=tmp_path / "whole")
    lines = (tmp_path / "whole" / "measured-0.jsonl").read_text().splitlines()
    assert len(lines) > 10
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "measured-0.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])
    (stopped / "measured-1.jsonl").write_text(lines[8] + "\n")
    again = score(ldm, WIDE, method="fast", operators=operators, replacements=["identity", "zero"], out=stopped)
    assert [replace(entry, seconds=0.0) for entry in again.scores] == [replace(entry, seconds=0.0) for entry in whole.scores]
    kept = [json.loads(line) for file in sorted(stopped.glob("measured-*")) for line in file.read_text().splitlines()]
    assert len(kept) == len(lines), "nothing was measured twice"


def test_scores_for_another_budget_are_judged_anew_from_what_was_measured(
    ldm: Pipeline, operators: Operators, tmp_path: Path
) -> None:
    settings = {"method": "fast", "operators": operators, "replacements": ["identity"], "out": tmp_path / "run"}
    first = score(ldm, WIDE, budget={"macs": "90%"}, **settings)  # type: ignore[arg-type]
    second = score(ldm, WIDE, budget={"macs": "55%"}, **settings)  # type: ignore[arg-type]
    assert [entry.key for entry in first.scores] == [entry.key for entry in second.scores]
    assert len((tmp_path / "run" / "scores.jsonl").read_text().splitlines()) == len(second.scores)
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["targets"] == [{"macs": "macs=55%"}]


def test_a_damaged_ledger_is_one_line(ldm: Pipeline, operators: Operators, tmp_path: Path) -> None:
    (tmp_path / "measured-0.jsonl").write_text('{"kind": "output"}\n')
    with pytest.raises(RunError, match=r"measured-0.jsonl: cannot be read \(KeyError"):
        score(ldm, PROBE, method="fast", operators=operators, out=tmp_path)


def test_half_as_many_samples_are_tried_when_memory_runs_out() -> None:
    tried = []

    def run(size: int) -> int:
        tried.append(size)
        if size > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return size

    assert within_memory(run, 20) == 3
    assert tried == [20, 10, 5, 3]
    with pytest.raises(RuntimeError, match="out of memory"):
        within_memory(lambda _: run(9), 1)
    with pytest.raises(RuntimeError, match="another reason"):
        within_memory(lambda _: (_ for _ in ()).throw(RuntimeError("another reason")), 8)


def test_a_pipeline_that_ran_out_of_memory_is_known_by_its_cause(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = type(ldm.denoiser).forward

    def forward(self: object, sample: object, *args: object, **kwargs: object) -> object:
        if len(sample) > 2:  # type: ignore[arg-type]
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
        return whole(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(ldm.denoiser), "forward", forward)
    with pytest.raises(PipelineError) as refused:
        ldm.latents(WIDE)
    assert ran_out(refused.value)
    assert samples_at_once(ldm, WIDE) == 2


def test_the_budgets_of_a_run_make_no_difference_to_the_papers_scores(ldm: Pipeline, operators: Operators, tmp_path: Path) -> None:
    settings = {"method": "paper", "operators": operators, "replacements": ["shortcut"], "out": tmp_path / "run"}
    score(ldm, PROBE, budget={"macs": "90%"}, **settings)  # type: ignore[arg-type]
    written = (tmp_path / "run" / "scores.jsonl").read_text()
    score(ldm, PROBE, budget={"macs": "50%"}, **settings)  # type: ignore[arg-type]
    assert (tmp_path / "run" / "scores.jsonl").read_text() == written
    assert not SCORERS["paper"]().budgeted


def test_errors_are_of_what_guidance_makes_of_the_halves(text_to_image: Pipeline) -> None:
    probe = replace(WIDE, prompts=("a", "b"), guidance_scale=3.0)
    call = spread_calls(text_to_image, probe, 1)[0]
    assert call.guided
    (whole,), (made,) = (answers(text_to_image.denoiser, [call], guidance_scale=scale) for scale in (None, 3.0))
    without, prompted = whole.chunk(2)
    assert torch.allclose(made, without + 3 * (prompted - without))
    alone = spread_calls(text_to_image, replace(probe, guidance_scale=1.0), 1)[0]
    (plain,), (same,) = (answers(text_to_image.denoiser, [alone], guidance_scale=scale) for scale in (None, 3.0))
    assert torch.equal(plain, same), "what has no halves stays"


def test_a_run_goes_on_by_the_method_that_it_began_with(ldm: Pipeline, operators: Operators, tmp_path: Path) -> None:
    settings = {"operators": operators, "replacements": ["shortcut"]}
    begun = score(ldm, PROBE, method="random", out=tmp_path / "run", **settings)  # type: ignore[arg-type]
    again = score(ldm, PROBE, out=tmp_path / "run", **settings)  # type: ignore[arg-type]
    assert (again.method, again.scores) == ("random", begun.scores)
    assert score(ldm, PROBE, out=tmp_path / "new", **settings).method == "paper"  # type: ignore[arg-type]
