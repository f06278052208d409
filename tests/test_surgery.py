"""Surgery: a copy, in place, or for a while; attributes agree with weights, and what is left can be trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import PROBE
from ldpruner import Edit, Plan, discover, prune_, trial
from ldpruner.ldpruner_v1 import Identity, Pointwise, Shortcut, Zero
from ldpruner.operators.discovery import DeadCode
from ldpruner.operators.tracing import weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators
from ldpruner.surgery import prune, removed_operators

WANTED = {
    "down_blocks.1.attentions.0": "identity",
    "down_blocks.0.resnets.0.conv2": "zero",
    "down_blocks.1.resnets.0": "shortcut",
    "mid_block.resnets.0.conv1": "pointwise",
}


@pytest.fixture
def plan(ldm: Pipeline, operators: Operators) -> Plan:
    edits = [Edit(operator=n, replacement=r, options=operators[n].candidate(r).options) for n, r in WANTED.items()]
    complete = DeadCode(ldm.denoiser, ldm.call(PROBE), operators).completed(edits)
    return Plan(model=operators.model, denoiser=operators.denoiser, edits=complete)


FITTED = {"mid_block.resnets.0.conv1": (torch.full((16, 16), 0.1), torch.zeros(16))}


def test_prune_gives_a_copy_and_leaves_the_original_alone(ldm: Pipeline, plan: Plan) -> None:
    digest, before = weights_digest(ldm.denoiser), str(ldm.denoiser)
    pruned = prune(ldm.denoiser, plan, fitted=FITTED)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert weights_digest(ldm.denoiser) == digest
    assert str(ldm.denoiser) == before
    assert removed_operators(ldm.denoiser) == {}
    assert type(pruned) is type(ldm.denoiser)


def test_prune_in_place_changes_its_argument_and_gives_the_same_function(ldm: Pipeline, plan: Plan) -> None:
    call = ldm.call(PROBE)
    pruned = prune(ldm.denoiser, plan, fitted=FITTED)
    assert prune_(ldm.denoiser, plan, fitted=FITTED) is ldm.denoiser
    with torch.no_grad():
        assert torch.equal(call.run(pruned).sample, call.run(ldm.denoiser).sample)
    assert set(removed_operators(ldm.denoiser)) == {edit.operator for edit in plan.edits}


def test_a_stand_in_that_is_given_its_weights_draws_none(ldm: Pipeline, plan: Plan) -> None:
    before = torch.get_rng_state()
    pruned = prune(ldm.denoiser, plan, fitted=FITTED)
    assert torch.equal(torch.get_rng_state(), before)
    for name, weights in FITTED.items():
        held = pruned.get_submodule(name).map.parameters()
        assert all(torch.equal(*pair) for pair in zip(held, weights, strict=True))


def test_each_replacement_puts_its_stand_in_there(ldm: Pipeline, plan: Plan) -> None:
    pruned = prune(ldm.denoiser, plan, fitted=FITTED)
    kinds = {"identity": Identity, "zero": Zero, "shortcut": Shortcut, "pointwise": Pointwise}
    for edit in plan.edits:
        assert type(pruned.get_submodule(edit.operator)) is kinds[edit.replacement]


def test_the_dead_go_in_the_same_plan(ldm: Pipeline, plan: Plan) -> None:
    dead = {edit.operator for edit in plan.edits if edit.reason == "dead"}
    assert dead == {f"down_blocks.0.resnets.0.{name}" for name in ("norm1", "conv1", "norm2", "time_emb_proj")}


def test_operators_can_die_of_several_edits_together(ldm: Pipeline, operators: Operators) -> None:
    resnets = [o for o in operators.operators if o.kind == "ResnetBlock2D"]
    edits = [
        Edit(operator=o.name, replacement=c.replacement, options=c.options)
        for o in resnets
        for c in o.candidates
        if c.replacement in {"identity", "shortcut"}
    ]
    assert all(o.candidate(e.replacement).dead == () for o, e in zip(resnets, edits, strict=True)), "none dies of one edit alone"
    complete = DeadCode(ldm.denoiser, ldm.call(PROBE), operators).completed(edits)
    assert [edit.operator for edit in complete if edit.reason == "dead"] == ["time_embedding"]


def test_gradients_reach_every_parameter_that_is_left(ldm: Pipeline, plan: Plan) -> None:
    pruned = prune(ldm.denoiser, plan, fitted=FITTED).requires_grad_(True)
    ldm.call(PROBE).run(pruned).sample.square().sum().backward()
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("to_k.bias"), name  # softmax does not see a key bias


def test_attributes_agree_with_weights(ldm: Pipeline, plan: Plan) -> None:
    for name, module in prune(ldm.denoiser, plan, fitted=FITTED).named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels), name
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), name
        if isinstance(module, nn.GroupNorm):
            assert module.weight.shape == (module.num_channels,), name


def test_a_shortcut_keeps_the_weights_of_its_skip_path(ldm: Pipeline, plan: Plan) -> None:
    name = "down_blocks.1.resnets.0.conv_shortcut.weight"
    assert torch.equal(prune(ldm.denoiser, plan, fitted=FITTED).get_parameter(name), ldm.denoiser.get_parameter(name))


def test_a_trial_restores_the_very_modules_even_after_an_error(ldm: Pipeline, plan: Plan) -> None:
    modules = dict(ldm.denoiser.named_modules())

    def interrupted() -> None:
        with trial(ldm.denoiser, plan.edits, fitted=FITTED):
            assert type(ldm.denoiser.get_submodule("down_blocks.1.attentions.0")) is Identity
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert dict(ldm.denoiser.named_modules()) == modules


def test_a_second_round_adds_to_what_was_removed_before(ldm: Pipeline, plan: Plan) -> None:
    pruned = Pipeline(ldm.pipe, "once")
    once = prune(ldm.denoiser, plan, fitted=FITTED)
    with pruned.with_denoiser(once):
        again = discover(once, pruned.call(PROBE), timing_repeats=0)
    edit = Edit(operator="mid_block", replacement="identity", options=again["mid_block"].candidate("identity").options)
    twice = prune(once, Plan(model=again.model, denoiser=again.denoiser, edits=(edit,)))
    assert "mid_block" in removed_operators(twice)
    assert not [name for name in removed_operators(twice) if name.startswith("mid_block.")], "a block took its parts along"
    assert "down_blocks.1.attentions.0" in removed_operators(twice)


def test_a_plan_for_another_model_is_refused(ldm: Pipeline, text_to_image: Pipeline, plan: Plan) -> None:
    with pytest.raises(ValueError, match="this plan was made for another model: it fits the UNet2DModel"):
        prune(text_to_image.denoiser, plan, fitted=FITTED)


def test_an_edit_that_cannot_be_made_changes_nothing(ldm: Pipeline, plan: Plan) -> None:
    before = str(ldm.denoiser)
    unknown = Edit(operator="down_blocks.7", replacement="identity", options={})
    with (
        pytest.raises(LookupError, match=r"'down_blocks\.7' is no operator"),
        trial(ldm.denoiser, [*plan.edits, unknown], fitted=FITTED),
    ):
        pass
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1: a pointwise stand-in needs fitted weights"):
        prune_(ldm.denoiser, plan)
    part = Edit(operator="mid_block.resnets.0", replacement="identity", options={"returns": [[0, "x"]], "many": False})
    with (
        pytest.raises(ValueError, match="a block or its parts, never both"),
        trial(ldm.denoiser, [*plan.edits, part], fitted=FITTED),
    ):
        pass
    assert str(ldm.denoiser) == before
