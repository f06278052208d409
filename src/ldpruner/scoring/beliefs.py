"""What measurements of several kinds, from cheap to dear, say of one score, and how sure that is. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ldpruner.scoring.ledger import Key

FLOOR = 1e-12  # what changes nothing scores 0, which has no logarithm
UNKNOWN = 1.0  # standard deviation of a logarithm that little is known of: a factor of e
FEW = 5  # edits measured both ways below which no spread is read from them
STIFFNESS = 4.0  # how many edits' worth of evidence says that one kind is in proportion to the next


@dataclass(frozen=True, kw_only=True)
class Belief:
    """A score's natural logarithm, its standard deviation, and the kind of measurement, from 0, that it rests on."""

    mean: float
    doubt: float
    rung: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """How the logarithm of one kind of measurement follows from that of the cheaper kind before it: a + b x, and its spread."""

    intercept: float
    slope: float
    spread: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Step:
        """Least squares with the slope drawn towards 1, of edits measured both ways; little is known where they are few."""
        if not pairs:
            return cls(intercept=0.0, slope=1.0, spread=UNKNOWN)
        cheap, dear = np.array(pairs).T
        x, y = cheap - cheap.mean(), dear - dear.mean()
        variance = max(float(np.var(cheap)), FLOOR)
        slope = float((x @ y + STIFFNESS * variance) / (x @ x + STIFFNESS * variance))
        left = y - slope * x
        spread = float(np.sqrt(left @ left / max(1, len(pairs) - 2))) if len(pairs) >= FEW else UNKNOWN
        return cls(intercept=float(dear.mean() - slope * cheap.mean()), slope=slope, spread=spread)


def beliefs(rungs: Sequence[Mapping[Key, float]]) -> dict[Key, Belief]:
    """What is believed of every edit on the first rung: the value on its highest rung, carried up to the last one.

    `rungs` hold values, 0 or more, of ever dearer kinds; who is on one is on those below. Logarithms are carried from rung to rung
    by the edits that are on both, and the spreads about that add up as variances. On the last rung, whose samples are twice those
    of the one below and hold them, the spread between the two is that of the last one itself: with a variance in inverse
    proportion to samples, that of the difference is sigma^2 / n - sigma^2 / 2n.
    """
    logs = [{key: math.log(max(value, FLOOR)) for key, value in rung.items()} for rung in rungs]
    steps = [Step.of([(low[key], high[key]) for key in high]) for low, high in itertools.pairwise(logs)]
    found: dict[Key, Belief] = {}
    for key in logs[0]:
        rung = max(place for place, values in enumerate(logs) if key in values)
        mean, variance = logs[rung][key], steps[-1].spread ** 2 if steps and rung == len(steps) else 0.0
        for step in steps[rung:]:
            mean, variance = step.intercept + step.slope * mean, step.slope**2 * variance + step.spread**2
        found[key] = Belief(mean=mean, doubt=math.sqrt(variance), rung=rung)
    return found
