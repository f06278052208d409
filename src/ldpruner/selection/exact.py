"""The replacements with the least sum of values that meet every budget, found as a mixed-integer program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ldpruner.errors import RunError
from ldpruner.plans import Candidate, Operators, Quantity, within
from ldpruner.quiet import printing_nothing
from ldpruner.selection.priors import Priors, stage_cost, stages, touches
from ldpruner.selection.rankings import Objective, Option

GRAIN = 1e-6  # shares that are saved are rounded down to multiples of it: whole numbers leave the solver nothing to round
FUZZ = 1e-5  # grains: what meets its target to the digit is not to miss it by how floats are rounded
EDIT = 1e-4  # what an edit costs beside its value, in medians of these: of sets that do alike the smaller one
LARGEST = 1e6  # medians, above which values are not told apart
NODES = 20_000  # of the search tree, after which the best set found is taken; a limit in seconds would give another one each time

Row = tuple[Mapping[int, float], float]  # coefficients by column, and what their sum is at most
Keys = frozenset[tuple[str, str]]  # options, each by its operator and its replacement


def solve(
    operators: Operators,
    options: Sequence[Option],
    targets: Mapping[Quantity, float],
    *,
    objective: Objective,
    priors: Priors,
) -> dict[str, Candidate]:
    """The replacement of each operator that goes: of all sets whose predicted costs meet the targets, the one of least harm.

    Targets are shares of what the original costs. A greedy rule overshoots them; this is the knapsack that it approximates, with
    several budgets at once. A block and its parts are never both replaced; what dies with a replacement is saved once, and is
    not replaced beside it. Where no set meets the targets: the one that saves most. Raises `RunError` where the solver gives up.
    """
    program = _Program(options, operators)
    rows = program.valid(priors, targets)
    budgets = program.budgets(targets)
    found = program.least(program.harms(objective), [*rows, *budgets])
    if found is None:
        savings = [coefficients for coefficients, _ in budgets]
        found = program.least([sum(row.get(column, 0.0) for row in savings) * GRAIN for column in range(program.columns)], rows)
    if found is None:
        raise RunError("no set of replacements was found: the solver gave up. Choose by another selection, such as order.")
    return program.chosen(found)


class Nearby:
    """What `solve` finds among the sets near one that is given, again and again for other harms and another centre."""

    def __init__(self, operators: Operators, options: Sequence[Option], *, priors: Priors, quantities: Iterable[Quantity]) -> None:
        self._program = _Program(options, operators)
        self._valid = self._program.valid(priors, quantities)

    def least(
        self,
        harms: Mapping[tuple[str, str], float],
        targets: Mapping[Quantity, float],
        *,
        centre: Keys,
        changes: int,
        known: Iterable[Keys] = (),
    ) -> dict[str, Candidate] | None:
        """Of the sets with at most so many `changes` against `centre`, the one of least harm that is not `known`.

        A change puts an option in or takes one out. None where no set is left that meets the targets.
        """
        program = self._program
        rows = [*self._valid, *program.budgets(targets), program.near(centre, changes)]
        rows += [program.other_than(each) for each in known if len(each ^ centre) <= changes]
        found = program.least(program.harms(Objective(value=lambda option: harms[option.score.key], power=1.0)), rows)
        return None if found is None else program.chosen(found)


@dataclass
class _Program:
    """One column for each option, then one for each operator that may die with one: whether it does."""

    options: Sequence[Option]
    operators: Operators
    mortal: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.mortal = sorted({name for option in self.options for name in option.candidate.dead})

    @property
    def columns(self) -> int:
        return len(self.options) + len(self.mortal)

    def harms(self, objective: Objective) -> list[float]:
        values = [objective.value(option) for option in self.options]
        median = float(np.median([each for each in values if each > 0] or [1.0]))
        return [min((each / median) ** objective.power, LARGEST) + EDIT for each in values] + [0.0] * len(self.mortal)

    def chosen(self, taken: Sequence[bool]) -> dict[str, Candidate]:
        return {option.operator.name: option.candidate for option, each in zip(self.options, taken, strict=False) if each}

    def valid(self, priors: Priors, quantities: Iterable[Quantity]) -> list[Row]:
        """What holds of every set, whatever it saves."""
        return [*self.nesting(), *self.deaths(), *self.placing(priors, list(quantities))]

    def budgets(self, targets: Mapping[Quantity, float]) -> list[Row]:
        return [self.budget(quantity, target) for quantity, target in targets.items()]

    def near(self, centre: Keys, changes: int) -> Row:
        """At most so many options are taken that are not in `centre`, or left that are."""
        return {place: -side for place, side in self._sides(centre)}, changes - float(len(centre))

    def other_than(self, known: Keys) -> Row:
        """At least one option is taken that is not in `known`, or left that is."""
        return dict(self._sides(known)), len(known) - 1.0

    def _sides(self, keys: Keys) -> Iterator[tuple[int, float]]:
        return ((place, 1.0 if option.score.key in keys else -1.0) for place, option in enumerate(self.options))

    def nesting(self) -> Iterator[Row]:
        """Of the options on a path from the denoiser down to one operator, at most one is taken."""
        for name in {option.operator.name for option in self.options}:
            yield dict.fromkeys(self._around(name), 1.0), 1.0

    def deaths(self) -> Iterator[Row]:
        """What dies needs a reason, lies in nothing that is gone already, and holds nothing that is replaced."""
        for column, name in enumerate(self.mortal, len(self.options)):
            reasons = [place for place, option in enumerate(self.options) if name in option.candidate.dead]
            yield {column: 1.0, **dict.fromkeys(reasons, -1.0)}, 0.0
            yield {column: 1.0, **dict.fromkeys(self._around(name), 1.0)}, 1.0
            inside = [place for place, option in enumerate(self.options) if within(option.operator.name, name)]
            yield from self._apart(reasons, inside)
            held = [other for other, inner in enumerate(self.mortal, len(self.options)) if inner != name and within(inner, name)]
            yield from self._apart([column], held)

    def placing(self, priors: Priors, quantities: Iterable[Quantity]) -> Iterator[Row]:
        """What the priors say of stages and their blocks."""
        for stage, blocks in stages(self.operators).items():
            touching = [[p for p, option in enumerate(self.options) if touches([option.operator.name], b)] for b in blocks]
            for place, here in enumerate(touching):
                if not priors.protect_ends <= place < len(blocks) - priors.protect_ends:
                    yield dict.fromkeys(here, 1.0), 0.0
                for there in touching[place + 1 : place + 1 + priors.apart]:
                    yield from self._apart(here, there)
            if priors.stage_cap < 1:
                yield dict.fromkeys(self._around(stage), 1.0), 0.0
                within_stage = [place for place, option in enumerate(self.options) if within(option.operator.name, stage)]
                for quantity in quantities:
                    whole = stage_cost(self.operators, stage, quantity)
                    yield {place: self._own(place, quantity) for place in within_stage}, priors.stage_cap * whole

    def budget(self, quantity: Quantity, target: float) -> Row:
        """At least so much is saved, in grains."""
        total = self.operators.total.of(quantity)
        saved = [self._own(place, quantity) for place in range(len(self.options))]
        saved += [self.operators[name].cost.of(quantity) for name in self.mortal]
        grains = {column: -float(math.floor(each / total / GRAIN + FUZZ)) for column, each in enumerate(saved)}
        return grains, -float(math.ceil((1 - target) / GRAIN - FUZZ))

    def least(self, costs: Sequence[float], rows: Sequence[Row]) -> list[bool] | None:
        """Which columns are taken at the least cost; None where no set fits the rows."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # takes a second to import
        from scipy.sparse import csr_array

        entries = [(row, column, value) for row, (held, _) in enumerate(rows) for column, value in held.items()]
        where, columns, values = zip(*entries, strict=True)
        matrix = csr_array((values, (where, columns)), shape=(len(rows), self.columns))
        limits = LinearConstraint(matrix, ub=np.array([limit for _, limit in rows]))
        with printing_nothing():
            found = milp(costs, constraints=limits, integrality=1, bounds=Bounds(0, 1), options={"node_limit": NODES})
        taken = np.zeros(self.columns) if found.x is None else np.round(found.x)
        within_limits = matrix @ taken <= limits.ub + 1e-6 * np.maximum(
            1.0, np.abs(limits.ub)
        )  # what is called optimal need not be
        return [bool(each) for each in taken] if found.x is not None and within_limits.all() else None

    def _own(self, place: int, quantity: Quantity) -> float:
        """What an option saves, without what dies with it."""
        option = self.options[place]
        return option.operator.cost.of(quantity) - option.candidate.cost.of(quantity)

    def _around(self, name: str) -> list[int]:
        """The options of operators that are `name` or hold it."""
        return [place for place, option in enumerate(self.options) if within(name, option.operator.name)]

    @staticmethod
    def _apart(some: Iterable[int], others: Iterable[int]) -> Iterator[Row]:
        """Nothing of the one is taken beside something of the other; what is in both is not taken at all."""
        for one, other in itertools.product(some, others):
            yield {one: 1.0, other: 1.0}, 1.0 if one != other else 0.0
