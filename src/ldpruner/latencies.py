"""How long plans take on one device, learned from those that were measured there. No torch.

Hooks time modules one by one, and misjudge some kinds of them: what a plan saves is then off by several percent. What plans
were measured to save corrects the times: a plan's saving is the sum of what its operators spend, less what their stand-ins do,
so that measured plans are the rows of a linear regression on the times, and the hooks' times are where it starts from. What stays
may take another time too, where its tensors come to lie otherwise in memory (see `operators.layouts`): that is learned beside.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldpruner.errors import ArtifactError
from ldpruner.files import append_json_line, cache_folder, read_json_lines
from ldpruner.plans import Candidate, Edit, Operator, Operators, Score, within
from ldpruner.record import Measurement
from ldpruner.selection.choice import choose, predict_edits, share

log = logging.getLogger(__name__)

DEAD = "dead"  # in the place of a replacement, of an operator that was taken away because nothing read it

# How far hooks are trusted, as standard deviations; those that are shares are of an operator's own time.
WHOLE = 0.1  # share by which all times are off alike
KIND = 0.3  # share by which those of one kind are, beside that
OWN = 0.3  # and each operator's, beside that
STAND_IN = 0.25  # of the mean own time: what every stand-in takes that hooks do not see
MISFIT = 0.01  # share of a plan's time that neither a sum of times nor the spread of its own readings can tell

LEAST, MOST = 0.4, 0.95  # predicted latency of random plans
SPREAD = 1.253 / 1.349  # standard error of a median, times the root of n, to the interquartile range, of normal readings


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The latency of a plan, pruned / original: the median of `pairs` pairs of calls, and their interquartile range."""

    edits: tuple[tuple[str, str], ...]  # operators with their replacement, or with `DEAD`
    relaid: tuple[tuple[str, bool], ...] = ()  # modules whose input lies otherwise than before, and whether it is contiguous now
    ratio: float
    pairs: int
    spread: float

    @classmethod
    def of(cls, edits: Iterable[Edit], measured: Measurement, relaid: Mapping[str, bool]) -> Reading:
        made = tuple((edit.operator, DEAD if edit.reason == "dead" else edit.replacement) for edit in edits)
        return cls(edits=made, relaid=tuple(relaid.items()), ratio=measured.value, pairs=measured.n, spread=measured.spread)

    @property
    def variance(self) -> float:
        """Of the ratio about what a sum of times can tell."""
        return (SPREAD * self.spread) ** 2 / self.pairs + (MISFIT * self.ratio) ** 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reading:
        edits = tuple((str(operator), str(replacement)) for operator, replacement in data["edits"])
        relaid = tuple((str(module), bool(now)) for module, now in data["relaid"])
        ratio, pairs, spread = float(data["ratio"]), int(data["pairs"]), float(data["spread"])
        return cls(edits=edits, relaid=relaid, ratio=ratio, pairs=pairs, spread=spread)


