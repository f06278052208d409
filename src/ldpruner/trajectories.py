"""What a denoiser is asked during a generation: its calls, kept so that they can be put to it again, changed or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ldpruner.operators.tracing import Call
from ldpruner.operators.watching import tensors_in
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe


def record_calls(pipeline: Pipeline, probe: Probe, *, batch_size: int | None = None) -> list[Call]:
    """Every denoiser call of the probe's generations, in order: all calls of the first batch, then those of the next.

    Costs `samples x steps` denoiser passes. The tensors are copies, and what a call has in common with the one before
    it, such as text embeddings, is held once for both: read them, do not write.
    """
    with recording(pipeline.denoiser) as calls:
        pipeline.latents(probe, batch_size=batch_size)
    return calls


class _ReachedError(Exception):
    """Ends a generation once the call that was waited for has been recorded."""


def record_call(pipeline: Pipeline, probe: Probe, number: int) -> Call:
    """Call `number`, from 0, of the probe's generations, all samples at once, which end there; the last where they are fewer."""
    with recording(pipeline.denoiser, until=number) as calls, suppress(_ReachedError):
        pipeline.latents(probe)
    return calls[-1]


@contextmanager
def recording(denoiser: nn.Module, *, until: int | None = None) -> Iterator[list[Call]]:
    """A list that grows by one `Call` with every call of the denoiser, for as long as the block runs, or `until` is recorded."""
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_copied(args, kwargs, calls[-1] if calls else None))
        if len(calls) - 1 == until:
            raise _ReachedError

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass
class Passes:
    """Denoiser passes of one sample; a backward pass counts as two, a guided sample as two."""

    count: int = 0


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[Passes]:
    """Counts, while the block runs, the rows of every call and of every backward pass from its output."""
    passes = Passes()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        made = tensors_in(output)[0]
        passes.count += len(made)
        if made.requires_grad:
            made.register_hook(backward)  # type: ignore[no-untyped-call]

    def backward(gradient: Tensor) -> None:
        passes.count += 2 * len(gradient)

    handle = denoiser.register_forward_hook(hook)
    try:
        yield passes
    finally:
        handle.remove()


def spread_calls(pipeline: Pipeline, probe: Probe, count: int, *, batch_size: int | None = None) -> list[Call]:
    """Of each batch's calls `count`, spread evenly from its first to its last; all of them where they are fewer."""
    calls = record_calls(pipeline, probe, batch_size=batch_size)
    batches = math.ceil(probe.samples / (batch_size or probe.samples))
    each = len(calls) // batches
    places = sorted({round(number * (each - 1) / max(1, count - 1)) for number in range(count)}) if count < each else range(each)
    return [calls[batch * each + place] for batch in range(batches) for place in places]


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any], before: Call | None) -> Call:
    leaves, structure = tree_flatten((args, kwargs))
    known = tree_flatten((before.args, before.kwargs))[0] if before else []
    known += [None] * (len(leaves) - len(known))
    args, kwargs = tree_unflatten([_copy(leaf, old) for leaf, old in zip(leaves, known, strict=False)], structure)
    return Call(args, kwargs)


def _copy(leaf: Any, old: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    alike = isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (leaf.shape, leaf.dtype, leaf.device)
    return old if alike and torch.equal(old, leaf) else leaf.detach().clone()
