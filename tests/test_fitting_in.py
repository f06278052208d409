"""What is not offered, and how: what a denoiser's own code does with an operator decides what can stand in for it."""

from __future__ import annotations

import random
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from ldpruner import Edit, discover
from ldpruner.errors import PipelineError
from ldpruner.ldpruner_v1 import build
from ldpruner.operators import Call, discovery
from ldpruner.operators.dataflow import Dataflow, Uses
from ldpruner.operators.discovery import DeadCode
from ldpruner.operators.repeating import repeating
from ldpruner.operators.watching import Traced, Watch, reads_noted
from ldpruner.plans import Operators
from ldpruner.surgery import trial


def found_in(module: nn.Module, *inputs: Tensor) -> Operators:
    torch.manual_seed(0)
    return discover(module.eval(), Call(inputs, {}), timing_repeats=0)


def ways(operators: Operators, name: str) -> set[str]:
    """The replacements of an operator; none where it is no operator."""
    return {candidate.replacement for operator in operators.operators if operator.name == name for candidate in operator.candidates}


class Outer(nn.Module):
    """Two maps, of which each test's denoiser does something of its own with the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)


class WritesInPlace(Outer):
    def forward(self, latents: Tensor) -> Tensor:
        made = self.first(latents)
        made[:, :1] = made[:, :1].cos()
        result: Tensor = self.last(made) + latents
        return result


def test_nothing_that_is_its_input_stands_in_for_what_is_written_in_place_later() -> None:
    operators = found_in(WritesInPlace(), torch.randn(2, 4, 8))
    assert ways(operators, "first") == set()
    assert "identity" in ways(operators, "last")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.SiLU())

    def forward(self, latents: Tensor) -> Tensor:
        result: Tensor = latents + self.inner(latents)
        return result


class LooksInto(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.looked, self.left = Block(), Block()

    def forward(self, latents: Tensor) -> Tensor:
        scale = len(self.looked.inner[0].weight) ** -0.5
        result: Tensor = self.left(self.looked(latents) * scale)
        return result


def test_what_code_further_out_reads_parts_of_stays() -> None:
    operators = found_in(LooksInto(), torch.randn(2, 4, 8))
    assert ways(operators, "looked.inner") == set()
    assert ways(operators, "looked") == {"shortcut"}, "which keeps what is looked at"
    assert ways(operators, "left.inner") >= {"identity", "zero"}


class AsksForADtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))

    def forward(self, latents: Tensor) -> Tensor:
        result: Tensor = latents + self.embed(latents.to(next(self.embed.parameters()).dtype))
        return result


def test_a_module_that_is_asked_for_a_parameter_keeps_one() -> None:
    model = AsksForADtype()
    operators = found_in(model, torch.randn(2, 4, 8))
    assert ways(operators, "embed.0") == set()
    assert "identity" in ways(operators, "embed.2")
    everything = [
        Edit(operator=o.name, replacement=c.replacement, options=c.options) for o, c in operators.pairs() if "." in o.name
    ]
    with trial(model, [edit for edit in everything if edit.replacement == "identity"]):
        model(torch.randn(2, 4, 8))


class Modulates(Outer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, latents: Tensor, time: Tensor) -> Tensor:
        result: Tensor = self.norm(self.last(latents)) * (1 + self.first(time)) + self.first.bias
        return result


def test_no_edit_is_offered_after_which_the_output_knows_nothing_of_the_latents() -> None:
    operators = found_in(Modulates(), torch.randn(2, 4, 8), torch.randn(2, 1, 8))
    assert "zero" not in ways(operators, "norm"), "it is only scaled and added to, and so a branch, but all that there is of them"
    assert "identity" in ways(operators, "norm")


class TokensOnAGrid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.wave = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        rows = latents + self.map(latents)
        result: Tensor = self.wave(rows.flatten(1, 2).mT)
        return result


def test_a_pointwise_map_mixes_channels_where_the_operator_has_them() -> None:
    model = TokensOnAGrid()
    operators = found_in(model, torch.randn(2, 3, 5, 8))
    grid, wave = operators["map"], operators["wave"].candidate("pointwise")
    assert grid.axis == -1
    assert wave.options["axis"] == 1
    assert wave.options["channels"] == [8, 8]
    assert build("pointwise", dict(wave.options), model.wave)(torch.randn(2, 8, 21)).shape == (2, 8, 21), "whatever the length"


class LooksAtNumbers(Outer):
    def forward(self, latents: Tensor, mask: Tensor) -> Tensor:
        kept = latents[:, : int(mask.sum().item())]
        result: Tensor = kept + self.last(self.first(kept))
        return result


def test_a_denoiser_whose_code_looks_at_numbers_is_traced_with_them() -> None:
    operators = found_in(LooksAtNumbers(), torch.randn(2, 4, 8), torch.tensor([1, 1, 0, 0]))
    assert operators["first"].output_shape == (2, 2, 8)
    assert operators.total.macs == 2 * (2 * 8 * 8), "as many as there are tokens left, of one sample"


class NeverUses(Outer):
    def forward(self, latents: Tensor) -> Tensor:
        self.first(latents)
        result: Tensor = latents + self.last(latents)
        return result


def test_what_the_original_never_uses_is_given_no_weights() -> None:
    assert "pointwise" not in ways(found_in(NeverUses(), torch.randn(2, 4, 8)), "first")


class Chain(Outer):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        result: Tensor = latents + self.end(self.middle(latents))
        return result


def test_a_stand_in_that_nothing_reads_any_more_goes_too() -> None:
    model, call = Chain().eval(), Call((torch.randn(2, 8, 4, 4),), {})
    operators = discover(model, call, timing_repeats=0)
    edits = [
        Edit(operator=name, replacement=way, options=operators[name].candidate(way).options)
        for name, way in (("middle", "pointwise"), ("end", "zero"))
    ]
    assert [(edit.operator, edit.replacement, edit.reason) for edit in DeadCode(model, call, operators).completed(edits)] == [
        ("middle", "zero", "dead"),
        ("end", "zero", "chosen"),
    ]


class Refuses(Outer):
    def forward(self, latents: Tensor) -> Tensor:
        raise RuntimeError("expected another dtype")


def test_a_call_that_cannot_be_made_at_all_is_told_in_one_line() -> None:
    with pytest.raises(PipelineError, match=r"^Refuses: its call cannot be traced \(expected another dtype\)\.$"):
        found_in(Refuses(), torch.randn(2, 4, 8))


def test_a_denoiser_without_weights_stays_as_it_was() -> None:
    with torch.device("meta"):
        model = Outer()
    model.forward = lambda latents: latents + model.last(model.first(latents))  # type: ignore[method-assign]
    discover(model, Call((torch.randn(2, 4, 8),), {}), timing_repeats=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = Block(), Block()

    def forward(self, latents: Tensor) -> Tensor:
        result: Tensor = self.last(self.embedding(latents))
        return result


def test_what_a_pipeline_reads_of_a_denoiser_stays() -> None:
    model, latents = Embeds().eval(), torch.randn(2, 4, 8)
    assert ways(found_in(model, latents), "embedding.inner")
    with reads_noted(model) as read:
        assert model.embedding.inner[0].in_features == 8, "as Stable Diffusion XL asks its denoiser"
    kept = {"embedding", "embedding.inner", "embedding.inner.0", "embedding.inner.1"}
    assert read == kept, "which one of a list is read is not seen"
    operators = discover(model, Call((latents,), {}, frozenset(read)), timing_repeats=0)
    assert {operator.name for operator in operators.operators} == set(dict(model.named_modules())) - kept - {""}
    with reads_noted(model) as read:
        assert nn.Sequential(Block())[0].inner is not None, "another model's"
    assert model.last is not None
    assert not read, "nor once it has ended"


def test_what_is_read_is_kept_to_the_end_as_another_would_get_its_id() -> None:
    watch, constant = Watch(nn.Identity()), torch.ones(2)
    kept = weakref.ref(constant)
    with watch:
        _ = torch.zeros(2) + constant
    del constant
    assert kept() is not None
    del watch
    assert kept() is None


class LooksAtLayout(Outer):
    """Its last map is given what lies in memory as the first map's input does, where that is what stands in for it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = Viewing()

    def forward(self, latents: Tensor) -> Tensor:
        result: Tensor = latents + self.last(self.first(latents.transpose(1, 2)).transpose(1, 2))
        return result


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, made: Tensor) -> Tensor:
        result: Tensor = self.inner(made.transpose(1, 2).view(len(made), 64)).view(made.shape)
        return result


