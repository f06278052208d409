"""The paper's score where it decides something, and cheaper measurements where they tell as much."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ldpruner.errors import LDPrunerError, RunError
from ldpruner.memory import within_memory
from ldpruner.operators.tracing import Call
from ldpruner.plans import Edit, Operators, Score
from ldpruner.probes import Probe
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.beliefs import FLOOR, Belief, beliefs
from ldpruner.scoring.latent import BROKEN, Statistics, shifts, tamed
from ldpruner.scoring.ledger import Key, Measure, key_of
from ldpruner.scoring.screen import screened
from ldpruner.scoring.side_by_side import every, side_by_side, split, tiled
from ldpruner.scoring.teacher_forced import answers, mean_squared_error
from ldpruner.selection import choose
from ldpruner.surgery import trial

log = logging.getLogger(__name__)

CLEAR = 2.0  # doubts from every cut at which a score is clear
AT_ONCE = 16  # edits that are measured before beliefs are formed anew, whatever the number of processes


@SCORERS.register("fast")
@dataclass(frozen=True, kw_only=True)
class FastScorer(Scorer):
    """The paper's order for a small share of its cost: all edits are screened, and only what is not clear is measured better.

    Four rungs. *Screen*: the first-order change of the output, all edits at once (`screen.ScreenScorer`). *Output*: its shift by
    the paper's formula, on inputs that the original met. Both look at `watched` samples, each at one of `timesteps` steps, in turn:
    another sample tells more than another step of the same, above all where each has a prompt of its own. Either is of what
    guidance makes of the output, where calls are guided. Then latents on shared noise, of `few` samples and of twice as many, by
    the paper's formula with one change: no sample counts as moved by more than `FAR` times the median. One that turns into another
    picture moves farther than all others together; which ones do is chance, and of a few samples the formula says little else.
    Edits that were measured on two rungs tell how one follows from the other: that carries every value to the last rung, so that
    scores are compared at equal sample counts, gives it a doubt, and says how much a few samples count against the outputs of many
    (`beliefs.beliefs`).

    The cut of a target is the highest score among edits that the paper's order takes to meet it. An edit is clear when it lies
    `CLEAR` doubts from every cut, or another replacement of its operator clearly does less harm and saves as much. Of the rest,
    those nearest to each cut go up one rung, until all are clear or on the last one, or `allowance` is spent: denoiser passes of
    one sample, per edit on average, where a backward pass counts as two. What would be taken, and was screened only, goes up
    before all others: to first order, scaling what a normalisation reads changes nothing, so that taking it away seems harmless.

    The ladder, the limit and the race are ours; to judge by outputs is LAPTOP-Diff's way (arXiv 2404.11098), the formula is
    LD-Pruner's (arXiv 2404.11936).
    """

    budgeted: ClassVar[bool] = True
    few: int = 8
    watched: int = 48
    timesteps: int = 4
    projections: int = 4
    allowance: float = 40.0

    def cost(self, edits: int, probe: Probe) -> int:
        """The most denoiser passes of one sample that so many edits cost, a backward pass as two; guidance doubles them.

        So one process that is not stopped: another, or a run that goes on, makes the few latents of an edit again.
        """
        return max(self.fixed(probe), math.floor(self.allowance * edits))

    def fixed(self, probe: Probe) -> int:
        """What is spent before the first edit is measured by itself: the original's latents and calls, and the screen."""
        _, many = self.samples(probe)
        seen = self.seen(probe)
        return (seen + many) * probe.num_inference_steps + seen * (2 + 2 * self.projections)

    def seen(self, probe: Probe) -> int:
        """Samples whose calls the first two rungs look at, each at one timestep."""
        return min(self.watched, probe.samples)

    def samples(self, probe: Probe) -> tuple[int, int]:
        """Of the two rungs of latents; the same twice where the probe has no more."""
        few = max(2, min(self.few, math.ceil(probe.samples / 2)))  # the paper's formula has a standard deviation
        return few, min(2 * few, probe.samples)

    def calls(self, asked: Asked, copies: int) -> list[tuple[int, Call]]:
        """Steps and calls that the original makes there, each sample in one of them; rows are `copies` times all samples."""
        probe = replace(asked.probe, samples=self.seen(asked.probe))
        steps = min(self.timesteps, probe.num_inference_steps, probe.samples // 2)  # a standard deviation at each
        found, before = list[tuple[int, Call]](), 0
        for number, call in enumerate(asked.original.spread_calls(probe, steps, batch_size=asked.batch_size)):
            step = number % steps  # all of one batch, then of the next
            part = every(call, steps, (step - before) % steps, copies=copies)
            found += [(step, part)] if part.batch else []
            before += call.batch // copies if step == steps - 1 else 0
        return found

    def few_samples(self, probe: Probe) -> int:
        return self.samples(probe)[0]

    def scores(self, asked: Asked) -> Iterator[Score]:
        began = time.perf_counter()
        race = _Race.begun(self, asked)
        while going := race.unclear():
            race.send_up(going)
        believed, errors = race.beliefs(), race.errors()
        seconds = (time.perf_counter() - began) / len(asked.edits)
        for edit in asked.edits:
            yield race.score(edit, believed[key_of(edit)], errors[key_of(edit)], seconds=seconds)


@dataclass(kw_only=True)
class _Race:
    """Edits on their rungs, and how those that decide something are sent up one."""

    scorer: FastScorer
    asked: Asked
    operators: Operators
    steps: list[int]  # at which the original makes these calls
    calls: list[Call]
    copies: int  # rows of a call for each sample
    known: list[Tensor]  # its answers at each of these steps, guided where calls are
    guidance_scale: float | None  # where calls are guided
    reference: Tensor  # the original's latents, of many samples
    samples: tuple[int, int]
    rungs: list[dict[Key, float]]  # screen, output, latents of few samples, and of many where there are more
    spent: int
    terms: dict[Key, tuple[float, float]] = field(default_factory=dict)  # of the paper's score, on the highest rung
    measured: dict[Key, float] = field(default_factory=dict)  # the output's error, of edits on the second rung and above
    latents: dict[Key, Tensor] = field(default_factory=dict)  # of few samples, by edits that this process measured

    @classmethod
    def begun(cls, scorer: FastScorer, asked: Asked) -> _Race:
        """With all edits on the first rung. Raises `RunError` where it is not told what edits save."""
        if asked.operators is None:
            raise RunError("the fast way needs to know what operators cost. Score by scoring.score, which tells.")
        few, many = scorer.samples(asked.probe)
        reference = asked.original.latents(replace(asked.probe, samples=many), batch_size=asked.batch_size)
        copies = asked.pipeline.call(asked.probe).batch
        steps, calls = map(list, zip(*scorer.calls(asked, copies), strict=True))
        scale = asked.pipeline.guidance_scale(asked.probe) if calls[0].guided else None  # tiled, all of them would look guided

        def screen(size: int) -> dict[Key, float]:
            parts = [part for call in calls for part in split(call, size, copies=copies)]
            return screened(asked, parts, projections=scorer.projections, guidance_scale=scale)

        values = within_memory(screen, max(call.batch // copies for call in calls))  # a backward pass needs more than a forward
        return cls(
            scorer=scorer,
            asked=asked,
            operators=asked.operators,
            steps=steps,
            calls=calls,
            copies=copies,
            known=by_step(steps, answers(asked.pipeline.denoiser, calls, guidance_scale=scale)),
            guidance_scale=scale,
            reference=reference,
            samples=(few, many),
            rungs=[asked.crew.leaders(values), {}, {}, *([{}] if many > few else [])],
            spent=scorer.fixed(asked.probe),
        )

    def beliefs(self) -> dict[Key, Belief]:
        return beliefs(self.rungs, sampled=len(self.rungs) - 2)

    def unclear(self) -> list[Edit]:
        """The edits that are measured next; none where the race is over, or what is left of the allowance is too little."""
        believed = self.beliefs()
        waiting = [edit for edit in self.asked.edits if key_of(edit) not in self.rungs[-1] and self._matters(edit, believed)]
        taken = self._taken(believed)
        cuts = [math.log(max(scores.values(), default=FLOOR)) for scores in taken]
        found = {key_of(edit): edit for edit in self.asked.edits if self._only_screened(edit, taken)}
        for cut in cuts if not found else ():
            gaps = {key_of(edit): gap(believed[key_of(edit)], cut) for edit in waiting}
            near = [edit for edit in waiting if gaps[key_of(edit)] < CLEAR]
            near.sort(key=lambda edit: gaps[key_of(edit)])
            found |= {key_of(edit): edit for edit in near[: math.ceil(AT_ONCE / len(cuts))]}
        costs = itertools.accumulate(self._cost(self._next(edit)) for edit in found.values())
        left = self.scorer.allowance * len(self.asked.edits) - self.spent
        return [edit for edit, cost in zip(found.values(), costs, strict=True) if cost <= left]

    def send_up(self, edits: Sequence[Edit]) -> None:
        """Measure each on the rung above its highest."""
        by_rung: dict[int, list[Edit]] = {}
        for edit in edits:
            by_rung.setdefault(self._next(edit), []).append(edit)
        measures = {1: self._output_errors, 2: self._shifts_of_few, 3: self._shifts_of_many}
        for rung, going in sorted(by_rung.items()):
            measure = functools.partial(self._at_once, measures[rung])
            kind = "outputs" if rung == 1 else self._names()[rung]  # as "output" older folders hold another number
            found = self.asked.ledger.measured(kind, going, measure, at_once=self._together(rung))
            if rung == 1:
                self.rungs[1] |= {key: shift for key, (shift, _) in found.items()}
                self.measured |= {key: error for key, (_, error) in found.items()}
            else:
                self.rungs[rung] |= {key: sum(values) for key, values in found.items()}
                self.terms |= {key: (mean, std) for key, (mean, std) in found.items()}
            self.spent += self._cost(rung) * len(going)

    def _next(self, edit: Edit) -> int:
        return max(place for place, rung in enumerate(self.rungs) if key_of(edit) in rung) + 1

    def _cost(self, rung: int) -> int:
        """Denoiser passes of one sample to measure one edit there."""
        (few, many), steps = self.samples, self.asked.probe.num_inference_steps
        return {1: self.scorer.seen(self.asked.probe), 2: few * steps, 3: (many - few) * steps}[rung]

    def _together(self, rung: int) -> int:
        """How many edits share a call there."""
        samples = max(call.batch // self.copies for call in self.calls) if rung == 1 else self.samples[0]
        return max(1, self.asked.edits_at_once * self.samples[0] // samples)

    def _names(self) -> tuple[str, ...]:
        few, many = self.samples
        return ("screen", "output", f"latents of {few}", f"latents of {many}")

    def errors(self) -> dict[Key, float]:
        """The error of the output, where it was not measured as the screen tells it."""
        return {key: math.exp(belief.mean) for key, belief in beliefs([self.rungs[0], self.measured]).items()}

    def score(self, edit: Edit, belief: Belief, error: float, *, seconds: float) -> Score:
        mean, std = self.terms.get(key_of(edit), (None, None))
        return Score(
            operator=edit.operator,
            replacement=edit.replacement,
            score=min(math.exp(min(belief.mean, HIGHEST)), BROKEN),
            mean_shift=mean,
            std_shift=std,
            output_error=min(error, BROKEN),
            seconds=seconds,
            judged=self._names()[belief.rung],
            doubt=belief.doubt,
        )

    def _taken(self, believed: Mapping[Key, Belief]) -> list[dict[Key, float]]:
        """For every target what the paper's order takes, and its scores."""
        scores = [self.score(edit, believed[key_of(edit)], 0.0, seconds=0.0) for edit in self.asked.edits]
        choices = (choose(self.operators, scores, target) for target in self.asked.targets)
        return [
            {(edit.operator, edit.replacement): max(edit.score, FLOOR) for edit in choice.edits if edit.score is not None}
            for choice in choices
        ]

    def _only_screened(self, edit: Edit, taken: Sequence[Mapping[Key, float]]) -> bool:
        key = key_of(edit)
        return key not in self.rungs[1] and any(key in each for each in taken)

    def _matters(self, edit: Edit, believed: Mapping[Key, Belief]) -> bool:
        """Whether it saves something that is asked for, and no other replacement of the operator is better beyond doubt."""
        operator = self.operators[edit.operator]
        mine, here = operator.candidate(edit.replacement), believed[key_of(edit)]
        quantities = {quantity for target in self.asked.targets for quantity in target}
        if all(mine.cost.of(quantity) >= operator.cost.of(quantity) for quantity in quantities):
            return False
        for other in operator.candidates:
            there = believed.get((operator.name, other.replacement))
            cheaper = all(other.cost.of(quantity) <= mine.cost.of(quantity) for quantity in quantities)
            if other != mine and there and cheaper and here.mean - there.mean > CLEAR * math.hypot(here.doubt, there.doubt):
                return False
        return True

    def _at_once(self, measure: Measure, edits: Sequence[Edit]) -> list[list[float]]:
        """What `measure` gives of edits that share denoiser calls; one by one where that does not run."""
        if len(edits) > 1:
            try:
                return list(measure(edits))
            except (LDPrunerError, RuntimeError, ValueError, TypeError) as error:  # no memory, or outputs without rows
                log.info("%d edits do not go through one call: %s", len(edits), error)
        return [numbers for edit in edits for numbers in measure([edit])]

    def _output_errors(self, edits: Sequence[Edit]) -> list[list[float]]:
        calls = [tiled(call, len(edits), copies=self.copies) for call in self.calls]
        with self._changed(edits):
            made = answers(self.asked.pipeline.denoiser, calls, guidance_scale=self.guidance_scale)
        copies = self.copies if self.guidance_scale is None else 1
        apart = [output.reshape(copies, len(edits), -1, *output.shape[1:]) for output in made]
        return [self._of_output([output[:, place].flatten(0, 1) for output in apart]) for place in range(len(edits))]

    def _of_output(self, answered: Sequence[Tensor]) -> list[float]:
        """How far answers shift by the paper's formula, root mean square over steps, and their root mean squared error."""
        made = by_step(self.steps, answered)
        terms = [shifts(Statistics.of(known), Statistics.of(other)) for known, other in zip(self.known, made, strict=True)]
        shift = math.sqrt(sum((mean + std) ** 2 for mean, std in terms) / len(terms))
        error = mean_squared_error(self.known, made) ** 0.5
        return [min(shift, BROKEN), error if math.isfinite(error) else BROKEN]

    def _shifts_of_few(self, edits: Sequence[Edit]) -> list[list[float]]:
        made = self._generated(edits, range(self.samples[0]))
        self.latents |= {key_of(edit): latents for edit, latents in zip(edits, made, strict=True)}
        return [self._terms(latents) for latents in made]

    def _shifts_of_many(self, edits: Sequence[Edit]) -> list[list[float]]:
        few, many = self.samples
        missing = [edit for edit in edits if key_of(edit) not in self.latents]  # another process, or an earlier run, has it
        if missing:
            self._shifts_of_few(missing)
        others = self._generated(edits, range(few, many))
        whole = [torch.cat([self.latents[key_of(edit)], latents]) for edit, latents in zip(edits, others, strict=True)]
        for edit in edits:
            del self.latents[key_of(edit)]
        return [self._terms(latents) for latents in whole]

    def _terms(self, latents: Tensor) -> list[float]:
        reference = self.reference[: len(latents)]
        return list(shifts(Statistics.of(reference), Statistics.of(tamed(reference, latents))))

    def _generated(self, edits: Sequence[Edit], rows: Sequence[int]) -> Sequence[Tensor]:
        """The latents of these samples by each edit."""
        with torch.inference_mode(), self._changed(edits):
            made = self.asked.pipeline.latents(self.asked.probe, rows=[*rows] * len(edits), batch_size=self.asked.batch_size)
        return made.chunk(len(edits))

    def _changed(self, edits: Sequence[Edit]) -> AbstractContextManager[object]:
        """The denoiser with one edit, or with several, each for its part of a call's samples."""
        denoiser, fitted = self.asked.pipeline.denoiser, self.asked.fitted
        if len(edits) == 1:
            return trial(denoiser, edits, fitted=fitted)
        return side_by_side(denoiser, edits, copies=self.copies, fitted=fitted)


HIGHEST = math.log(BROKEN)


def by_step(steps: Sequence[int], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of each step, samples of all batches together."""
    return [torch.cat([output for at, output in zip(steps, outputs, strict=True) if at == step]) for step in sorted(set(steps))]


def gap(belief: Belief, cut: float) -> float:
    """How many doubts a score is from a cut."""
    return abs(belief.mean - cut) / max(belief.doubt, FLOOR)
