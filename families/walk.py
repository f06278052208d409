"""What every denoiser has to stand: all of its replacements tried, then pruned, saved in every form, loaded elsewhere, trained."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loading import Loader
from specimens import Specimen
from torch import Tensor, nn

from ldpruner.artifacts import densify, save_denoiser
from ldpruner.errors import ArtifactError
from ldpruner.operators import Call, discover
from ldpruner.operators.discovery import DeadCode
from ldpruner.operators.watching import tensors_in
from ldpruner.plans import Candidate, Edit, Operator, Operators, Plan, within
from ldpruner.selection import predict_edits
from ldpruner.surgery import Fitted, prune, trial

SHARE, LEAST = 0.70, 0.55  # of the MACs, that a random plan leaves at most and at least


@dataclass
class Walk:
    """What was found on the way, for one class; `failed` says where it ended before the end."""

    name: str
    operators: int = 0
    candidates: dict[str, int] = field(default_factory=dict)  # replacement -> operators that it fits
    tried: int = 0
    macs_left: float = 1.0  # share of the MACs after the random plan
    edits: int = 0
    dense: str = ""  # why a random plan had to be one of branches, or of nothing, to have a dense form
    unreached: int = 0  # parameters that the original's own call does not reach either
    idle: int = 0  # parameters that a plan left without a use, and that lie in nothing that could be taken away
    failed: str = ""


def walk(specimen: Specimen, call: Call, folder: Path, loaders: dict[str, Loader], *, seed: int = 0) -> Walk:
    """Go the whole way. Raises `AssertionError` that says what does not hold."""
    denoiser = specimen.build()
    operators = discover(denoiser, call, timing_repeats=0)
    found = Walk(specimen.name, operators=len(operators.operators))
    for _, candidate in operators.pairs():
        found.candidates[candidate.replacement] = found.candidates.get(candidate.replacement, 0) + 1
    found.tried = try_all(denoiser, operators, call)
    plan, fitted = random_plan(denoiser, operators, call, seed)
    found.macs_left, found.edits = plan.predicted["macs"], len(plan.edits)
    pruned = prune(denoiser, plan, fitted=fitted)
    for form in ("portable", "plugin"):
        save_denoiser(pruned, folder / form, form=form)
        same(loaders[form].outputs(folder / form, call), outputs(pruned, call), f"loaded from the {form} form")
    found.dense = dense_form(denoiser, operators, plan, fitted, call, folder, loaders["portable"])
    found.unreached, found.idle = trains(pruned, denoiser, plan, call, operators)
    return found


def try_all(denoiser: nn.Module, operators: Operators, call: Call) -> int:
    """Run the whole denoiser with every replacement of every operator, one by one; how many there are."""
    before, modules = outputs(denoiser, call), dict(denoiser.named_modules())
    for operator, candidate in operators.pairs():
        edit = edit_of(operator, candidate)
        with trial(denoiser, [edit], fitted=random_weights([edit], seed=0)):
            made = outputs(denoiser, call)
        where = f"{candidate.replacement} at {operator.name}"
        assert [m.shape for m in made] == [b.shape for b in before], f"{where}: other shapes"
        assert all(bool(torch.isfinite(m).all()) for m in made), f"{where}: not finite"
        assert dict(denoiser.named_modules()) == modules, f"{where}: not restored"
    same(outputs(denoiser, call), before, "the original, after all trials")
    return len(operators.pairs())


def random_plan(
    denoiser: nn.Module, operators: Operators, call: Call, seed: int, *, replacements: tuple[str, ...] | None = None
) -> tuple[Plan, Fitted]:
    """Replacements drawn by chance until at most `SHARE` of the MACs are left, or none is left that would leave `LEAST`."""
    dead_code = DeadCode(denoiser, call, operators)
    chosen: tuple[Edit, ...] = ()
    edits, left = chosen, 1.0
    for operator, candidate in _shuffled(operators, seed, replacements):
        if any(within(operator.name, edit.operator) or within(edit.operator, operator.name) for edit in chosen):
            continue
        tried = dead_code.completed((*chosen, edit_of(operator, candidate)))
        share = predict_edits(operators, tried).macs / operators.total.macs
        if share < LEAST:
            continue
        edits, left = tried, share
        chosen = tuple(edit for edit in edits if edit.reason == "chosen")
        if left <= SHARE:
            break
    assert chosen, "nothing can be replaced"
    plan = Plan(model=operators.model, denoiser=operators.denoiser, edits=edits, predicted={"macs": left})
    return plan, random_weights(edits, seed)


def _shuffled(operators: Operators, seed: int, replacements: tuple[str, ...] | None) -> Iterator[tuple[Operator, Candidate]]:
    pairs = operators.pairs(replacements)
    random.Random(seed).shuffle(pairs)
    yield from pairs


def edit_of(operator: Operator, candidate: Candidate) -> Edit:
    """The candidate as an edit of its operator."""
    return Edit(operator=operator.name, replacement=candidate.replacement, options=candidate.options)


def random_weights(edits: tuple[Edit, ...] | list[Edit], seed: int) -> Fitted:
    """Weights for every pointwise map, small enough that what follows stays finite."""
    generator = torch.Generator().manual_seed(seed)
    fitted: dict[str, tuple[Tensor, Tensor]] = {}
    for edit in edits:
        if edit.replacement == "pointwise":
            given, made = edit.options["channels"]
            weight = torch.randn(made, given, generator=generator) / given**0.5
            fitted[edit.operator] = (weight, torch.randn(made, generator=generator) / 10)
    return fitted


def dense_form(
    denoiser: nn.Module, operators: Operators, plan: Plan, fitted: Fitted, call: Call, folder: Path, loader: Loader
) -> str:
    """Save and load the dense form of the plan, or of one that only leaves branches out; why, where it is not the plan's own."""
    why = ""
    try:
        dense = densify(denoiser, plan, call, fitted=fitted)
    except ArtifactError as error:
        why = str(error)
        plan, fitted = _of_branches(denoiser, operators, call)
        if not plan.edits:
            return f"{why} No branch of it can be left out by weights."
        dense = densify(denoiser, plan, call, fitted=fitted)
    save_denoiser(dense, folder / "dense", form="dense")
    loaded = loader.outputs(folder / "dense", call)
    same(loaded, outputs(dense, call), "loaded from the dense form")
    for made, wanted in zip(loaded, outputs(prune(denoiser, plan, fitted=fitted), call), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-4)
    return why


