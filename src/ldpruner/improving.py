"""From a plan by scores of single operators to one whose edits do less harm together.

What an edit adds to the joint latent shift depends on the edits beside it: it may be harmless alone and harmful together with
others, or make up for them. So a plan is changed a little, measured as a whole, and learned from. The square of the joint
shift is taken to be linear in the edits near the best plan so far; an exact program gives the plan near it that this model
likes most of those not measured yet; what is measured then corrects the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ldpruner.plans import Operators, Quantity, Score
from ldpruner.selection import Option, Priors, options_of, predict, share
from ldpruner.selection.choice import FREE, Chosen
from ldpruner.selection.exact import Keys, Nearby

Judge = Callable[[Chosen], float]  # the joint latent shift of a set of replacements, always on the same noise
Key = tuple[str, str]  # operator and replacement
ALLOWANCE = 120  # sets that are measured, of which each costs as much as the score of one operator
PATIENCE = 24  # proposals in a row that may be no better, before the search ends
FEWEST, MOST = 3, 8  # edits by which a proposal may differ from the best set, in turn: one out and two in; a block for its parts
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
    """Every set that was the best for a while, the start first and the best of all last, and what they cost to find."""

    steps: tuple[Step, ...]
    evaluations: int

    @property
    def chosen(self) -> Chosen:
        return self.steps[-1].chosen

    @property
    def shift(self) -> float:
        return self.steps[-1].shift


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
    return Improver.of(operators, scores, targets, judge=judge, priors=priors).improved([start], targets, allowance=allowance)


@dataclass(frozen=True, kw_only=True)
class Improver:
    """Improves plans of one denoiser; what was measured for one target is known when the next one is searched."""

    operators: Operators
    options: Mapping[Key, Option]
    nearby: Nearby
    judge: Judge
    known: dict[Keys, float]  # sets that were measured, and their joint shifts

    @classmethod
    def of(
        cls,
        operators: Operators,
        scores: Sequence[Score],
        quantities: Iterable[Quantity],
        *,
        judge: Judge,
        priors: Priors = FREE,
        known: dict[Keys, float] | None = None,
    ) -> Improver:
        """`known` holds what was measured before, by the same judge, and is added to."""
        options = options_of(operators, scores)
        return cls(
            operators=operators,
            options={option.score.key: option for option in options},
            nearby=Nearby(operators, options, priors=priors, quantities=quantities),
            judge=judge,
            known={} if known is None else known,
        )

    def improved(self, starts: Sequence[Chosen], targets: Mapping[Quantity, float], *, allowance: int = ALLOWANCE) -> Improved:
        """See `improve`; from the best of the starts, of which one that misses the targets gives way to a set near it."""
        before, steps = len(self.known), [self._first(starts, targets)]
        if before <= len(steps[0].chosen):  # little is known of what each edit adds beside the others
            self._leave_each_out(steps[0].chosen, allowance - 1)
        idle, changes = 0, MOST
        while len(self.known) - before < allowance and idle < PATIENCE:
            best = steps[-1]
            proposed = self._proposed(best, targets, changes) or self._proposed(best, targets, MOST)
            if proposed is None:
                break
            tried = self._measured(proposed)
            better = tried.shift < best.shift
            steps += [tried] if better else []
            idle = 0 if better else idle + 1
            changes = MOST if better or changes == FEWEST else changes - 1
        return Improved(steps=tuple(steps), evaluations=len(self.known) - before)

    def _first(self, starts: Sequence[Chosen], targets: Mapping[Quantity, float]) -> Step:
        measured = [self._measured(start) for start in starts]
        near = [step.chosen if self._meets(step.chosen, targets) else self._proposed(step, targets, MOST) for step in measured]
        return min([self._measured(chosen) for chosen in near if chosen] or measured, key=lambda step: step.shift)

    def _leave_each_out(self, chosen: Chosen, most: int) -> None:
        for name in list(chosen)[:most]:
            self._measured({other: candidate for other, candidate in chosen.items() if other != name})

    def _measured(self, chosen: Chosen) -> Step:
        keys = keys_of(chosen)
        if keys not in self.known:
            self.known[keys] = self.judge(chosen)
        return Step(chosen=chosen, shift=self.known[keys])

    def _meets(self, chosen: Chosen, targets: Mapping[Quantity, float]) -> bool:
        left, total = predict(self.operators, chosen), self.operators.total
        return all(share(left, total, quantity) <= target + 1e-9 for quantity, target in targets.items())

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
    sets = [each for each in known if each != centre]
    if not sets:
        return dict(zip(keys, prior, strict=True))
    matrix = np.array([[(key in each) - float(key in centre) for key in keys] for each in sets])
    squares = np.array([min(known[each] ** 2, LARGEST * base) for each in sets])
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
