"""Modules that repeat what they gave, so that a trial runs no more of a denoiser than what it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from ldpruner.operators.watching import Traced


@contextmanager
def repeating(traced: Sequence[Traced]) -> Iterator[None]:
    """While the block runs, these modules give what they gave in the call that was watched, whenever they are given the like.

    Without numbers, that is tensors of the same shapes that lie in memory the same way, and the same of all else.
    """
    before = {entry.name: entry.module.__dict__.get("forward") for entry in traced}
    for entry in traced:
        entry.module.__dict__["forward"] = _repeat(entry, entry.module.forward)
    try:
        yield
    finally:
        for entry in traced:
            del entry.module.__dict__["forward"]
            entry.module.__dict__ |= {"forward": before[entry.name]} if before[entry.name] else {}


def _repeat(entry: Traced, forward: Callable[..., Any]) -> Callable[..., Any]:
    known, structure = tree_flatten(entry.given)

    def repeat(*args: Any, **kwargs: Any) -> Any:
        given, its_structure = tree_flatten((args, kwargs))
        alike = structure == its_structure and all(map(_alike, given, known))
        return entry.output if alike else forward(*args, **kwargs)

    return repeat


def _alike(given: Any, known: Any) -> bool:
    """Whether two arguments cannot be told apart where there are no numbers."""
    if isinstance(given, Tensor) and isinstance(known, Tensor):
        return _layout(given) == _layout(known)
    return given is known or (type(given) is type(known) and isinstance(given, bool | int | float | str) and given == known)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset()
