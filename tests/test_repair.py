"""Repair in closed form: stand-ins fitted front to back, on what the pruned model gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import PROBE, Command
from ldpruner import Edit, Plan, apply, prune
from ldpruner.artifacts.dense import densify
from ldpruner.fitting import Moments, fit_pointwise, pointwise_wanted
from ldpruner.ldpruner_v1 import STAND_INS, StandIn
from ldpruner.operators.discovery import discover
from ldpruner.operators.tracing import Call, weights_digest
from ldpruner.operators.watching import tensors_in
from ldpruner.pipelines import Pipeline, load
from ldpruner.plans import Operators, corrected
from ldpruner.probes import Probe
from ldpruner.recovery import activations, closed_form
from ldpruner.recovery.activations import fitting_calls, in_calling_order, outputs, reach
from ldpruner.recovery.closed_form import ChannelSums, Errors, fitted_in_order, repair
from ldpruner.surgery import correction_of, kept_of, pruned_view, removed_operators, set_fitted
from ldpruner.trajectories import record_call, record_calls

WANTED = {
    "down_blocks.0.resnets.0.conv2": "zero",
    "down_blocks.1.resnets.0": "shortcut",
    "down_blocks.1.attentions.0": "identity",
    "mid_block.resnets.0.conv1": "pointwise",
}


@pytest.fixture
def edits(operators: Operators) -> tuple[Edit, ...]:
    plain = [Edit(operator=n, replacement=r, options=operators[n].candidate(r).options) for n, r in WANTED.items()]
    return corrected(plain, operators)


def test_a_correction_is_the_least_squares_scale_and_shift_of_every_channel() -> None:
    given = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    wanted = given * torch.tensor([2.0, -1.0, 0.5]) + torch.tensor([1.0, 0.0, -3.0])
    sums = ChannelSums()
    sums.add(given[:20], wanted[:20])
    sums.add(given[20:], wanted[20:])
    scale, shift = sums.solve(0.0)
    assert torch.allclose(scale, torch.tensor([2.0, -1.0, 0.5]), atol=1e-5)
    assert torch.allclose(shift, torch.tensor([1.0, 0.0, -3.0]), atol=1e-5)
    drawn, _ = sums.solve(1e9)
    assert torch.allclose(drawn, torch.ones(3), atol=1e-5), "a heavy ridge draws scales towards 1"


def test_a_constant_takes_the_mean_of_what_is_wanted() -> None:
    sums = ChannelSums()
    sums.add(torch.zeros(4, 2), torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 2.0], [3.0, 2.0]]))
    assert torch.equal(sums.solve(1e-3)[1], torch.tensor([2.0, 2.0]))


def test_a_map_is_drawn_towards_its_prior_where_nothing_is_known() -> None:
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0]])  # the second channel is never seen
    moments = Moments.empty([2, 1])
    moments.add(rows, rows[:, :1] * 4)
    weight, bias = moments.solve(1e-6, torch.tensor([[0.0, 7.0]]))
    assert torch.allclose(weight, torch.tensor([[4.0, 7.0]]), atol=1e-4)
    assert torch.allclose(bias, torch.zeros(1), atol=1e-4)


def test_what_guidance_makes_of_both_halves_is_fitted_beside_what_each_is_given() -> None:
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(40, 3, generator=draw)
    wanted = torch.tanh(given @ torch.randn(3, 2, generator=draw)) + 0.5  # no map fits all of it
    moments, sums, errors = Moments.empty([3, 2]), ChannelSums(), Errors(ridge=0.0, guidance_scale=5.0)
    errors.add(moments, given, wanted)
    errors.add(sums, given[:, :2], wanted)
    weight, bias = moments.solve(0.0)
    ones = torch.cat([given, torch.ones(40, 1)], dim=1)
    rows, targets = (torch.cat([each, (5 * each[20:] - 4 * each[:20]) / 41**0.5]) for each in (ones, wanted))
    expected = torch.linalg.lstsq(rows, targets).solution
    assert torch.allclose(torch.cat([weight.T, bias[None]]), expected, atol=1e-4)
    scale, shift = sums.solve(0.0)
    for channel in range(2):
        alone = torch.linalg.lstsq(rows[:, [channel, 3]], targets[:, channel : channel + 1]).solution.flatten()
        assert torch.allclose(torch.stack([scale[channel], shift[channel]]), alone, atol=1e-4)


def test_the_same_positions_of_both_halves_are_taken() -> None:
    some = Errors(ridge=0.0, guidance_scale=2.0).some(100, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(some[:50], some[50:])
    assert 10 < some.sum() < 90
    assert Errors(ridge=0.0, guidance_scale=2.0).some(7, 0.5, torch.Generator()).shape == (7,), "what is odd has no halves"
    Errors(ridge=0.0, guidance_scale=2.0).add(Moments.empty([2, 1]), torch.ones(7, 2), torch.ones(7, 1))
    assert Errors(ridge=0.0).some(7, 0.5, torch.Generator().manual_seed(0)).shape == (7,)


def test_a_call_says_whether_it_is_guided_and_repair_heeds_it(text_to_image: Pipeline, ldm: Pipeline) -> None:
    probe = replace(PROBE, guidance_scale=4.0)
    calls = fitting_calls(text_to_image, probe, count=1)
    assert [calls[0].guided, text_to_image.guidance_scale(probe)] == [True, 4.0]
    assert not text_to_image.call(replace(PROBE, guidance_scale=1.0)).guided
    assert [ldm.call(replace(PROBE, samples=4)).guided, ldm.guidance_scale(PROBE)] == [False, 1.0]
    operators, name = discover(text_to_image.denoiser, calls[0]), "mid_block.resnets.0"
    plain = Edit(operator=name, replacement="identity", options=operators[name].candidate("identity").options)
    edits = corrected([plain], operators)
    made = [repair(text_to_image, edits, replace(PROBE, guidance_scale=g), fitted={}, calls=calls) for g in (1.0, 4.0)]
    assert made[0].keys() == made[1].keys()
    assert any(not torch.equal(one, other) for name in made[0] for one, other in zip(made[0][name], made[1][name], strict=True))


def test_edits_get_room_for_a_correction_of_their_channels(edits: tuple[Edit, ...]) -> None:
    room = {edit.operator: edit.options.get("correction") for edit in edits}
    assert list(room.values()) == [8, 16, 16, None]


def test_a_neutral_correction_changes_nothing(ldm: Pipeline, edits: tuple[Edit, ...]) -> None:
    fitted = fit_pointwise(ldm, pointwise_wanted(edits), PROBE)
    call = ldm.call(PROBE)
    plain = [Edit(operator=e.operator, replacement=e.replacement, options=without(e)) for e in edits]
    with torch.no_grad():
        expected = call.run(pruned_view(ldm.denoiser, plain, fitted)).sample
        assert torch.equal(call.run(pruned_view(ldm.denoiser, edits, fitted)).sample, expected)


def without(edit: Edit) -> dict[str, object]:
    return {key: value for key, value in edit.options.items() if key != "correction"}


def test_what_is_kept_of_the_original_at_once_changes_nothing(
    ldm: Pipeline, edits: tuple[Edit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit_pointwise(ldm, pointwise_wanted(edits), PROBE)
    together = repair(ldm, edits, PROBE, fitted=fitted)
    asked: list[list[str]] = []

    def watched(model: nn.Module, names: list[str], calls: list[Call]) -> dict[str, list[torch.Tensor]]:
        made = outputs(model, names, calls)
        asked.append(list(made))
        return made

    monkeypatch.setattr(activations, "KEPT_BYTES", 1)
    monkeypatch.setattr(closed_form, "outputs", watched)
    apart = repair(ldm, edits, PROBE, fitted=fitted)
    assert {len(names) for names in asked} == {1}
    assert len(asked) >= len(together) > len(WANTED)
    assert apart.keys() == together.keys()
    for name, pair in together.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, apart[name], strict=True)), name


@torch.no_grad()
def test_every_map_ends_closer_to_its_operator_on_what_it_is_given(ldm: Pipeline, edits: tuple[Edit, ...]) -> None:
    fitted = fit_pointwise(ldm, pointwise_wanted(edits), PROBE)
    digest = weights_digest(ldm.denoiser)
    weights = repair(ldm, edits, PROBE, fitted=fitted, ridge=0.0)
    assert weights_digest(ldm.denoiser) == digest, "the original is left alone"
    calls = fitting_calls(ldm, PROBE)
    student = pruned_view(ldm.denoiser, edits, weights)
    order = fitted_in_order(student, edits, calls[0])
    assert order[0] == next(iter(WANTED)), "nothing before the first stand-in is fitted"
    keys = {name: key for name in order for key in (name, correction_of(name), kept_of(name)) if key in weights}
    assert set(keys.values()) == set(weights)
    assert "conv_out" in keys
    for number, name in enumerate(keys):
        earlier = {key: weights[key] for key in list(keys.values())[:number]}
        alone = pruned_view(ldm.denoiser, edits, fitted | earlier)  # repaired up to here, and not here
        assert error(student, ldm, name, calls) < error(alone, ldm, name, calls), name


@torch.no_grad()
def test_maps_with_more_inputs_than_positions_take_a_scale_and_a_shift(
    ldm: Pipeline, edits: tuple[Edit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit_pointwise(ldm, pointwise_wanted(edits), PROBE)
    monkeypatch.setattr(closed_form, "INPUTS", 1)
    weights = repair(ldm, edits, PROBE, fitted=fitted)
    before: torch.nn.Module = ldm.denoiser.get_submodule("conv_out")
    scales = (weights[kept_of("conv_out")][0] / before.weight).flatten(1)  # type: ignore[operator]
    assert torch.allclose(scales, scales[:, :1].expand_as(scales), atol=1e-4)
    assert not torch.allclose(scales, torch.ones(()), atol=1e-4)


def test_the_calls_that_maps_are_fitted_on_share_no_sample(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CALLS", 6)
    monkeypatch.setattr(activations, "STEPS", range(5, 9))
    calls = fitting_calls(ldm, PROBE)
    assert [call.batch for call in calls] == [activations.SAMPLES] * 6
    smaller = fitting_calls(ldm, PROBE, batch_size=8)
    assert [call.batch for call in smaller] == [8] * 18
    assert len({float(call.args[1]) for call in calls}) > 2, "and are spread over the timesteps"
    first = [call.args[0][0, 0, 0, 0].item() for call in calls + record_calls(ldm, PROBE)[:1]]
    assert len(set(first)) == len(first)


def test_no_prompt_is_fitted_twice_while_there_are_others(text_to_image: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen prompts, the probe's own, were learnt by heart: predictions for all others got worse."""
    asked: list[str] = []

    def taken(_pipeline: Pipeline, probe: Probe, _number: int) -> Call:
        asked.extend(probe.prompts[: probe.samples])
        return text_to_image.call(PROBE)

    monkeypatch.setattr(activations, "CALLS", 6)
    monkeypatch.setattr(activations, "record_call", taken)
    fitting_calls(text_to_image, replace(PROBE, prompts=("mine", "mine too")))
    assert asked[:2] == ["mine", "mine too"]
    assert len(asked) == len(set(asked)) == 6 * activations.SAMPLES


