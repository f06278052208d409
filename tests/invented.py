"""Operators and scores that no model has, small enough to be checked by hand."""

from __future__ import annotations

from ldpruner.plans import Candidate, Cost, Operator, Operators, Score
from ldpruner.selection import Choice

ZERO = {"returns": [], "many": False}


def operator(name: str, ms: float, *replacements: str, dead: tuple[str, ...] = (), stand_in_ms: float = 0.0) -> Operator:
    """An operator that costs `ms` milliseconds, as many parameters, and twice as many MACs."""
    return Operator(
        name=name,
        kind="Conv2d",
        input_shape=(1,),
        output_shape=(1,),
        cost=Cost(params=int(ms), macs=int(2 * ms), latency_ms=ms),
        parent=None,
        candidates=tuple(
            Candidate(replacement=r, options=ZERO, cost=Cost(latency_ms=stand_in_ms if r == "pointwise" else 0.0), dead=dead)
            for r in replacements
        ),
        if_dead=ZERO,
    )


def operators(*given: Operator) -> Operators:
    return Operators(model="m", denoiser="D", total=Cost(params=100, macs=200, latency_ms=100.0), device="cpu", operators=given)


def scored(*values: tuple[str, str, float]) -> list[Score]:
    return [Score(operator=o, replacement=r, score=s, mean_shift=s, std_shift=0.0, seconds=0.0) for o, r, s in values]


def chosen(choice: Choice) -> list[str]:
    return [edit.operator for edit in choice.edits]
