"""Blocks whose output resembles their input can go (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldpruner.ldpruner_v1 import channel_axis
from ldpruner.operators.tracing import Call, trace
from ldpruner.operators.watching import Traced, tensors_in
from ldpruner.plans import Edit, Score
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.ledger import Key, key_of
from ldpruner.scoring.shared import Hush, scored_together, stand_ins_beside
from ldpruner.surgery import trial
from ldpruner.trajectories import spread_calls


@SCORERS.register("block-influence")
@dataclass(frozen=True, kw_only=True)
class BlockInfluenceScorer(Scorer):
    """1 - mean cosine between an operator's output and its stand-in's, position by position along channels.

    With `identity` that is ShortGPT's block influence, 1 - E[x y / (|x| |y|)], averaged over samples, positions and
    `timesteps` steps of the original's own trajectory. The rest is our extension: other stand-ins are compared by what
    they give in x's place. A zero has no direction, so for a branch that is left out the stream is compared after the
    branch would have joined it, with and without: the output of the nearest enclosing module that is no branch itself.
    Costs `samples x steps` denoiser passes to record and `samples x timesteps` for all edits together, and with each of
    those one more run of the enclosing module per `zero`.
    """

    timesteps: int = 4

    def scores(self, asked: Asked) -> Iterator[Score]:
        began = time.perf_counter()
        calls = spread_calls(asked.pipeline, asked.probe, self.timesteps, batch_size=asked.batch_size)
        means = {key_of(edit): _Mean() for edit in asked.edits}
        left_out = by_stream(asked.pipeline.denoiser, [edit for edit in asked.edits if edit.replacement == "zero"], calls[0])
        replaced = [edit for edit in asked.edits if edit.replacement != "zero"]
        denoiser, hush = asked.pipeline.denoiser, Hush()

        def seen(output: Any, others: Mapping[Key, Any]) -> None:
            for key, other in others.items():
                means[key].add(output, other)

        with (
            torch.no_grad(),
            stand_ins_beside(denoiser, replaced, seen, fitted=asked.fitted, hush=hush),
            _streams_beside(denoiser, left_out, means, hush=hush),
        ):
            for call in calls:
                call.run(denoiser)
        influence = {key: mean.influence for key, mean in means.items()}
        yield from scored_together(asked.edits, influence, seconds=time.perf_counter() - began)


@dataclass
class _Mean:
    """The mean cosine over all positions of all outputs seen so far."""

    total: float = 0.0
    count: int = 0

    def add(self, mine: Any, other: Any) -> None:
        for one, two in zip(tensors_in(mine), tensors_in(other), strict=True):
            cosines = F.cosine_similarity(one.float(), two.float(), dim=channel_axis(one.ndim, {}))
            self.total += float(cosines.sum())
            self.count += cosines.numel()

    @property
    def influence(self) -> float:
        """1 - the mean; rounding can leave it a little below 0."""
        value = 1 - self.total / self.count
        return 0.0 if value < 0 else value


@contextmanager
def _streams_beside(
    denoiser: nn.Module, around: Mapping[str, Sequence[Edit]], means: Mapping[Key, _Mean], *, hush: Hush
) -> Iterator[None]:
    """Whenever the stream around a branch has been made, make it again without the branch."""

    def watch(inside: Sequence[Edit]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if hush.on:
                return
            with hush.kept():
                for edit in inside:
                    with trial(denoiser, [edit]):
                        means[key_of(edit)].add(output, module(*args, **kwargs))

        return hook

    with ExitStack() as stack:
        for path, inside in around.items():
            handle = denoiser.get_submodule(path).register_forward_hook(watch(inside), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def by_stream(denoiser: nn.Module, edits: Sequence[Edit], call: Call) -> dict[str, list[Edit]]:
    """Edits that leave a branch out, by the module whose output has the stream after the branch."""
    modules = trace(denoiser, call).modules if edits else {}
    around: dict[str, list[Edit]] = {}
    for edit in edits:
        around.setdefault(stream_after(edit.operator, modules), []).append(edit)
    return around


def stream_after(branch: str, modules: Mapping[str, Traced]) -> str:
    """The nearest module around `branch` that was called and is no branch itself; "" is the whole denoiser."""
    path = branch.rpartition(".")[0]
    while path and (path not in modules or modules[path].is_branch):
        path = path.rpartition(".")[0]
    return path
