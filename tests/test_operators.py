"""Discovery: what can be replaced is found by tracing, with no list of layer names."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from conftest import PROBE, tiny_unet
from ldpruner import discover
from ldpruner.ldpruner_v1 import build, install
from ldpruner.operators import Call, discovery, meta_copy, timing
from ldpruner.operators.discovery import DeadCode
from ldpruner.operators.tracing import Trace, architecture, count_macs, trace, weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Operators, outermost, within
from ldpruner.replacements import REPLACEMENTS
from ldpruner.surgery import trial


class Branchy(nn.Module):
    """A residual branch behind a scale, a norm on queries that is no branch, a skip convolution, and a shared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.shared = nn.SiLU()
        self.query = nn.Linear(8, 8)
        self.query_norm = nn.LayerNorm(8)
        self.head = nn.Conv2d(8, 4, 3, padding=1)
        self.rest = nn.Dropout(0.1)

    def forward(self, latents: Tensor) -> Tensor:
        stream = self.shared(self.stem(latents))
        stream = stream + 0.5 * self.branch(self.shared(self.norm(stream)))
        tokens = stream.flatten(2).transpose(1, 2)
        scores = (self.query_norm(self.query(tokens)) @ tokens.transpose(1, 2)).softmax(-1)
        mixed = (scores @ tokens).transpose(1, 2).reshape(stream.shape)
        result: Tensor = self.head(self.rest(mixed))
        return result


def branchy() -> tuple[Branchy, Operators]:
    torch.manual_seed(0)
    model = Branchy().eval()
    return model, discover(model, Call((torch.randn(2, 4, 4, 4),), {}), timing_repeats=2)


def fitting(operators: Operators, name: str) -> set[str]:
    return {candidate.replacement for candidate in operators[name].candidates}


def test_what_fits_does_not_hang_on_the_precision_of_weights() -> None:
    model, operators = branchy()
    half = discover(model.half(), Call((torch.randn(2, 4, 4, 4).half(),), {}), timing_repeats=0)
    assert [fitting(half, o.name) for o in half.operators] == [fitting(operators, o.name) for o in operators.operators]


def test_a_branch_is_what_is_only_ever_added() -> None:
    _, operators = branchy()
    assert fitting(operators, "branch") == {"identity", "zero", "pointwise"}
    assert "zero" not in fitting(operators, "query_norm"), "it keeps its shape, but feeds a product"
    assert "zero" not in fitting(operators, "head"), "it is the output itself"


def test_what_runs_twice_or_does_nothing_is_no_operator() -> None:
    _, operators = branchy()
    names = {operator.name for operator in operators.operators}
    assert "shared" not in names
    assert "rest" not in names


def test_what_fed_only_a_removed_operator_dies_with_it() -> None:
    _, operators = branchy()
    assert operators["branch"].candidate("zero").dead == ("norm",)
    assert operators["branch"].candidate("identity").dead == ()


def test_costs_are_those_of_one_sample_counted_by_hand() -> None:
    model, operators = branchy()
    assert operators["branch"].cost.macs == 8 * 8 * 9 * 16
    assert operators["branch"].cost.params == 8 * 8 * 9 + 8
    assert operators["branch"].candidate("pointwise").cost.macs == 8 * 8 * 16
    attention = 2 * 16 * 16 * 8
    assert operators.total.macs == 4 * 8 * 9 * 16 + 8 * 8 * 9 * 16 + 8 * 8 * 16 + attention + 8 * 4 * 9 * 16
    assert operators.total.params == sum(p.numel() for p in model.parameters())


def test_times_are_measured_and_add_up_to_no_more_than_the_whole() -> None:
    _, operators = branchy()
    parts = [operator.cost.latency_ms for operator in operators.operators]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= operators.total.latency_ms * 1.001


def test_attention_counts_although_the_cpu_counter_misses_it() -> None:
    class Attends(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert count_macs(Attends(), Call((torch.zeros(1, 2, 16, 8),), {})) == 2 * (2 * 16 * 16 * 8)


def unet() -> tuple[nn.Module, Call]:
    return tiny_unet(size=8, channels=4), Call((torch.randn(2, 4, 8, 8), torch.tensor(7)), {})


def conditional_unet() -> tuple[nn.Module, Call]:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=2,
        layers_per_block=1,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model, Call(
        (torch.randn(2, 4, 8, 8), torch.tensor(7)), {"encoder_hidden_states": torch.randn(2, 5, 12), "return_dict": False}
    )


def transformer() -> tuple[nn.Module, Call]:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    )
    return model, Call((torch.randn(2, 4, 8, 8),), {"timestep": torch.tensor([7, 7]), "class_labels": torch.tensor([1, 2])})