@dataclass
class Readings:
    """All readings of one architecture in one place, kept in a file that only ever grows."""

    path: Path | None = None  # None: they are kept nowhere
    held: list[Reading] = field(default_factory=list)

    @classmethod
    def kept(cls, where: Mapping[str, Any], cache: Path | None = None) -> Readings:
        """What was read where all of `where` was the same: architecture, device, threads, dtype, shapes, versions."""
        digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()
        path = (cache or cache_folder()) / "latencies" / f"{digest[:32]}.jsonl"
        try:
            held = [Reading.from_json(line) for line in read_json_lines(path)]
        except (OSError, ArtifactError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: the latencies kept there cannot be read (%s). They are measured anew, and kept nowhere.", path, error)
            return cls()
        return cls(path=path, held=held)

    def add(self, reading: Reading) -> None:
        """Hold one more, and keep it where the disk lets us."""
        self.held.append(reading)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_json_line(self.path, reading.to_json())
        except (OSError, ArtifactError) as error:
            log.warning("latencies are kept for this run only: %s", error)
            self.path = None


def random_plans(operators: Operators, count: int, seed: int = 0) -> Iterator[tuple[Edit, ...]]:
    """Edits drawn at random, `count` times: their predicted latencies fill the range from `LEAST` to `MOST` evenly.

    The same seed draws the same. What only dies jointly is not among them.
    """
    drawn = random.Random(seed)
    targets = [LEAST + (MOST - LEAST) * (place + 0.5) / count for place in range(count)]
    drawn.shuffle(targets)
    for target in targets:
        scores = [Score(operator=o.name, replacement=c.replacement, score=drawn.random(), seconds=0) for o, c in operators.pairs()]
        yield choose(operators, scores, {"latency": target}, selection="order").edits


@dataclass(frozen=True, kw_only=True)
class Times:
    """Operators with the times that readings explain, and what other layouts change of them."""

    operators: Operators
    contiguous_ms: Mapping[str, float] = field(default_factory=dict)  # saved where an operator's input becomes contiguous

    def latency(self, edits: Iterable[Edit], relaid: Mapping[str, bool]) -> float:
        """The predicted share of the original's latency that is left, with modules `relaid`."""
        saved = sum(self.contiguous_ms.get(module, 0.0) * (1 if now else -1) for module, now in relaid.items())
        total = self.operators.total
        return share(predict_edits(self.operators, edits), total, "latency") - saved / total.latency_ms


def learned(operators: Operators, readings: Sequence[Reading]) -> Times:
    """The times, of operators and of their stand-ins, that explain what was measured.

    Bayesian linear regression in closed form: times are normal about the hooks' with covariance K (see `_Parts`), and measured
    savings normal about the sums of times. Times add up as before: that of a block is that of its parts and of its own. Readings
    of operators that are not among these tell nothing. What would take less than no time takes none, and the others explain what
    is left. Without readings nothing changes.
    """
    parts = _Parts(operators)
    told = [reading for reading in readings if parts.know(reading)]
    if not told or not operators.total.latency_ms:
        return Times(operators=operators)
    rows = np.array([parts.row(reading) for reading in told])
    savings = np.array([1 - reading.ratio for reading in told])
    noise = np.diag([reading.variance for reading in told])
    free = np.ones(len(parts.kinds), dtype=bool)
    while True:
        found = _explaining(parts.means * free, parts.covarying(rows * free) * free[:, None], rows, savings, noise)
        if (found[~parts.of_layouts] >= 0).all():
            return parts.times(found)
        free &= (found > 0) | parts.of_layouts


def _explaining(mean: Any, shared: Any, rows: Any, savings: Any, noise: Any) -> Any:
    """E[t | y] = m + K X' (X K X' + N)^-1 (y - X m), for times t ~ N(m, K) and savings y ~ N(X t, N); `shared` is K X'."""
    found: Any = mean + shared @ np.linalg.solve(rows @ shared + noise, savings - rows @ mean)
    return found


class _Parts:
    """What a call's time is made of, as shares of it: what each operator spends outside of those in it, each stand-in, and what
    each operator saves where its input becomes contiguous.

    Of two parts of the sizes a and b, times covary by WHOLE² ab, where they are of one kind by KIND² ab more, and the time of one
    part varies by OWN² a² more: hooks may misjudge all, a kind, or one. Kinds of operators are their classes, of stand-ins their
    names. Times of stand-ins covary by (STAND_IN × the mean size)² besides: a call of each. What a layout saves is nothing, until
    readings tell, and covaries as the times of the operators do, and not with them.
    """

    def __init__(self, operators: Operators) -> None:
        self.operators = operators
        names = [operator.name for operator in operators.operators]
        pairs = operators.pairs()
        self.places = {name: place for place, name in enumerate(names)}
        self.inside = {name: [place for place, other in enumerate(names) if within(other, name)] for name in names}
        self.stand_ins = {(o.name, c.replacement): len(names) + number for number, (o, c) in enumerate(pairs)}
        classes = [operator.kind for operator in operators.operators]
        self.kinds = np.array(
            [*classes, *(f"-> {c.replacement}" for _, c in pairs), *(f"{kind}, laid otherwise" for kind in classes)]
        )
        own = self._own()
        self.sizes = np.array([*own, *(self._own_of(o, c) for o, c in pairs), *own]) / (operators.total.latency_ms or math.inf)
        self.of_layouts = np.arange(len(self.kinds)) >= len(names) + len(pairs)
        self.means = np.where(self.of_layouts, 0.0, self.sizes)

    def _own(self) -> list[float]:
        """Milliseconds of each operator outside of the operators in it."""
        own = {operator.name: operator.cost.latency_ms for operator in self.operators.operators}
        for operator in self.operators.operators:
            if operator.parent:
                own[operator.parent] -= operator.cost.latency_ms
        return [max(taken, 0.0) for taken in own.values()]

    def _own_of(self, operator: Operator, candidate: Candidate) -> float:
        """Milliseconds of a stand-in outside of the operators that it keeps."""
        return 0.0 if self._kept(operator.name, candidate) else candidate.cost.latency_ms

    def _kept(self, operator: str, candidate: Candidate) -> list[int]:
        """The parts of an operator that its stand-in keeps: a shortcut has one of its children."""
        return self.inside.get(f"{operator}.{candidate.options.get('child')}", []) if candidate.replacement == "shortcut" else []

    def know(self, reading: Reading) -> bool:
        """Whether all that was replaced is among the operators."""
        return all(o in self.places and (r == DEAD or (o, r) in self.stand_ins) for o, r in reading.edits)

    def row(self, reading: Reading) -> Any:
        """How often the time of each part is saved: once where it is gone, -1 times where it came."""
        counted = np.zeros(len(self.kinds))
        for module, now in reading.relaid:
            if module in self.places:
                counted[self.places[module] - len(self.places)] = 1 if now else -1
        for name, replacement in reading.edits:
            counted[self.inside[name]] += 1
            if replacement != DEAD:
                operator = self.operators.operators[self.places[name]]
                counted[self._kept(name, operator.candidate(replacement))] -= 1
                counted[self.stand_ins[name, replacement]] -= 1
        return counted

    def covarying(self, rows: Any) -> Any:
        """K X', for readings X, `(readings, parts)`. K itself has the square of thousands of parts, and is never made."""
        sizes, alike = self.sizes[:, None], np.unique(self.kinds, return_inverse=True)[1]
        weighted, stands_in = sizes * rows.T, np.isin(np.arange(len(self.kinds)), list(self.stand_ins.values()))
        call = STAND_IN * self.sizes[: len(self.places)].mean()
        shared = WHOLE**2 * _summed(weighted, self.of_layouts.astype(int)) + KIND**2 * _summed(weighted, alike)
        of_calls = call**2 * _summed(rows.T, stands_in.astype(int)) * stands_in[:, None]
        return sizes * (shared + OWN**2 * weighted) + of_calls

    def times(self, shares: Any) -> Times:
        """What shares of the whole call's time come to."""
        taken = shares * self.operators.total.latency_ms
        contiguous = {name: float(taken[place - len(self.places)]) for name, place in self.places.items()}
        return Times(operators=self._operators_with(taken), contiguous_ms=contiguous)

    def _operators_with(self, taken: Any) -> Operators:
        def with_time(operator: Operator) -> Operator:
            candidates = tuple(_costing(each, self._time(operator.name, each, taken)) for each in operator.candidates)
            costing: Operator = _costing(operator, taken[self.inside[operator.name]].sum())
            return replace(costing, candidates=candidates)

        return replace(self.operators, operators=tuple(map(with_time, self.operators.operators)))

    def _time(self, operator: str, candidate: Candidate, taken: Any) -> float:
        kept = taken[self._kept(operator, candidate)].sum()
        return float(kept + taken[self.stand_ins[operator, candidate.replacement]])


def _summed(values: Any, groups: Any) -> Any:
    """In the place of each row, the sum of the rows of its group; groups have numbers from 0 on."""
    sums = np.zeros((groups.max() + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums[groups]


def _costing(part: Any, latency_ms: float) -> Any:
    """An operator or a candidate that takes another time."""
    return replace(part, cost=replace(part.cost, latency_ms=float(latency_ms)))
