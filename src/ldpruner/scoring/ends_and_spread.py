"""A prior on structure, nothing measured: keep both ends of each stage, spread the cuts (TinyFusion, arXiv 2412.01199)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ldpruner.operators.stages import stage_of_blocks
from ldpruner.operators.tracing import trace
from ldpruner.plans import Score, within
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.shared import scored


@SCORERS.register("ends-and-spread")
@dataclass(frozen=True, kw_only=True)
class EndsAndSpreadScorer(Scorer):
    """The place of an operator's block in an order that halves the depth again and again; the ends of stages come last.

    TinyFusion, Table 3 as we read it: of DiT-XL's layers chosen by hand, keeping both ends and spreading the cuts recovers
    best, though its loss before recovery is not the lowest. How we carry that over to nested models is our own:

    Blocks and stages are those of `operators.stages`, ordered as the denoiser calls them.
    Parts of a block come right after the block; what holds several blocks comes with the last of them; what lies in no
    stage comes last of all. Replacements of one operator score alike: the selection takes what saves more.
    Costs no denoiser pass but a traced call without weights.
    """

    def scores(self, asked: Asked) -> Iterator[Score]:
        began = time.perf_counter()
        called = trace(asked.pipeline.denoiser, asked.pipeline.call(asked.probe)).modules
        places = block_order(stage_of_blocks(asked.pipeline.denoiser, called))
        for edit in asked.edits:
            yield scored(edit, _place(edit.operator, places), seconds=time.perf_counter() - began)
            began = time.perf_counter()


def block_order(stages: Mapping[str, str]) -> dict[str, int]:
    """The place of every block: inner ones first, then the first and last of each stage, each spread over depth."""
    blocks = list(stages)
    first = {stage: depth for depth, stage in reversed(list(enumerate(stages.values())))}
    last = {stage: depth for depth, stage in enumerate(stages.values())}
    ends = sorted({*first.values(), *last.values()})
    inner = [depth for depth in range(len(blocks)) if depth not in ends]
    order = [*spread_over(inner, len(blocks)), *spread_over(ends, len(blocks))]
    return {blocks[depth]: place for place, depth in enumerate(order)}


def spread_over(depths: Iterable[int], total: int) -> list[int]:
    """Always next what lies farthest from all taken so far and from both outsides; of equals, the first."""
    taken, left, order = [-1, total], sorted(depths), list[int]()
    while left:
        chosen = max(left, key=lambda depth: min(abs(depth - other) for other in taken))
        left.remove(chosen)
        taken.append(chosen)
        order.append(chosen)
    return order


def _place(operator: str, places: Mapping[str, int]) -> float:
    """A block's place; half a place behind it for its parts; three quarters behind their last for what holds several."""
    block = next((block for block in places if within(operator, block)), None)
    if block is not None:
        return places[block] + (0.0 if operator == block else 0.5)
    while operator:
        held = [place for block, place in places.items() if within(block, operator)]
        if held:
            return max(held) + 0.75
        operator = operator.rpartition(".")[0]
    return float(len(places))