@functools.cache
def discovered(family: Callable[[], tuple[nn.Module, Call]]) -> tuple[nn.Module, Call, Operators]:
    torch.manual_seed(0)
    model, call = family()
    return model.eval(), call, discover(model, call, timing_repeats=0)


@pytest.mark.parametrize("family", [unet, conditional_unet, transformer])
def test_every_replacement_runs_in_every_family_and_is_undone(family: Callable[[], tuple[nn.Module, Call]]) -> None:
    model, call, operators = discovered(family)
    pairs = operators.pairs()
    assert len(pairs) >= 40
    assert {"identity", "zero", "pointwise"} <= {candidate.replacement for _, candidate in pairs}
    digest = weights_digest(model)
    with torch.no_grad():
        before = call.run(model)[0]
        for operator, candidate in pairs:
            edit = Edit(operator=operator.name, replacement=candidate.replacement, options=candidate.options)
            channels_in, channels_out = candidate.options.get("channels", (1, 1))
            fitted = {operator.name: (torch.zeros(channels_out, channels_in), torch.zeros(channels_out))}
            with trial(model, [edit], fitted=fitted):
                after = call.run(model)[0]
            assert after.shape == before.shape
            assert torch.isfinite(after).all(), (operator.name, candidate.replacement)
        assert torch.equal(call.run(model)[0], before)
    assert weights_digest(model) == digest


