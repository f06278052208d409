"""Putting stand-ins in the place of operators: in a copy, for good, or for a while."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldpruner.errors import OperatorError, PlanError, suggest
from ldpruner.ldpruner_v1 import (
    FORMAT_VERSION,
    STAND_INS,
    Identity,
    Method,
    Pointwise,
    Shortcut,
    StandIn,
    Zero,
    build,
    install,
    leave_out_of_lora,
)
from ldpruner.operators.tracing import Call, architecture, dry_run, shared_copy
from ldpruner.plans import Edit, Plan, within

# Operator -> weight (out, in) and bias (out) of its pointwise map; `correction_of(operator)` -> scale and shift, (channels) both,
# of a shortcut the weight and bias of its child; `kept_of(operator)` -> weight and bias of an operator that stays.
Fitted = Mapping[str, tuple[Tensor, Tensor]]
_KEPT = ":kept"


def correction_of(operator: str) -> str:
    """The name of an operator's correction in `Fitted`: it may have been fitted as a pointwise map as well."""
    return f"{operator}:correction"


def kept_of(operator: str) -> str:
    """The name in `Fitted` of the weight and bias that an operator gets which stays where it is."""
    return f"{operator}{_KEPT}"


def of_kept(fitted: Fitted) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight and bias of every operator that stays and gets others, by its path."""
    return {name.removesuffix(_KEPT): pair for name, pair in fitted.items() if name.endswith(_KEPT)}


def prune(denoiser: nn.Module, plan: Plan, *, fitted: Fitted | None = None) -> nn.Module:
    """A smaller copy of `denoiser`; the original stays as it was, and only what is kept is copied.

    `fitted` holds the weights of pointwise stand-ins, see `fitting.fit_pointwise`, and what `recovery.repair` found: what is not
    given of that changes nothing. Raises `PlanError` where the plan is for another model or needs weights that are not given.
    """
    plan.check_model(architecture(denoiser), type(denoiser).__name__)
    with trial(denoiser, plan.edits, fitted=fitted):
        pruned = copy.deepcopy(denoiser)
    return _signed(pruned, plan)


def prune_(denoiser: nn.Module, plan: Plan, *, fitted: Fitted | None = None) -> nn.Module:
    """Replace operators of `denoiser` itself, and return it. Raises as `prune`, before anything is changed."""
    plan.check_model(architecture(denoiser), type(denoiser).__name__)
    _swap_in(denoiser, plan.edits, fitted or {})
    return _signed(denoiser, plan)


@contextmanager
def trial(denoiser: nn.Module, edits: Sequence[Edit], *, fitted: Fitted | None = None) -> Iterator[nn.Module]:
    """The denoiser with its stand-ins, for as long as the block runs; always restored.

    Compiled blocks that hold one run as they are written: compiling each anew would take longer than it saves.
    """
    originals = _swap_in(denoiser, edits, fitted or {})
    try:
        with uncompiled(_around(denoiser, originals)):
            yield denoiser
    finally:
        for path, module in originals.items():
            place(denoiser, path, module)


def _around(denoiser: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """Every module that holds one of these paths."""
    for path in paths:
        parts = path.split(".")
        yield from (denoiser.get_submodule(".".join(parts[:count])) for count in range(len(parts)))


@contextmanager
def uncompiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While the block runs, modules that `torch.nn.Module.compile` was called on run as they are written."""
    compiled = {module: module._compiled_call_impl for module in modules if module._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, code in compiled.items():
            module._compiled_call_impl = code


def check_edits(denoiser: nn.Module, edits: Sequence[Edit], call: Call) -> None:
    """Raise what is wrong with edits before any work is done; `call` is run without weights, to see that the edits fit."""
    _check_apart(edits)
    for edit in edits:
        _operator(denoiser, edit.operator)
        _check_known(edit)
    changed = shared_copy(denoiser)
    try:
        install(changed, {edit.operator: {"replacement": edit.replacement, "options": dict(edit.options)} for edit in edits})
        dry_run(changed, call)
    except Exception as error:  # whatever the denoiser's own code raises
        raise PlanError(
            f"the plan's stand-ins do not fit this {type(denoiser).__name__} ({type(error).__name__}: {error}). "
            "Make the plan anew with `ldpruner plan`."
        ) from error


def _check_known(edit: Edit) -> None:
    if edit.replacement not in STAND_INS:
        raise OperatorError(f"{edit.operator}: replacement {edit.replacement!r} is unknown: {suggest(edit.replacement, STAND_INS)}")


def _swap_in(denoiser: nn.Module, edits: Sequence[Edit], fitted: Fitted) -> dict[str, nn.Module]:
    """Build every stand-in before the first is put in place, so that an error changes nothing."""
    _check_apart(edits)
    originals = {edit.operator: _operator(denoiser, edit.operator) for edit in edits}
    made: dict[str, nn.Module] = {edit.operator: _stand_in(originals[edit.operator], edit, denoiser, fitted) for edit in edits}
    kept = of_kept(fitted)
    originals |= {path: _operator(denoiser, path) for path in kept}
    made |= {path: with_weights(originals[path], *pair) for path, pair in kept.items()}
    for path, stand_in in made.items():
        place(denoiser, path, stand_in)
    return originals


def _operator(denoiser: nn.Module, path: str) -> nn.Module:
    try:
        return denoiser.get_submodule(path)
    except AttributeError as error:
        known = [name for name, _ in denoiser.named_modules() if name]
        raise OperatorError(f"{path!r} is no operator of this {type(denoiser).__name__}: {suggest(path, known)}") from error


def _stand_in(original: nn.Module, edit: Edit, denoiser: nn.Module, fitted: Fitted) -> nn.Module:
    _check_known(edit)
    like = next(original.parameters(), next(denoiser.parameters()))
    given = STAND_INS[edit.replacement] is Pointwise  # all of its weights: it need not draw random ones first
    if given and edit.operator not in fitted:
        raise PlanError(f"{edit.operator}: a pointwise stand-in needs fitted weights; prune the whole pipeline, which fits them.")
    try:
        with torch.device("meta" if given else like.device):
            stand_in = build(edit.replacement, dict(edit.options), original)
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{edit.operator}: the plan's options do not make a {edit.replacement!r} ({error}).") from error
    correction = fitted.get(correction_of(edit.operator))
    if given:
        set_fitted(stand_in.to_empty(device=like.device), *fitted[edit.operator])
    elif "correction" in edit.options and correction is not None:
        set_fitted(stand_in, *correction)
    return stand_in.to(device=like.device, dtype=like.dtype).train(original.training)


@torch.no_grad()
def set_fitted(stand_in: StandIn, weight: Tensor, bias: Tensor) -> None:
    """Give a stand-in its weights, see `Fitted`. Those of a shortcut are for a copy of its child, which may be the original's."""
    if isinstance(stand_in, Pointwise):
        stand_in.map.weight.copy_(weight)
        stand_in.map.bias.copy_(bias)
    elif isinstance(stand_in, Identity):
        stand_in.scale.copy_(weight)
        stand_in.shift.copy_(bias)
    elif isinstance(stand_in, Zero):
        stand_in.shift.copy_(bias)
    elif isinstance(stand_in, Shortcut):
        name = stand_in.options["child"]
        stand_in._modules[name] = with_weights(stand_in.get_submodule(name), weight, bias)


@torch.no_grad()
def with_weights(module: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of a linear map or convolution with another weight and bias, of the same shapes."""
    copied: Any = copy.deepcopy(module)
    copied.weight.copy_(weight)
    copied.bias.copy_(bias)
    changed: nn.Module = copied
    return changed


def pruned_view(denoiser: nn.Module, edits: Sequence[Edit], fitted: Fitted, *, signed: Plan | None = None) -> nn.Module:
    """A denoiser with the edits made that shares every weight it keeps with `denoiser`, which stays as it is.

    With the plan that the edits are of, its configuration says what was removed, as `prune` has it.
    """
    with trial(denoiser, edits, fitted=fitted):
        view = shared_copy(denoiser)
    return view if signed is None else _signed(view, signed)


def _check_apart(edits: Sequence[Edit]) -> None:
    paths = sorted(edit.operator for edit in edits)
    for path, following in itertools.pairwise(paths):
        if any(within(following, other) for other in paths if other != following) or path == following:
            raise PlanError(f"{following}: a plan holds a block or its parts, never both.")


def place(denoiser: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module where another was."""
    parent, _, name = path.rpartition(".")
    denoiser.get_submodule(parent)._modules[name] = module


def removed_operators(denoiser: Any) -> dict[str, dict[str, Any]]:
    """What was replaced in `denoiser` so far, as its config.json holds it; empty for an original."""
    config = getattr(denoiser, "config", None)
    config = config.get("quantization_config") or {} if isinstance(config, dict) else {}
    return dict(config.get("operators", {})) if config.get("quant_method") == Method.LDPRUNER.value else {}


def _signed(pruned: Any, plan: Plan) -> nn.Module:
    """Write the edits into the denoiser's configuration, so that any later save carries them."""
    new = plan.operators_config()
    kept = {path: entry for path, entry in removed_operators(pruned).items() if not any(within(path, block) for block in new)}
    if hasattr(pruned, "register_to_config"):
        signature = {"quant_method": Method.LDPRUNER.value, "format_version": FORMAT_VERSION, "operators": kept | new}
        pruned.register_to_config(quantization_config=signature)
        leave_out_of_lora(pruned)
    module: nn.Module = pruned
    return module
