"""What was measured, with its unit, count, spread and origin. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A median of repeated readings. `spread` is the interquartile range, in the same unit."""

    value: float
    unit: str
    n: int
    spread: float
    how: str

    @classmethod
    def of(cls, readings: Sequence[float], *, unit: str, how: str) -> Measurement:
        """Summarise one or more readings."""
        quartiles = statistics.quantiles(readings, n=4) if len(readings) > 1 else [readings[0]] * 3
        return cls(value=statistics.median(readings), unit=unit, n=len(readings), spread=quartiles[2] - quartiles[0], how=how)
