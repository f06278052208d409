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
STRUCTURAL = 0.25  # of the variance about a step at least: kinds differ in more than samples
LEAST = 0.5  # slope: what does more harm by one kind does so by the next, whatever a few edits that are alike say
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
        slope = max(LEAST, float((x @ y + STIFFNESS * variance) / (x @ x + STIFFNESS * variance)))
        left = y - slope * x
        spread = float(np.sqrt(left @ left / max(1, len(pairs) - 2))) if len(pairs) >= FEW else UNKNOWN
        return cls(intercept=float(dear.mean() - slope * cheap.mean()), slope=slope, spread=spread)


def beliefs(rungs: Sequence[Mapping[Key, float]], *, sampled: int = 0) -> dict[Key, Belief]:
    """What is believed of every edit on the first rung, on the scale of the last one.

    `rungs` hold values, 0 or more, of ever dearer kinds; who is on one is on those below. Logarithms are carried from rung to rung
    by the edits that are on both, and the spreads about that add up as variances. The last `sampled` rungs, one or two, are
    estimates of the same from samples, the last from twice as many: it holds those of the one below, and with a variance in
    inverse proportion to samples, that of their difference, sigma^2 / n - sigma^2 / 2n, is the last one's own. What samples say
    is weighed against what the kinds before them say, by the inverse of variances: few samples tell less than they seem to.
    """
    logs = [{key: math.log(max(value, FLOOR)) for key, value in rung.items()} for rung in rungs]
    steps = [Step.of([(low[key], high[key]) for key in high]) for low, high in itertools.pairwise(logs)]
    noise = steps[-1].spread ** 2 if sampled > 1 else 0.0  # variance of a value on the last rung
    found: dict[Key, Belief] = {}
    for key in logs[0]:
        rung = max(place for place, values in enumerate(logs) if key in values)
        before = min(rung, len(logs) - sampled - 1) if sampled else rung
        mean, variance = carried(logs[before][key], steps[before:])
        variance = max(variance - 3 * noise, variance * STRUCTURAL)  # of the truth: not of either estimate, which it was read from
        if rung > before:
            seen, _ = carried(logs[rung][key], steps[rung:])
            doubted = noise * (len(logs) - rung)  # twice on the rung of half as many samples
            weight = variance / (variance + doubted) if doubted else 1.0
            mean, variance = mean + weight * (seen - mean), weight * doubted
        found[key] = Belief(mean=mean, doubt=math.sqrt(variance), rung=rung)
    return found


def carried(value: float, steps: Sequence[Step]) -> tuple[float, float]:
    """A logarithm taken up so many steps, and the variance that this gives it."""
    variance = 0.0
    for step in steps:
        value, variance = step.intercept + step.slope * value, step.slope**2 * variance + step.spread**2
    return value, variance
