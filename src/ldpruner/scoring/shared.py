"""What scorers have in common: a score from a value, and every stand-in beside its operator while the denoiser runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ldpruner.plans import Edit, Score
from ldpruner.scoring.latent import BROKEN
from ldpruner.scoring.ledger import Key, key_of
from ldpruner.surgery import Fitted, trial, uncompiled

Seen = Callable[[Any, Mapping[Key, Any]], Any]  # an operator's output and its stand-ins', to what goes on instead, or None


def scored(edit: Edit, value: float, *, seconds: float) -> Score:
    """The score of an edit; a value that is not finite is `BROKEN`."""
    finite = value if math.isfinite(value) else BROKEN
    return Score(operator=edit.operator, replacement=edit.replacement, score=finite, seconds=seconds)


def scored_together(edits: Sequence[Edit], values: Mapping[Key, float], *, seconds: float) -> Iterator[Score]:
    """The scores of edits whose values came at once; each is said to have taken an equal part of the seconds."""
    return (scored(edit, values[key_of(edit)], seconds=seconds / len(edits)) for edit in edits)


def stand_in(denoiser: nn.Module, edit: Edit, *, fitted: Fitted) -> nn.Module:
    """What would take the operator's place, apart from the denoiser."""
    with trial(denoiser, [edit], fitted=fitted):
        return denoiser.get_submodule(edit.operator)


class Hush:
    """Whether hooks are to keep quiet: stand-ins hold modules of the denoiser that are watched themselves."""

    def __init__(self) -> None:
        self.on = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False


@contextmanager
def stand_ins_beside(denoiser: nn.Module, edits: Sequence[Edit], seen: Seen, *, fitted: Fitted, hush: Hush) -> Iterator[None]:
    """Whenever an operator runs, give its stand-ins the same arguments, without gradients, and show all outputs to `seen`.

    Nothing runs compiled meanwhile: what watches would be compiled with it.
    """
    by_operator: dict[str, dict[Key, nn.Module]] = {}
    for edit in edits:
        by_operator.setdefault(edit.operator, {})[key_of(edit)] = stand_in(denoiser, edit, fitted=fitted)

    def watch(stand_ins: Mapping[Key, nn.Module]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if hush.on:
                return None
            with torch.no_grad(), hush.kept():
                outputs = {key: module(*args, **kwargs) for key, module in stand_ins.items()}
            return seen(output, outputs)

        return hook

    with ExitStack() as stack:
        for operator, stand_ins in by_operator.items():
            handle = denoiser.get_submodule(operator).register_forward_hook(watch(stand_ins), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(uncompiled(denoiser.modules()))
        yield
