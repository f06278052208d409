"""Budgets and selection: what goes first, what it saves, and what is said when a budget cannot be met."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import PROBE
from invented import chosen, operator, operators, scored
from ldpruner import Plan, planning, prune, save, score
from ldpruner.errors import RunError, UnknownNameError
from ldpruner.operators.tracing import count_macs
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Budget, Cost, Repairing
from ldpruner.recovery import closed_form
from ldpruner.recovery.activations import fitting_calls
from ldpruner.scoring import Run
from ldpruner.scoring.latent import latent_shift
from ldpruner.selection import choose, predict, selections_of
from ldpruner.surgery import prune as cut
from ldpruner.surgery import pruned_view

PLAIN = operators(operator("a", 10, "identity"), operator("b", 30, "identity"), operator("c", 20, "identity"))
SCORES = scored(("a", "identity", 1.0), ("b", "identity", 6.0), ("c", "identity", 3.0))


def test_order_takes_the_lowest_scores_until_the_budget_is_met() -> None:
    assert chosen(choose(PLAIN, SCORES, {"latency": 0.9})) == ["a"]
    assert chosen(choose(PLAIN, SCORES, {"latency": 0.75})) == ["a", "c"]
    assert choose(PLAIN, SCORES, {"latency": 0.7}).predicted == {"latency": 0.7, "macs": 0.7, "params": 0.7}


def test_ratio_takes_the_lowest_score_per_saving() -> None:
    assert chosen(choose(PLAIN, SCORES, {"latency": 0.9}, selection="ratio")) == ["a"]
    cheap = scored(("a", "identity", 1.0), ("b", "identity", 2.0), ("c", "identity", 3.0))
    assert chosen(choose(PLAIN, cheap, {"latency": 0.75}, selection="ratio")) == ["b"]
    assert chosen(choose(PLAIN, cheap, {"latency": 0.65}, selection="order")) == ["a", "b"]


def test_a_sweep_goes_by_every_order_and_every_objective() -> None:
    told = [replace(entry, output_error=1.0) for entry in SCORES]
    of_score = ("order", "exact", "exact-2", "exact-3")
    assert selections_of("sweep", SCORES) == selections_of("improved", SCORES) == of_score
    assert set(selections_of("sweep", told)) == {f"{prefix}{name}" for prefix in ("", "error-", "both-") for name in of_score}
    assert selections_of("ratio") == ("ratio",)
    with pytest.raises(UnknownNameError, match="selection 'sweap' is unknown: did you mean sweep"):
        selections_of("sweap")


def test_a_second_opinion_ranks_by_the_error_of_the_output_or_by_both() -> None:
    by_score = scored(("a", "identity", 1.0), ("b", "identity", 4.0), ("c", "identity", 9.0))
    told = tuple(replace(entry, output_error=error) for entry, error in zip(by_score, (4.0, 2.0, 0.01), strict=True))
    first = [chosen(choose(PLAIN, told, {"latency": 0.95}, selection=name)) for name in ("order", "error-order", "both-order")]
    assert first == [["a"], ["c"], ["c"]], "1, 4, 9; 4, 2, 0.01; and their geometric means 2, 2.8, 0.3"
    with pytest.raises(RunError, match="these scores hold no output error"):
        choose(PLAIN, by_score, {"latency": 0.9}, selection="both-ratio")


def test_what_the_last_option_made_needless_is_given_back() -> None:
    assert chosen(choose(PLAIN, SCORES, {"latency": 0.8})) == ["c"], "of a and c, c alone saves enough"
    assert chosen(choose(PLAIN, SCORES, {"latency": 0.6})) == ["a", "b"], "of all three c goes back, whose score is above a's"
    assert chosen(choose(PLAIN, SCORES, {"latency": 0.6, "params": 0.5})) == ["b", "c"], "and every target still holds"


def test_several_budgets_all_hold() -> None:
    left = choose(PLAIN, SCORES, {"latency": 0.9, "params": 0.7})
    assert left.predicted["params"] == pytest.approx(0.7)
    assert not left.exhausted


def test_a_block_replaces_its_parts_and_a_part_of_a_gone_block_is_passed_over() -> None:
    nested = operators(operator("block", 40, "identity"), operator("block.a", 10, "identity"), operator("block.b", 10, "identity"))
    parts_first = scored(("block", "identity", 3.0), ("block.a", "identity", 1.0), ("block.b", "identity", 2.0))
    assert chosen(choose(nested, parts_first, {"latency": 0.9})) == ["block.a"]
    assert chosen(choose(nested, parts_first, {"latency": 0.6})) == ["block"]
    block_first = scored(("block", "identity", 1.0), ("block.a", "identity", 2.0), ("block.b", "identity", 3.0))
    assert chosen(choose(nested, block_first, {"latency": 0.5})) == ["block"]


def test_a_cheaper_stand_in_gives_way_to_one_that_saves_more() -> None:
    both = operators(operator("a", 30, "pointwise", "identity", stand_in_ms=10))
    values = scored(("a", "pointwise", 1.0), ("a", "identity", 2.0))
    assert choose(both, values, {"latency": 0.8}).edits[0].replacement == "pointwise"
    assert choose(both, values, {"latency": 0.7}).edits[0].replacement == "identity"


def test_what_dies_is_counted_once_and_taken_away() -> None:
    feeding = operators(
        operator("norm", 10, "identity"), operator("conv", 20, "zero", dead=("norm",)), operator("other", 5, "identity")
    )
    values = scored(("norm", "identity", 0.5), ("conv", "zero", 1.0), ("other", "identity", 9.0))
    choice = choose(feeding, values, {"latency": 0.7})
    assert [(edit.operator, edit.reason) for edit in choice.edits] == [("norm", "dead"), ("conv", "chosen")]
    assert choice.predicted["latency"] == pytest.approx(0.7)
    conv = feeding["conv"].candidates[0]
    assert predict(feeding, {"conv": conv, "norm": feeding["norm"].candidates[0]}).latency_ms == 70


def test_of_equal_scores_the_one_that_saves_more_goes_first() -> None:
    values = scored(("a", "identity", 1.0), ("b", "identity", 1.0), ("c", "identity", 1.0))
    assert chosen(choose(PLAIN, values, {"latency": 0.95})) == ["b"]


def test_what_saves_nothing_of_the_budget_is_left_alone() -> None:
    free = operators(operator("free", 0, "identity"), operator("a", 10, "identity"))
    values = scored(("free", "identity", 0.0), ("a", "identity", 1.0))
    assert chosen(choose(free, values, {"latency": 0.95})) == ["a"]


@pytest.mark.parametrize(
    ("quantity", "limit", "message"),
    [
        ("latency", "abc", r"budget latency=abc: give a positive number, or a share such as latency=65%\."),
        ("latency", "-5", r"budget latency=-5: give a positive number"),
        ("latency", "1.2.3", r"budget latency=1\.2\.3: give a positive number"),
        ("macs", "120%", r"budget macs=120%: give a positive number"),
        ("speed", "50%", r"budget 'speed' is unknown: known: latency, macs, params"),
    ],
)
def test_a_malformed_budget_says_what_is_understood(quantity: str, limit: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.parse(quantity, limit)


def test_a_budget_is_a_share_or_a_number() -> None:
    total = Cost(params=1000, macs=1, latency_ms=50)
    assert Budget.parse("latency", "65%").share(total) == 0.65
    assert Budget.parse("latency", 25).share(total) == 0.5
    assert Budget.parse("params", "2e2").share(total) == 0.2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Run]:
    from conftest import ldm_operators, tiny_ldm

    pipeline = Pipeline(tiny_ldm(), source="tiny-ldm")
    return pipeline, score(pipeline, PROBE, operators=ldm_operators(), out=tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("selection", ["order", "ratio", "exact", "error-order", "both-exact-3"])
@pytest.mark.parametrize("budget", [{"macs": "70%"}, {"params": "60%"}, {"macs": "80%", "params": "70%"}])
def test_a_counted_budget_holds_exactly_on_the_pruned_model(
    run: tuple[Pipeline, Run], budget: dict[str, str], selection: str
) -> None:
    pipeline, scores = run
    plan = planning.plan(pipeline, scores, budget, selection=selection).plan
    pruned = cut(pipeline.denoiser, plan, fitted=scores.fitted)
    call = pipeline.call(PROBE)
    left = {
        "macs": count_macs(pruned, call) / count_macs(pipeline.denoiser, call),
        "params": sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in pipeline.denoiser.parameters()),
    }
    for quantity, limit in budget.items():
        assert left[quantity] <= float(limit.rstrip("%")) / 100
        assert left[quantity] <= plan.predicted[quantity] + 1e-9, "what dies jointly can only save more"


@pytest.mark.parametrize("repair", [pytest.param("none", marks=pytest.mark.exhaustive), "closed-form"])
def test_a_sweep_takes_the_plan_that_shifts_least_and_of_those_alike_the_shortest(
    run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch, repair: Repairing
) -> None:
    pipeline, scores = run
    budget = {"params": "60%"}
    plans = [
        planning.plan(pipeline, scores, budget, selection=name, repair=repair).plan
        for name in selections_of("sweep", scores.scores)
    ]
    monkeypatch.setattr(planning, "FINALISTS", len(plans))
    calls = fitting_calls(pipeline, scores.probe, count=planning.RANKED_ON)
    judged = replace(scores.probe, samples=planning.JUDGED_ON, seed=scores.probe.seed + planning.APART)
    reference = pipeline.latents(judged)
    shifts = []
    for plan in plans:
        fitted = scores.fitted
        if repair == "closed-form":
            fitted = closed_form.repair(pipeline, plan.edits, scores.probe, fitted=fitted, calls=calls)
        with pipeline.with_denoiser(pruned_view(pipeline.denoiser, plan.edits, fitted)):
            shifts.append(latent_shift(reference, pipeline.latents(judged)))
    assert max(shifts) > 1.05 * min(shifts), "else this test could not fail"
    taken = planning.plan(pipeline, scores, budget, selection="sweep", repair=repair).plan
    assert shifts[[plan.edits for plan in plans].index(taken.edits)] <= 1.05 * min(shifts)
    monkeypatch.setattr(planning, "ALIKE", 1e9)
    shortest = planning.plan(pipeline, scores, budget, selection="sweep", repair=repair).plan
    assert len(shortest.edits) == min(len(plan.edits) for plan in plans)


def test_a_sweep_measures_the_plans_that_shift_least_before_repair(
    run: tuple[Pipeline, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, scores = run
    monkeypatch.setattr(planning, "FINALISTS", 1)
    repaired = planning.plan(pipeline, scores, {"params": "60%"}, selection="sweep", repair="closed-form").plan
    monkeypatch.setattr(planning, "FINALISTS", len(selections_of("sweep", scores.scores)))
    monkeypatch.setattr(planning, "ALIKE", 1.0)
    bare = planning.plan(pipeline, scores, {"params": "60%"}, selection="sweep").plan
    assert [(edit.operator, edit.replacement) for edit in repaired.edits] == [(e.operator, e.replacement) for e in bare.edits]


def test_even_the_plan_that_leaves_least_runs(run: tuple[Pipeline, Run]) -> None:
    """Whole blocks die with it, of which the denoiser asks the parts; their place is held part by part."""
    pipeline, scores = run
    choice = choose(scores.operators, scores.scores, {"params": 0.0}, selection="exact")
    assert any(edit.reason == "dead" for edit in choice.edits)
    call = pipeline.call(PROBE)
    assert torch.isfinite(call.run(pruned_view(pipeline.denoiser, choice.edits, scores.fitted)).sample).all()


def test_a_budget_out_of_reach_says_what_can_be_reached(run: tuple[Pipeline, Run]) -> None:
    pipeline, scores = run
    with pytest.raises(ValueError, match=r"params 0.1% cannot be met: all \d+ removable operators together reach params \d+\.\d%"):
        planning.plan(pipeline, scores, {"params": "0.1%"})


def test_a_plan_is_a_few_kilobytes_and_survives_a_trip_through_json(run: tuple[Pipeline, Run], tmp_path: Path) -> None:
    pipeline, scores = run
    plan = planning.plan(pipeline, scores, {"macs": "60%"}).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert (tmp_path / "plan.json").stat().st_size < 20_000


def test_files_and_folders_may_be_named_as_text(ldm: Pipeline, tmp_path: Path) -> None:
    run_folder, file, out = (str(tmp_path / name) for name in ("run", "plan.json", "pruned"))
    run = score(ldm, PROBE, method="magnitude", replacements=["identity", "shortcut"], out=run_folder)
    assert Run.load(run_folder).scores == run.scores
    plan = planning.plan(ldm, run, {"params": "80%"}).plan
    plan.save(file)
    assert Plan.load(file) == plan
    save(ldm, cut(ldm.denoiser, plan), plan, out)
    assert Plan.from_pretrained(out) == plan


def test_the_whole_job_in_one_call_leaves_the_given_pipeline_as_it_was(ldm: Pipeline) -> None:
    before = ldm.latents(PROBE)
    pruned = prune(ldm.pipe, budget={"params": "60%"}, probe=PROBE, replacements=["shortcut", "identity"])
    assert pruned.summary()["params_ratio"] <= 0.6
    assert pruned.latent_shift > 0
    assert json.loads(json.dumps(pruned.record()))["params"]["pruned"] == sum(p.numel() for p in pruned.denoiser.parameters())
    assert torch.equal(ldm.latents(PROBE), before)
    assert type(pruned.pipe) is type(ldm.pipe)
    assert pruned.pipe.unet is pruned.denoiser
    assert ldm.pipe.unet is ldm.denoiser is not pruned.denoiser
    again = prune(ldm.pipe, plan=pruned.plan)
    with torch.no_grad():
        call = ldm.call(PROBE)
        assert torch.equal(call.run(again.denoiser).sample, call.run(pruned.denoiser).sample)


def test_a_plan_or_a_budget_not_both(ldm: Pipeline) -> None:
    with pytest.raises(ValueError, match="give either a budget or a plan"):
        prune(ldm)
    with pytest.raises(ValueError, match="a run folder goes with a budget; a plan needs no scores"):
        prune(ldm, plan="plan.json", run="run")


def test_scores_of_other_weights_are_not_planned_from(run: tuple[Pipeline, Run], ldm: Pipeline) -> None:
    with torch.no_grad():
        ldm.denoiser.conv_in.bias += 1
    with pytest.raises(ValueError, match="tiny-ldm: its weights are not those that were scored as tiny-ldm"):
        planning.plan(ldm, run[1], {"macs": "70%"})


def test_scores_that_are_not_there_yet_are_asked_for(run: tuple[Pipeline, Run]) -> None:
    pipeline, scores = run
    with pytest.raises(ValueError, match="this run holds no scores yet"):
        planning.plan(pipeline, replace(scores, scores=()), {"macs": "70%"})
