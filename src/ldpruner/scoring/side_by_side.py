"""Several edits in one denoiser call, each in samples of its own: a call of few samples leaves most of a large device idle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ldpruner.errors import OperatorError
from ldpruner.operators.tracing import Call
from ldpruner.plans import Edit
from ldpruner.scoring.ledger import Key, key_of
from ldpruner.scoring.shared import Hush, stand_ins_beside
from ldpruner.surgery import Fitted


@dataclass
class _Rows:
    """Which rows of a denoiser call are an edit's: guidance has all samples twice, one copy after the other."""

    places: Mapping[Key, int]
    copies: int
    batch: int = 0  # rows of the call that runs

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batch = Call(args, kwargs).batch

    def mixed(self, output: Any, outputs: Mapping[Key, Any]) -> Any:
        """An operator's output, with the rows of every edit of it taken from its stand-in's."""
        leaves, structure = tree_flatten(output)
        mixed = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for key, made in outputs.items():
            for into, other in zip(mixed, tree_flatten(made)[0], strict=True):
                if isinstance(into, Tensor):
                    self._of(into, key).copy_(self._of(other, key))
        return tree_unflatten(mixed, structure)

    def _of(self, tensor: Tensor, key: Key) -> Tensor:
        if not tensor.ndim or len(tensor) % self.batch:
            raise OperatorError(f"{key[0]}: its output has no rows for each sample.")
        parts = tensor.reshape(self.copies, len(self.places), -1, *tensor.shape[1:])
        return parts[:, self.places[key]]


@contextmanager
def side_by_side(denoiser: nn.Module, edits: Sequence[Edit], *, copies: int, fitted: Fitted) -> Iterator[None]:
    """While the block runs, the samples of a call are as many equal parts as there are edits, and each edit is made in its own.

    Rows are `copies` times all samples, as guidance has it. An operator and its stand-ins see all of them, and what goes on is
    mixed row by row: dearer than one edit at a time where the device is busy anyway. A call raises `OperatorError` where an
    operator's output cannot be told by samples.
    """
    rows = _Rows(places={key_of(edit): place for place, edit in enumerate(edits)}, copies=copies)
    handle = denoiser.register_forward_pre_hook(rows.note, with_kwargs=True)
    try:
        with stand_ins_beside(denoiser, edits, rows.mixed, fitted=fitted, hush=Hush()):
            yield
    finally:
        handle.remove()


def tiled(call: Call, times: int, *, copies: int) -> Call:
    """The call with all of its samples so many times, one after the other, in each of the `copies` that its rows are."""
    samples = call.batch // copies
    return call.of_rows([copy * samples + row for copy in range(copies) for _ in range(times) for row in range(samples)])


def every(call: Call, step: int, first: int, *, copies: int) -> Call:
    """The call with each `step`-th of its samples, from the `first` on, in each of its copies."""
    samples = call.batch // copies
    return call.of_rows([copy * samples + row for copy in range(copies) for row in range(first, samples, step)])


def split(call: Call, size: int, *, copies: int) -> list[Call]:
    """The call in parts of at most so many samples."""
    parts = math.ceil(call.batch / copies / size)
    return [every(call, parts, first, copies=copies) for first in range(parts)]
