"""What every scorer promises, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Score
from ldpruner.probes import Probe
from ldpruner.registry import Registry
from ldpruner.surgery import Fitted


class Scorer(Protocol):
    """Scores edits one by one. The engine never asks which scorer it holds."""

    def scores(
        self, pipeline: Pipeline, edits: Sequence[Edit], probe: Probe, *, fitted: Fitted, batch_size: int | None
    ) -> Iterator[Score]:
        """One score per edit, in order, each given out as soon as it is known; the denoiser is as before in between."""
        ...


SCORERS: Registry[Callable[[], Scorer]] = Registry("scoring method")
