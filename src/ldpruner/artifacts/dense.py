"""The pruned function in the original's shape: weights that make an operator do what its stand-in does.

Nothing gets smaller or faster. It is for programs that read weights by their own means, and an oracle in tests. A
normalisation cannot be made to do nothing by any choice of weights, so not every plan has a dense form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ldpruner.errors import ArtifactError
from ldpruner.operators.tracing import Call
from ldpruner.operators.watching import tensors_in
from ldpruner.plans import Edit, Plan
from ldpruner.surgery import Fitted, correction_of, of_kept, place, trial, with_weights

_LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Given = tuple[tuple[Any, ...], dict[str, Any]]


def densify(denoiser: nn.Module, plan: Plan, call: Call, *, fitted: Fitted | None = None) -> nn.Module:
    """A copy of `denoiser`, of the original architecture, that computes what the plan's edits leave.

    Every rewritten operator is compared with its stand-in on what `call` gives it. Raises `ArtifactError` that names the
    edits which no weights can express.
    """
    dense = copy.deepcopy(denoiser)
    for path, pair in of_kept(fitted or {}).items():
        place(dense, path, with_weights(dense.get_submodule(path), *pair))
    given = _inputs(denoiser, [edit.operator for edit in plan.edits], call)
    refused = [
        edit for edit in plan.edits if edit.reason == "chosen" and not _rewrite(dense, edit, given[edit.operator], fitted or {})
    ]
    if refused:
        named = ", ".join(f"{edit.replacement} at {edit.operator}" for edit in refused[:3])
        raise ArtifactError(
            f"the dense form cannot hold {len(refused)} of {len(plan.edits)} edits ({named}). Save as portable, or plan with "
            "replacements that only leave branches out: zero, shortcut."
        )
    return dense


def _inputs(denoiser: nn.Module, names: list[str], call: Call) -> dict[str, Given]:
    """What each operator is given in the call."""
    seen: dict[str, Given] = {}
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            keep = _keeper(seen, name)
            stack.callback(denoiser.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True).remove)
        call.run(denoiser)
    return seen


def _keeper(seen: dict[str, Given], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = (args, kwargs)

    return hook


@torch.no_grad()
def _rewrite(dense: nn.Module, edit: Edit, given: Given, fitted: Fitted) -> bool:
    """Try every way to write the edit into weights, until one does what the stand-in does."""
    args, kwargs = given
    with trial(dense, [edit], fitted=fitted):
        wanted = tensors_in(dense.get_submodule(edit.operator)(*args, **kwargs))
    operator = dense.get_submodule(edit.operator)
    before = {name: tensor.clone() for name, tensor in operator.state_dict().items()}
    for change in _ways(operator, edit, fitted):
        change()
        if _same(tensors_in(operator(*args, **kwargs)), wanted):
            return True
        operator.load_state_dict(before)
    return False


def _ways(operator: nn.Module, edit: Edit, fitted: Fitted) -> Iterator[Callable[[], None]]:
    if isinstance(operator, _LEAVES):
        if edit.replacement == "zero":
            yield lambda: _fill(operator, None, fitted[name][1] if (name := correction_of(edit.operator)) in fitted else None)
        if edit.replacement == "identity":
            yield lambda: _fill(operator, torch.eye(operator.weight.shape[0], operator.weight.shape[1]), None)
        if edit.replacement == "pointwise":
            yield lambda: _fill(operator, *fitted[edit.operator])
        return
    for leaf in operator.modules():  # a block that keeps its skip path: one of its leaves is the end of the branch
        if isinstance(leaf, _LEAVES) and edit.replacement in {"identity", "shortcut", "zero"}:
            yield lambda leaf=leaf: _leave_out(leaf, operator, edit, fitted)  # type: ignore[misc]


def _leave_out(leaf: nn.Module, block: nn.Module, edit: Edit, fitted: Fitted) -> None:
    """Silence the end of a branch; the child on a shortcut's skip path takes what repair gave it."""
    _fill(leaf, None, None)
    name = correction_of(edit.operator)
    if edit.replacement == "shortcut" and name in fitted and "correction" in edit.options:
        child: Any = block.get_submodule(edit.options["child"])
        for parameter, values in zip((child.weight, child.bias), fitted[name], strict=True):
            parameter.copy_(values)


def _fill(leaf: Any, matrix: Tensor | None, bias: Tensor | None) -> None:
    """Make a linear map or convolution act at its centre only, as `matrix` `(out, in)`; None is zero."""
    leaf.weight.zero_()
    if leaf.bias is not None:
        leaf.bias.zero_()
    if matrix is not None and matrix.shape == leaf.weight.shape[:2]:
        centre = tuple(size // 2 for size in leaf.weight.shape[2:])
        leaf.weight[(slice(None), slice(None), *centre)] = matrix.to(leaf.weight)
    if bias is not None and leaf.bias is not None:
        leaf.bias.copy_(bias)


def _same(made: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(made) == len(wanted) and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(made, wanted, strict=True))