def test_shapes_tell_what_numbers_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    with_numbers = found_in(LooksAtLayout(), torch.randn(2, 8, 8))
    monkeypatch.setattr(discovery, "CHEAP", 0.0)
    assert found_in(LooksAtLayout(), torch.randn(2, 8, 8)) == with_numbers
    assert "identity" not in ways(with_numbers, "first"), "it would give what cannot be viewed so"
    assert with_numbers["first"].if_dead is not None
    assert "identity" in ways(with_numbers, "last")


def test_a_module_repeats_what_it_gave_to_what_lies_in_memory_the_same_way() -> None:
    layer, ran = nn.Linear(4, 4), list[Tensor]()
    given, output = torch.ones(3, 4), torch.zeros(3, 4)
    layer.__dict__["forward"] = lambda made, scale=1.0: ran.append(made) or made * scale  # as hooks of accelerate set it
    hooked = layer.forward
    with repeating([Traced("layer", layer, given=((given,), {"scale": 2.0}), output=output)]):
        assert layer(torch.randn(3, 4), scale=2.0) is output
        assert not ran
        others = (torch.ones(4, 3).T, {"scale": 2.0}), (given, {"scale": 3.0}), (given.double(), {"scale": 2.0}), (given, {})
        for other, scale in others:
            assert layer(other, **scale) is not output
        assert len(ran) == len(others)
    assert layer.forward is hooked


@pytest.mark.parametrize("in_place", [0.0, 0.1])
def test_what_a_cut_leaves_without_a_use_is_what_going_through_the_whole_call_does_not_meet(in_place: float) -> None:
    drawn, kinds = random.Random(0), Counter[bool]()
    for _ in range(400):
        flow, made = Dataflow(), [0, 1]
        for tensor in range(2, 30):
            reads = drawn.sample(made, min(len(made), drawn.randint(1, 3)))
            new = [tensor, tensor + 100] if tensor % 5 == 0 else [tensor]
            flow.add(reads, new + (reads[:1] if drawn.random() < in_place else []))
            made += new
        flow.outputs = drawn.sample(made[-6:], 2)
        instead = {}
        for cut in drawn.sample(made[3:], 2):
            before = sorted(Dataflow(flow.reads, flow.makers, [cut]).needed()[1] - {cut})
            instead[cut] = drawn.sample(before, min(len(before), drawn.randint(0, 2)))
        uses, (operations, tensors) = Uses(flow), flow.needed(instead)
        lost = uses.lost(instead)
        assert lost == (uses.operations - operations, uses.tensors - tensors)
        kinds[bool(lost[0])] += 1
        ranges = [range(start, start + 4) for start in range(len(flow) - 4)]
        alive = [set(each) & uses.operations for each in ranges]
        assert uses.all_lost(ranges, lost[0]) == [bool(each) and each <= lost[0] for each in alive]
    assert kinds[True] > 50 < kinds[False]