@torch.no_grad()
def test_the_dense_form_of_a_repaired_model_holds_all_that_was_fitted(ldm: Pipeline, edits: tuple[Edit, ...]) -> None:
    branches = tuple(edit for edit in edits if edit.replacement in ("zero", "shortcut"))
    whole = prune(ldm, {"macs": "95%"}, probe=PROBE, method="magnitude", repair="closed-form").plan
    pruned = apply(ldm, replace(whole, edits=branches))
    assert {key.rpartition(":")[2] for key in pruned.fitted} == {"correction", "kept"}
    call = ldm.call(PROBE)
    expected = call.run(pruned.denoiser).sample
    made = call.run(densify(ldm.denoiser, pruned.plan, call, fitted=pruned.fitted)).sample
    assert torch.allclose(made, expected, atol=1e-4)
    without = call.run(densify(ldm.denoiser, pruned.plan, call)).sample
    assert not torch.allclose(without, expected, atol=1e-4), "without them it is another model"


@torch.no_grad()
def test_what_depends_on_the_timestep_alone_is_left_as_it_is(ldm: Pipeline, operators: Operators) -> None:
    wanted = {"time_embedding": "pointwise", "down_blocks.1.attentions.0": "identity"}
    edits = [
        Edit(operator=name, replacement=kind, options=operators[name].candidate(kind).options) for name, kind in wanted.items()
    ]
    fitted = fit_pointwise(ldm, pointwise_wanted(edits), PROBE)
    weights = repair(ldm, edits, PROBE, fitted=fitted)
    assert weights["time_embedding"] is fitted["time_embedding"]
    assert not any("time_emb_proj" in name for name in weights)
    assert kept_of("down_blocks.0.resnets.0.conv2") in weights, "it is given another embedding now"


