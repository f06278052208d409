"""What was measured, with its unit, count, spread and origin. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A median of repeated readings, in `unit`.

    `spread` is the interquartile range; `low` and `high` bound the median with 95 % confidence or more, where there are
    readings enough for that (six).
    """

    value: float
    unit: str
    n: int
    spread: float
    how: str
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, readings: Sequence[float], *, unit: str, how: str) -> Measurement:
        """Summarise one or more readings."""
        quartiles = statistics.quantiles(readings, n=4) if len(readings) > 1 else [readings[0]] * 3
        low, high = median_interval(readings)
        return cls(
            value=statistics.median(readings),
            unit=unit,
            n=len(readings),
            spread=quartiles[2] - quartiles[0],
            how=how,
            low=low,
            high=high,
        )


def median_interval(readings: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """Bounds of the true median: the two ranks that it lies between with this confidence, whatever the distribution.

    The number of readings below the median is binomial with p = 1/2 (the sign test's interval). Nones where there are too
    few readings for any two ranks to do.
    """
    count = len(readings)
    below, rank = 0.0, 0  # how likely it is that fewer than `rank` readings lie below the median
    while rank < count // 2 and below + math.comb(count, rank) / 2**count <= (1 - confidence) / 2:
        below += math.comb(count, rank) / 2**count
        rank += 1
    if not rank:
        return None, None
    ordered = sorted(readings)
    return ordered[rank - 1], ordered[count - rank]
