"""Where student and teacher are compared inside, derived from what was removed: no list of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ldpruner.operators.tracing import Call, Trace, trace
from ldpruner.operators.watching import tensors_in
from ldpruner.surgery import removed_operators


def find_taps(student: nn.Module, teacher: nn.Module, call: Call) -> tuple[str, ...]:
    """For each edit the smallest module around it whose output both have in one shape; the edit's own path where none is.

    What an edit changes reaches the rest of the network through that module's output. BK-SDM (arXiv 2305.15798) and
    LAPTOP-Diff (arXiv 2404.11098) compare the outputs of stages; we find them. No taps for a student without edits.
    """
    edits = removed_operators(student)
    seen = [trace(module, call) for module in (student, teacher)] if edits else []
    taps = {_around(edit, *seen) for edit in edits}
    return tuple(sorted(tap for tap in taps if all(tap in each.modules and _shape(each, tap) for each in seen)))


def _around(edit: str, student: Trace, teacher: Trace) -> str:
    path = edit.rpartition(".")[0]
    while path:
        shapes = [_shape(each, path) for each in (student, teacher)]
        if shapes[0] is not None and shapes[0] == shapes[1]:
            return path
        path = path.rpartition(".")[0]
    return edit


def _shape(traced: Trace, path: str) -> tuple[int, ...] | None:
    """The shape of a module's first output; None where it is not called once, or gives no tensor first."""
    module = traced.modules.get(path)
    if module is None or module.calls != 1:
        return None
    first = _first(module.output)
    return None if first is None else tuple(first.shape)


def _first(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else next(iter(tensors_in(output)), None) if isinstance(output, dict) else None


@contextmanager
def tapped(denoiser: nn.Module, taps: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the tapped modules in the forward passes within the block, by path.

    Hooks go with the block: gradient checkpointing runs modules once more during the backward pass.
    """
    features: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = _first(output)
            assert first is not None
            features[path] = first

        return hook

    with ExitStack() as stack:
        for path in taps:
            stack.callback(denoiser.get_submodule(path).register_forward_hook(keep(path)).remove)
        yield features