def unreached_parameters(skeleton: nn.Module, call: Call) -> set[str]:
    """Parameters whose change cannot change the output, found another way than by the trace: they get no gradient."""
    skeleton.requires_grad_(True)
    skeleton.zero_grad(set_to_none=True)
    call.run(skeleton)[0].sum().backward()
    return {name for name, parameter in skeleton.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("family", [unet, conditional_unet])
def test_the_dead_that_are_named_are_those_that_get_no_gradient(family: Callable[[], tuple[nn.Module, Call]]) -> None:
    model, call, operators = discovered(family)
    skeleton, dry = meta_copy(model), call.to("meta")
    checked = 0
    for operator, candidate in operators.pairs(["zero", "shortcut"])[::7]:
        with trial(skeleton, [Edit(operator=operator.name, replacement=candidate.replacement, options=candidate.options)]):
            unreached = unreached_parameters(skeleton, dry)
        named = {name for name in unreached for dead in candidate.dead if name.startswith(f"{dead}.")}
        assert named == unreached, operator.name
        checked += len(candidate.dead)
    assert checked > 3


def chosen_at_random(operators: Operators, seed: int) -> list[Edit]:
    draw = random.Random(seed)
    pairs, edits = operators.pairs(), list[Edit]()
    for operator, candidate in draw.sample(pairs, draw.choice([2, 10, 40])):
        if not any(within(operator.name, e.operator) or within(e.operator, operator.name) for e in edits):
            edits.append(Edit(operator=operator.name, replacement=candidate.replacement, options=candidate.options))
    return edits


def reaching_the_output(traced: Trace) -> set[str]:
    reaching = traced.dataflow.reaching()
    return {name for name, entry in traced.modules.items() if reaching.intersection(entry.operations)}


@pytest.mark.parametrize("family", [unet, conditional_unet])
def test_what_dies_of_many_edits_is_what_a_trace_of_the_pruned_denoiser_no_longer_needs(
    family: Callable[[], tuple[nn.Module, Call]],
) -> None:
    model, call, operators = discovered(family)
    dead_code, found = DeadCode(model, call, operators), 0
    before = reaching_the_output(trace(meta_copy(model), call.to("meta")))
    for seed in range(8):
        edits = chosen_at_random(operators, seed)
        complete = {edit.operator for edit in dead_code.completed(edits)}
        skeleton = meta_copy(model)
        install(skeleton, {edit.operator: {"replacement": edit.replacement, "options": dict(edit.options)} for edit in edits})
        after = trace(skeleton.to("meta"), call.to("meta"))
        left = (before & after.modules.keys()) - reaching_the_output(after)
        left = {n for n in left if operators_that_can_die(operators, n) and not any(within(n, e.operator) for e in edits)}
        assert complete == set(outermost([*left, *(edit.operator for edit in edits)])), seed
        found += len(left)
    assert found > 8


def operators_that_can_die(operators: Operators, name: str) -> bool:
    return any(operator.name == name and operator.if_dead for operator in operators.operators)


@pytest.mark.parametrize("family", [unet, transformer])
def test_what_fits_is_told_alike_with_numbers_and_with_shapes_only(
    family: Callable[[], tuple[nn.Module, Call]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, call, operators = discovered(family)
    digest = weights_digest(model)
    monkeypatch.setattr(discovery, "CHEAP", 0)
    assert discover(model, call, timing_repeats=0) == operators
    assert weights_digest(model) == digest


def test_stand_ins_that_are_tried_on_shapes_never_hold_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call, _ = discovered(unet)
    without = list[bool]()

    def noting(*given: Any) -> nn.Module:
        made = build(*given)
        without.extend(parameter.is_meta for parameter in made.parameters())
        return made

    monkeypatch.setattr(discovery, "CHEAP", 0)
    monkeypatch.setattr(discovery, "build", noting)
    discover(model, call, timing_repeats=0)
    assert without
    assert all(without)


def test_what_is_found_does_not_depend_on_the_mode_that_the_caller_is_in() -> None:
    model, call, operators = discovered(unet)
    with torch.inference_mode():
        assert discover(model, call, timing_repeats=0) == operators


def test_a_zeroed_attention_output_takes_its_projections_along() -> None:
    operators = discovered(conditional_unet)[2]
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    dead = operators[f"{block}.attn1.to_out.0"].candidate("zero").dead
    assert {f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v")} | {f"{block}.norm1"} == set(dead)


def test_a_block_that_changes_channels_can_keep_its_shortcut() -> None:
    operators = discovered(unet)[2]
    shortcut = operators["down_blocks.1.resnets.0"].candidate("shortcut")
    assert shortcut.options["child"] == "conv_shortcut"
    assert shortcut.cost.params == 8 * 16 + 16


def test_a_block_and_its_parts_know_each_other() -> None:
    operators = discovered(unet)[2]
    assert operators["down_blocks.0.resnets.0.conv1"].parent == "down_blocks.0.resnets.0"
    assert operators["mid_block.attentions.0.to_q"].parent == "mid_block.attentions.0"
    assert operators["mid_block.attentions.0"].parent == "mid_block"
    assert operators["mid_block"].parent is None


def test_tracing_needs_no_memory_for_weights(ldm: Pipeline) -> None:
    skeleton = meta_copy(ldm.denoiser)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert architecture(skeleton) == architecture(ldm.denoiser)
    assert set(trace(skeleton, ldm.call(PROBE).to("meta")).modules) > {"conv_in", "mid_block"}


def test_operators_survive_a_trip_through_json(ldm: Pipeline) -> None:
    operators = discover(ldm.denoiser, ldm.call(PROBE), timing_repeats=1)
    assert Operators.from_json(operators.to_json()) == operators


def test_an_unknown_operator_raises_with_the_nearest_names() -> None:
    _, operators = branchy()
    with pytest.raises(LookupError, match=r"'brunch' is no operator of this Branchy: did you mean branch\?"):
        operators["brunch"]
    with pytest.raises(LookupError, match="stem: 'identity' does not fit this Conv2d; what fits: pointwise"):
        operators["stem"].candidate("identity")


def test_an_unknown_replacement_raises_with_the_nearest_names() -> None:
    with pytest.raises(LookupError, match=r"replacement 'identiy' is unknown: did you mean identity\?"):
        REPLACEMENTS["identiy"]


def test_a_module_that_is_called_three_times_is_timed_for_all_three(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.thrice, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.thrice(self.thrice(self.thrice(self.once(inputs))))

    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))  # a module that calls none takes one tick
    _, alone = timing.time_alone(Thrice(), Call((torch.zeros(1, 2),), {}), repeats=3)
    assert alone == {"": 5000, "once": 1000, "thrice": 3000}


def test_what_a_long_run_frees_is_given_back_and_a_short_one_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = list[float]()
    monkeypatch.setattr(timing, "give_back", lambda: given_back.append(timing.LARGE_S))
    timing.seconds(lambda: None, torch.device("cpu"))
    assert not given_back
    monkeypatch.setattr(timing, "LARGE_S", 0.0)
    timing.seconds(lambda: None, torch.device("cpu"))
    assert given_back == [0.0]
