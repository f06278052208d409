"""The floor under every method: chance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from ldpruner.plans import Edit, Score
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.shared import scored


@SCORERS.register("random")
@dataclass(frozen=True, kw_only=True)
class RandomScorer(Scorer):
    """A uniform number in [0, 1) for each operator and replacement, drawn anew for every `probe.seed`.

    It is the hash of the three and not the next number of a generator: neither order nor resuming changes it. Costs no
    denoiser pass. One run is one draw: a fair comparison takes several seeds.
    """

    def scores(self, asked: Asked) -> Iterator[Score]:
        return (scored(edit, uniform(asked.probe.seed, edit), seconds=0.0) for edit in asked.edits)


def uniform(seed: int, edit: Edit) -> float:
    """The first 53 bits of SHA-256 as a fraction of 1."""
    digest = hashlib.sha256(f"{seed}\n{edit.operator}\n{edit.replacement}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
