"""What selection leaves alone because of where it stands, whatever its score says.

A score taken one operator at a time does not see how removals act together: at half of DiT-XL's layers, the choice of the
lowest loss recovers to an FID three to four times that of one which keeps both ends and spreads its cuts (TinyFusion,
arXiv 2412.01199, Table 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ldpruner.errors import BudgetError
from ldpruner.plans import Candidate, Operators, Quantity, outermost, within

Chosen = Mapping[str, Candidate]  # operator -> its replacement


@dataclass(frozen=True, kw_only=True)
class Priors:
    """Limits on where operators may go; the defaults limit nothing. Blocks and stages are those of `operators.stages`.

    `protect_ends` blocks at each end of every stage stay whole. `stage_cap` is the most that may go of a stage's own cost, as
    a share. `apart` blocks at least lie between two of a stage that are replaced, in part or in whole.
    """

    protect_ends: int = 0
    stage_cap: float = 1.0
    apart: int = 0

    def __post_init__(self) -> None:
        if self.protect_ends < 0 or self.apart < 0 or not 0 < self.stage_cap <= 1:
            raise BudgetError("priors: protect_ends and apart are 0 or more, stage_cap is above 0 and at most 1.")

    def allow(self, chosen: Chosen, operators: Operators, quantity: Quantity) -> bool:
        """Whether a set of replacements keeps within the limits."""
        if self == Priors():
            return True
        return all(
            self._well_placed(chosen, blocks) and self._under_cap(chosen, stage, operators, quantity)
            for stage, blocks in stages(operators).items()
        )

    def __str__(self) -> str:
        """What is limited, such as `protect_ends=1`; nothing where nothing is."""
        free = Priors()
        return ", ".join(f"{name}={value:g}" for name, value in vars(self).items() if value != getattr(free, name))

    def _well_placed(self, chosen: Chosen, blocks: list[str]) -> bool:
        touched = [place for place, block in enumerate(blocks) if touches(chosen, block)]
        inner = range(self.protect_ends, len(blocks) - self.protect_ends)
        return all(place in inner for place in touched) and all(b - a > self.apart for a, b in itertools.pairwise(touched))

    def _under_cap(self, chosen: Chosen, stage: str, operators: Operators, quantity: Quantity) -> bool:
        if self.stage_cap >= 1:
            return True
        if any(within(stage, name) for name in chosen):
            return False
        inside = [(operators[name].cost, candidate.cost) for name, candidate in chosen.items() if within(name, stage)]
        going = sum(cost.of(quantity) - added.of(quantity) for cost, added in inside)
        return going <= self.stage_cap * stage_cost(operators, stage, quantity)


def stages(operators: Operators) -> dict[str, list[str]]:
    """The blocks of every stage, in calling order."""
    found: dict[str, list[str]] = {}
    for operator in operators.operators:
        if operator.block and operator.block not in found.setdefault(operator.stage, []):
            found[operator.stage].append(operator.block)
    return found


def stage_cost(operators: Operators, stage: str, quantity: Quantity) -> float:
    """What the operators of a stage cost together."""
    costs = {operator.name: operator.cost.of(quantity) for operator in operators.operators if operator.stage == stage}
    return sum(costs[name] for name in outermost(costs))


def touches(chosen: Iterable[str], path: str) -> bool:
    """Whether something chosen is the path, lies in it or holds it."""
    return any(within(name, path) or within(path, name) for name in chosen)
