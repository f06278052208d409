"""First-order changes of the denoising loss, for all edits at once: one forward and one backward pass see every operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ldpruner.operators.watching import tensors_in
from ldpruner.plans import Edit
from ldpruner.scoring.base import Asked
from ldpruner.scoring.denoising import questions
from ldpruner.scoring.ledger import Key, key_of
from ldpruner.scoring.shared import Hush, stand_ins_beside
from ldpruner.surgery import Fitted


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """The denoising loss at each timestep, and by how much an edit would change it if the loss were linear."""

    losses: tuple[float, ...]
    changes: Mapping[Key, tuple[float, ...]]


def first_order(asked: Asked, *, timesteps: int) -> FirstOrder:
    """<dL_t/dy, y' - y> for every edit and timestep t: y is the operator's output, y' its stand-in's for the same input.

    For a linear map with a `zero` in its place, y' - y = -y, and this is -sum(w dL_t/dw) over its weights and bias: the
    Taylor criterion of pruning. The form by outputs also holds for operators without parameters, and tells an operator's
    replacements apart. Memory: besides what a backward pass keeps, one tensor of the operator's output for each edit, so
    that a smaller `batch_size` helps. No parameter gets a gradient.
    """
    losses: list[float] = []
    changes: list[dict[Key, float]] = []
    denoiser, watch = asked.pipeline.denoiser, Watch.of(asked.edits)
    for batch in questions(asked.pipeline, asked.probe, timesteps=timesteps, batch_size=asked.batch_size):
        watch.reset()
        with watched(denoiser, asked.edits, watch, fitted=asked.fitted):
            losses.append(sum(_backward(question.loss(denoiser)) for question in batch))
        changes.append({key: float(change.sum()) for key, change in watch.changes.items()})
    return FirstOrder(losses=tuple(losses), changes={key: tuple(step[key] for step in changes) for key in watch.changes})


@dataclass
class Watch:
    """Adds up <gradient, y' - y>, row by row of an operator's output, while gradients come back."""

    changes: dict[Key, Tensor]

    @classmethod
    def of(cls, edits: Sequence[Edit]) -> Watch:
        return cls({key_of(edit): torch.zeros(1) for edit in edits})

    def reset(self) -> None:
        self.changes = dict.fromkeys(self.changes, torch.zeros(1))

    def seen(self, output: Any, others: Mapping[Key, Any]) -> Any:
        output = tree_map(_differentiable, output)
        for key, other in others.items():
            for made, instead in zip(tensors_in(output), tensors_in(other), strict=True):
                if made.requires_grad:
                    made.register_hook(self._adding(key, (instead - made).detach()))  # type: ignore[no-untyped-call]
        return output

    def _adding(self, key: Key, change: Tensor) -> Any:
        def hook(gradient: Tensor) -> None:
            known, new = self.changes[key], (gradient.float() * change.float()).reshape(len(change), -1).sum(1).cpu()
            self.changes[key] = known + new if len(known) in (1, len(new)) else known.sum() + new.sum(0, keepdim=True)

        return hook


@contextmanager
def watched(denoiser: nn.Module, edits: Sequence[Edit], watch: Watch, *, fitted: Fitted) -> Iterator[None]:
    """What runs and goes backward in the block is seen by `watch`; no parameter gets a gradient."""
    with _frozen(denoiser), stand_ins_beside(denoiser, edits, watch.seen, fitted=fitted, hush=Hush()), torch.enable_grad():
        yield


def _differentiable(leaf: Any) -> Any:
    """A tensor that gradients come back to; a copy where it has none yet, since a leaf may not change in place."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.requires_grad:
        return leaf
    return leaf.detach().requires_grad_().clone()


def _backward(loss: Tensor) -> float:
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


@contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient, for as long as the block runs."""
    wanted = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, want in wanted:
            parameter.requires_grad_(want)
