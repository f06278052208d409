"""From a plan by scores of single operators to one whose edits do less harm together.

What an edit adds to the joint latent shift depends on the edits beside it: it may be harmless alone and harmful together with
others, or make up for them. So a plan is changed a little, measured as a whole, and learned from. The square of the joint
shift is taken to be linear in the edits near the best plan so far; an exact program gives the plan near it that this model
likes most of those not measured yet; what is measured then corrects the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ldpruner.plans import Operators, Quantity, Score
from ldpruner.selection import Option, Priors, options_of
from ldpruner.selection.choice import FREE, Chosen
from ldpruner.selection.exact import Keys, Nearby

log = logging.getLogger(__name__)

Judge = Callable[[Chosen], float]  # the joint latent shift of a set of replacements, always on the same noise
Key = tuple[str, str]  # operator and replacement
ALLOWANCE = 120  # sets that are measured, of which each costs as much as the score of one operator
PATIENCE = 24  # proposals in a row that may be no better, before the search ends
CHANGES = 3, 8  # the fewest and the most that a proposal may differ by: an edit out, two in; and a block for its parts
MISFIT = 0.25  # how far off a linear model of squared shifts is, for each change, as a share of them
LARGEST = 1e4  # times the squared joint shift: above it, harms are not told apart
FLOOR = 0.05  # of what the single score says: the least that an edit is taken to add


@dataclass(frozen=True, kw_only=True)
class Step:
    """A set of replacements and its joint latent shift."""

    chosen: Chosen
    shift: float


@dataclass(frozen=True, kw_only=True)
class Improved:
    """The best set that was found, what it cost to find, and every set that was the best for a while, the start first."""

    chosen: Chosen
    shift: float
    evaluations: int
    steps: tuple[Step, ...]


def improve(
    start: Chosen,
    operators: Operators,
    scores: Sequence[Score],
    targets: Mapping[Quantity, float],
    *,
    judge: Judge,
    priors: Priors = FREE,
    allowance: int = ALLOWANCE,
) -> Improved:
    """A set of replacements that is predicted to meet the targets and whose joint shift, by `judge`, is at most that of `start`.

    `judge` is asked for at most `allowance` sets, and for none twice. The same arguments give the same set.
    """
    return Improver.of(operators, scores, targets, judge=judge, priors=priors).improved(start, targets, allowance=allowance)


@dataclass(frozen=True, kw_only=True)
class Improver:
    """Improves plans of one denoiser; what was measured for one target is known when the next one is searched."""

    options: Mapping[Key, Option]
    judge: Judge
    nearby: Nearby
    known: dict[Keys, float] = field(default_factory=dict)  # sets that were measured, and their joint shifts

    @classmethod
    def of(
        cls, operators: Operators, scores: Sequence[Score], quantities: Iterable[Quantity], *, judge: Judge, priors: Priors = FREE
    ) -> Improver:
        options = options_of(operators, scores)
        nearby = Nearby(operators, options, priors=priors, quantities=quantities)
        return cls(options={option.score.key: option for option in options}, judge=judge, nearby=nearby)

    def improved(self, start: Chosen, targets: Mapping[Quantity, float], *, allowance: int = ALLOWANCE) -> Improved:
        """See `improve`."""
        before = len(self.known)
        steps = [Step(chosen=start, shift=self._shift(start))]
        for name in start:
            if len(self.known) - before < allowance:
                self._shift({other: candidate for other, candidate in start.items() if other != name})
        idle, changes = 0, max(CHANGES)
        while len(self.known) - before < allowance and idle < PATIENCE:
            proposed = self._proposed(steps[-1], targets, changes)
            if proposed is None and changes == max(CHANGES):
                break
            if proposed is None:
                changes = max(CHANGES)
                continue
            tried = Step(chosen=proposed, shift=self._shift(proposed))
            better = tried.shift < steps[-1].shift
            log.debug("%d changes allowed, shift %.4g: %s", changes, tried.shift, "taken" if better else "left")
            idle = 0 if better else idle + 1
            changes = max(CHANGES) if better or changes == min(CHANGES) else changes - 1
            steps += [tried] if better else []
        return Improved(chosen=steps[-1].chosen, shift=steps[-1].shift, evaluations=len(self.known) - before, steps=tuple(steps))

    def _shift(self, chosen: Chosen) -> float:
        keys = keys_of(chosen)
        if keys not in self.known:
            self.known[keys] = self.judge(chosen)
        return self.known[keys]

    def _proposed(self, best: Step, targets: Mapping[Quantity, float], changes: int) -> Chosen | None:
        """Of the sets near the best that meet the targets and are not measured, the one that is expected to shift least."""
        centre = keys_of(best.chosen)
        harms = contributions(self.options, centre, self.known)
        return self.nearby.least(harms, targets, centre=centre, changes=changes, known=self.known)


def keys_of(chosen: Chosen) -> Keys:
    return frozenset((name, candidate.replacement) for name, candidate in chosen.items())


def contributions(options: Mapping[Key, Option], centre: Keys, known: Mapping[Keys, float]) -> dict[Key, float]:
    """What each option adds to the squared joint shift of sets near `centre`, as what is known of them says.

    Of a set S, J(S)^2 - J(centre)^2 = sum of w over S without centre - sum of w over centre without S. What is known are such
    differences, each off by its misfit e; what single scores say is the prior, off by d; of all w the likeliest are
        w = m + D A' (A D A' + E)^-1 (y - A m),    D = diag(d^2), E = diag(e^2)
    with a row of A, of 1, -1 and 0, for each set: Bayes' rule for a linear model with Gaussian errors.
    """
    keys = list(options)
    base = known[centre] ** 2
    prior = _prior(options, centre, base)
    rows = [(np.array([(key in each) - float(key in centre) for key in keys]), shift**2) for each, shift in known.items()]
    rows = [(row, square) for row, square in rows if row.any()]
    if not rows:
        return dict(zip(keys, prior, strict=True))
    matrix = np.stack([row for row, _ in rows])
    squares = np.array([square for _, square in rows])
    doubt = (prior + base / max(1, len(centre))) ** 2
    misfit = (MISFIT * np.abs(matrix).sum(1) * (squares + base)) ** 2 + np.finfo(float).tiny
    spread = matrix * doubt
    learned = np.linalg.solve(spread @ matrix.T + np.diag(misfit), squares - base - matrix @ prior)
    return dict(zip(keys, np.maximum(prior + spread.T @ learned, FLOOR * prior), strict=True))


def _prior(options: Mapping[Key, Option], centre: Keys, base: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The squares of single scores, to the scale on which those of `centre` sum up to its squared joint shift."""
    squares = {key: min(max(option.score.score, 0.0), 1e15) ** 2 for key, option in options.items()}
    whole = sum(squares[key] for key in centre)
    scale = base / whole if whole else 1.0
    return np.array([min(scale * square, LARGEST * base) for square in squares.values()])
