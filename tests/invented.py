"""Operators and scores that no model has, small enough to be checked by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ldpruner.plans import Candidate, Cost, Operator, Operators, Score, within
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


def denoiser(seed: int) -> tuple[Operators, list[Score]]:
    """Blocks with parts in two stages, some with two replacements, some with a part elsewhere that dies with them."""
    draw = random.Random(seed)
    found = []
    for number in range(4):
        stage, block = f"s{number // 2}", f"s{number // 2}.{number}"
        parts = [f"{block}.{part}" for part in "pq"]
        feeder = draw.choice([f"s{n // 2}.{n}.q" for n in range(4) if n != number])
        found += [
            operator(block, draw.randint(12, 20), "identity"),
            operator(parts[0], draw.randint(2, 6), "identity", "pointwise", stand_in_ms=1.0, dead=draw.choice([(), (feeder,)])),
            operator(parts[1], draw.randint(2, 6), *draw.choice([(), ("zero",)])),
        ]
        found[-3:] = [replace(each, stage=stage, block=block) for each in found[-3:]]
    model = operators(*found)
    pairs = [(o.name, c.replacement, draw.uniform(0.1, 3.0)) for o, c in model.pairs()]
    return model, [replace(entry, output_error=draw.uniform(0.1, 3.0)) for entry in scored(*pairs)]


def sets(model: Operators) -> Iterator[Mapping[str, Candidate]]:
    """Every set of replacements that may stand together."""
    ways = [[None, *o.candidates] for o in model.operators if o.candidates]
    names = [o.name for o in model.operators if o.candidates]
    for picked in itertools.product(*ways):
        taken = {name: candidate for name, candidate in zip(names, picked, strict=True) if candidate}
        dead = [name for candidate in taken.values() for name in candidate.dead]
        nested = any(within(a, b) for a, b in itertools.permutations(taken, 2))
        if not nested and not any(within(name, gone) for name in taken for gone in dead):
            yield taken