def test_a_call_is_recorded_alone_and_ends_its_generation(ldm: Pipeline) -> None:
    every = record_calls(ldm, PROBE)
    for number in (0, len(every) - 1, len(every) + 5):
        alone, wanted = record_call(ldm, PROBE, number), every[min(number, len(every) - 1)]
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(alone.args, wanted.args, strict=True))


def error(student: torch.nn.Module, original: Pipeline, name: str, calls: list[object]) -> float:
    pairs: list[tuple[Tensor, Tensor]] = [
        (reach(student, name, call)[2], reach(original.denoiser, name, call)[2])
        for call in calls  # type: ignore[arg-type]
    ]
    return sum(float((made - wanted).square().sum()) for made, wanted in pairs)


def test_stand_ins_are_fitted_in_the_order_in_which_they_run(ldm: Pipeline) -> None:
    assert in_calling_order(ldm.denoiser, list(reversed(WANTED)), ldm.call(PROBE)) == list(WANTED)


@torch.no_grad()
def test_a_replay_reaches_what_the_whole_model_would_and_runs_it_seldom(ldm: Pipeline) -> None:
    calls = [ldm.call(PROBE), ldm.call(replace(PROBE, seed=7))]
    maps = [name for name, module in ldm.denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names, replay, runs = in_calling_order(ldm.denoiser, maps, calls[0]), activations.Replay(ldm.denoiser, calls), []
    whole = [[reach(ldm.denoiser, name, call) for call in calls] for name in names]
    handle = ldm.denoiser.register_forward_pre_hook(lambda *_: runs.append(1))
    for name, wanted in zip(names, whole, strict=True):
        for (args, _, output), (other, _, expected) in zip(replay.reach(name), wanted, strict=True):
            assert torch.equal(args[0], other[0])
            assert torch.equal(output, expected)
    handle.remove()
    top = {name.split(".")[0] for name in names}
    assert len(runs) < len(calls) * (3 * len(top)) < len(calls) * len(names), "not once a map"


@torch.no_grad()
def test_a_replay_without_room_runs_the_whole_model(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "KEPT_BYTES", 1)
    call, name = ldm.call(PROBE), "down_blocks.1.resnets.0.conv1"
    replay = activations.Replay(ldm.denoiser, [call])
    assert torch.equal(next(replay.reach(name))[2], reach(ldm.denoiser, name, call)[2])
    assert list(replay._given) == [""]


def test_a_corrected_shortcut_does_not_touch_the_child_that_it_shares(ldm: Pipeline, edits: tuple[Edit, ...]) -> None:
    call, name = ldm.call(PROBE), "down_blocks.1.resnets.0"
    fitted = fit_pointwise(ldm, pointwise_wanted(edits), PROBE)
    student, before = pruned_view(ldm.denoiser, edits, fitted), weights_digest(ldm.denoiser)
    with torch.no_grad():
        plain = reach(student, name, call)[2]
        child: Any = student.get_submodule(f"{name}.{edits[1].options['child']}")
        set_fitted(cast("StandIn", student.get_submodule(name)), 2 * child.weight, 2 * child.bias + 0.5)
        assert torch.allclose(reach(student, name, call)[2], plain * 2 + 0.5, atol=1e-5)
    assert weights_digest(ldm.denoiser) == before


@pytest.mark.parametrize("make", [pytest.param("ldm", marks=pytest.mark.exhaustive), "text_to_image", "audio"])
def test_a_repaired_pipeline_says_both_shifts_and_loads_bit_for_bit(
    make: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipeline: Pipeline = request.getfixturevalue(make)
    pruned = prune(pipeline, budget={"macs": "95%"}, probe=PROBE, method="magnitude", repair="closed-form")
    assert pruned.latent_shift_before_repair is not None
    assert pruned.latent_shift_before_repair > 0
    assert pruned.latent_shift != pruned.latent_shift_before_repair
    assert pruned.plan.repair == "closed-form"
    assert Plan.from_json(pruned.plan.to_json()) == pruned.plan
    pruned.save_pretrained(tmp_path / "repaired")
    loaded = load(tmp_path / "repaired")
    kept = {type(loaded.denoiser.get_submodule(name)).__name__ for name in removed_operators(loaded.denoiser)}
    assert kept, "what was removed is named in the config"
    assert kept <= {kind.__name__ for kind in STAND_INS.values()}
    call = pipeline.call(PROBE)
    with torch.no_grad():
        expected = tensors_in(call.run(pruned.denoiser))[0]
        assert_same_model(loaded.denoiser, pruned.denoiser)
        assert torch.allclose(tensors_in(call.run(loaded.denoiser))[0], expected, atol=1e-5)
        assert torch.allclose(tensors_in(call.run(apply(pipeline, pruned.plan).denoiser))[0], expected, atol=1e-5)


def assert_same_model(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """Every weight is equal, bit for bit. Outputs may differ in the last bit: kernels round by how weights lie in memory."""
    weights, others = first.state_dict(), second.state_dict()
    assert list(weights) == list(others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.exhaustive
def test_a_corrected_model_loads_in_plain_diffusers_of_a_new_process(ldm: Pipeline, tmp_path: Path) -> None:
    kinds = ["identity", "zero", "shortcut"]
    pruned = prune(ldm, budget={"macs": "95%"}, probe=PROBE, method="magnitude", repair="closed-form", replacements=kinds)
    assert any("correction" in edit.options for edit in pruned.plan.edits)
    pruned.save_pretrained(tmp_path / "model")
    call = ldm.call(PROBE)
    with torch.no_grad():
        save_file(
            {"given": call.args[0], "time": torch.as_tensor(call.args[1]), "made": call.run(pruned.denoiser).sample},
            tmp_path / "call.safetensors",
        )
    code = (
        "import sys, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "from safetensors.torch import load_file\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "kept = load_file(sys.argv[2])\n"
        "with torch.no_grad():\n    made = pipe.unet(kept['given'], kept['time']).sample\n"
        "assert torch.allclose(made, kept['made'], atol=1e-5)\n"
        "assert 'ldpruner' not in sys.modules\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "call.safetensors")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line_prunes_with_priors_and_repair(command: Command, ldm_folder: Path, tmp_path: Path) -> None:
    few = ["--samples", "2", "--steps", "2", "--method", "magnitude", "--budget", "macs=90%"]
    asked = ["--repair", "closed_form", "--selection", "order", "--apart", "1", "--out", tmp_path / "out"]
    code, out, err = command("prune", ldm_folder, *few, *asked)
    assert code == 0, err
    assert "before repair)" in out
    record = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    assert record["latent_shift_before_repair"] > 0
    plan = Plan.load(tmp_path / "out" / "pruning_plan.json")
    assert (plan.repair, plan.selection) == ("closed-form", "magnitude/order/apart=1")
    code, _, err = command("prune", ldm_folder, *few, "--out", tmp_path / "other", "--stage-cap", "2")
    assert (code, err) == (2, "ldpruner: priors: protect_ends and apart are 0 or more, stage_cap is above 0 and at most 1.\n")