def _of_branches(denoiser: nn.Module, operators: Operators, call: Call) -> tuple[Plan, Fitted]:
    """Up to three edits that weights can express, found one by one."""
    held: list[Edit] = []
    for operator, candidate in operators.pairs(("zero", "shortcut", "pointwise")):
        edit = edit_of(operator, candidate)
        apart = not any(within(operator.name, e.operator) or within(e.operator, operator.name) for e in held)
        if apart and len(held) < 3 and _has_dense_form(denoiser, operators, edit, call):
            held.append(edit)
    return Plan(model=operators.model, denoiser=operators.denoiser, edits=tuple(held)), random_weights(held, seed=0)


def _has_dense_form(denoiser: nn.Module, operators: Operators, edit: Edit, call: Call) -> bool:
    plan = Plan(model=operators.model, denoiser=operators.denoiser, edits=(edit,))
    try:
        densify(denoiser, plan, call, fitted=random_weights([edit], seed=0))
    except ArtifactError:
        return False
    return True


def trains(pruned: nn.Module, original: nn.Module, plan: Plan, call: Call, operators: Operators) -> tuple[int, int]:
    """A backward pass reaches every parameter that is left, but for two kinds, which are counted.

    Those that the original's own call does not reach either; and those that the plan left without a use and that lie in nothing
    that can be taken away, such as a table that a block itself holds, or a module that is called twice.
    """
    never = _unreached(original, call)
    stand_ins = [
        edit.operator
        for edit in plan.edits
        if all(f"{edit.operator}.{name}" in never for name, _ in original.get_submodule(edit.operator).named_parameters())
    ]
    lost = {name for name in _unreached(pruned, call) - never if not any(within(name, path) for path in stand_ins)}
    missed = [operator.name for operator in operators.operators if operator.if_dead and _all_of(pruned, operator.name, lost)]
    assert not missed, f"no gradient reaches {len(missed)} operators that could be taken away, first {missed[0]}"
    return len(never), len(lost)


def _all_of(pruned: nn.Module, path: str, lost: set[str]) -> bool:
    """Whether a module is still there and no gradient reaches any of its parameters."""
    modules = dict(pruned.named_modules())
    names = {f"{path}.{name}" for name, _ in modules[path].named_parameters()} if path in modules else set()
    return bool(names) and names <= lost


def _unreached(denoiser: nn.Module, call: Call) -> set[str]:
    denoiser.requires_grad_(True)
    denoiser.zero_grad()
    total = sum(made.float().square().sum() for made in tensors_in(call.copied().run(denoiser)))
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    missed = {name for name, parameter in denoiser.named_parameters() if parameter.grad is None}
    denoiser.zero_grad()
    return missed


@torch.no_grad()
def outputs(denoiser: nn.Module, call: Call) -> list[Tensor]:
    """Every tensor that the call gives, from copies of what it is given."""
    return [made.clone() for made in tensors_in(call.copied().run(denoiser))]


def same(made: list[Tensor], wanted: list[Tensor], what: str) -> None:
    """Assert that tensors are equal bit by bit."""
    assert len(made) == len(wanted), f"{what}: {len(made)} outputs instead of {len(wanted)}"
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True)), f"{what}: other numbers"
