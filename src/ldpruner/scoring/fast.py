"""The paper's score where it decides something, and cheaper measurements where they tell as much."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldpruner.errors import RunError
from ldpruner.memory import within_memory
from ldpruner.operators.tracing import Call
from ldpruner.plans import Edit, Operators, Score
from ldpruner.probes import Probe
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.beliefs import FLOOR, Belief, beliefs
from ldpruner.scoring.latent import BROKEN, Statistics, shifts
from ldpruner.scoring.ledger import Key, key_of
from ldpruner.scoring.screen import screened
from ldpruner.scoring.teacher_forced import answers, mean_squared_error
from ldpruner.selection import choose
from ldpruner.surgery import trial

CLEAR = 2.0  # doubts from every cut at which a score is clear
AT_ONCE = 16  # edits that are measured before beliefs are formed anew, whatever the number of processes


@SCORERS.register("fast")
@dataclass(frozen=True, kw_only=True)
class FastScorer(Scorer):
    """The paper's order for a small share of its cost: all edits are screened, and only what is not clear is measured better.

    Four rungs. *Screen*: the first-order change of the output, all edits at once (`screen.ScreenScorer`). *Output*: its error on
    inputs that the original met, at `timesteps` steps of `few` samples. Then latents, by the paper's formula on shared noise, of
    `few` samples and of twice as many. Edits that were measured on two rungs tell how one follows from the other: that carries
    every value to the last rung, so that scores are compared at equal sample counts, and gives it a doubt (`beliefs.beliefs`).

    The cut of a target is the highest score among edits that the paper's order takes to meet it. An edit is clear when it lies
    `CLEAR` doubts from every cut, or another replacement of its operator clearly does less harm and saves as much. Of the rest,
    those nearest to each cut go up one rung, until all are clear or on the last one, or `allowance` is spent: denoiser passes of
    one sample, per edit on average, where a backward pass counts as two.

    Scores are on the scale of the paper's for the last rung's samples. The ladder and the race are ours; its second rung is
    LAPTOP-Diff's criterion (arXiv 2404.11098), its last ones are LD-Pruner's (arXiv 2404.11936).
    """

    budgeted: ClassVar[bool] = True
    few: int = 8
    timesteps: int = 4
    projections: int = 2
    allowance: float = 36.0

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
    calls: list[Call]
    known: list[Tensor]  # the original's answers to them
    references: tuple[Statistics, Statistics]  # of few latents, and of many
    samples: tuple[int, int]
    rungs: list[dict[Key, float]]  # screen, output, latents of few samples, and of many where there are more
    spent: int
    terms: dict[Key, tuple[float, float]] = field(default_factory=dict)  # of the paper's score, on the highest rung
    latents: dict[Key, Tensor] = field(default_factory=dict)  # of few samples, by edits that this process measured

    @classmethod
    def begun(cls, scorer: FastScorer, asked: Asked) -> _Race:
        """With all edits on the first rung. Raises `RunError` where it is not told what edits save."""
        if asked.operators is None:
            raise RunError("the fast way needs to know what operators cost. Score by scoring.score, which tells.")
        few = max(2, min(scorer.few, math.ceil(asked.probe.samples / 2)))  # one has no standard deviation
        many, steps = min(2 * few, asked.probe.samples), asked.probe.num_inference_steps
        original = asked.original.latents(replace(asked.probe, samples=many), batch_size=asked.batch_size)

        def screen(size: int) -> tuple[list[Call], dict[Key, float]]:
            calls = asked.original.spread_calls(replace(asked.probe, samples=few), scorer.timesteps, batch_size=size)
            return calls, screened(asked, calls, projections=scorer.projections)

        calls, values = within_memory(screen, min(few, asked.batch_size or few))  # a backward pass needs more than a forward
        return cls(
            scorer=scorer,
            asked=asked,
            operators=asked.operators,
            calls=calls,
            known=answers(asked.pipeline.denoiser, calls),
            references=(Statistics.of(original[:few]), Statistics.of(original)),
            samples=(few, many),
            rungs=[asked.crew.leaders(values), {}, {}, *([{}] if many > few else [])],
            spent=(few + many) * steps + few * scorer.timesteps * (2 + 2 * scorer.projections),
        )

    def beliefs(self) -> dict[Key, Belief]:
        return beliefs(self.rungs)

    def unclear(self) -> list[Edit]:
        """The edits that are measured next; none where the race is over."""
        if self.spent >= self.scorer.allowance * len(self.asked.edits):
            return []
        believed = self.beliefs()
        waiting = [edit for edit in self.asked.edits if key_of(edit) not in self.rungs[-1] and self._matters(edit, believed)]
        cuts, found = self._cuts(believed), dict[Key, Edit]()
        for cut in cuts:
            gaps = [(gap(believed[key_of(edit)], cut), edit) for edit in waiting]
            near = sorted((entry for entry in gaps if entry[0] < CLEAR), key=lambda entry: entry[0])
            found |= {key_of(edit): edit for _, edit in near[: math.ceil(AT_ONCE / len(cuts))]}
        return list(found.values())

    def send_up(self, edits: Sequence[Edit]) -> None:
        """Measure each on the rung above its highest."""
        by_rung: dict[int, list[Edit]] = {}
        for edit in edits:
            by_rung.setdefault(max(place for place, rung in enumerate(self.rungs) if key_of(edit) in rung) + 1, []).append(edit)
        few, many = self.samples
        for rung, going in sorted(by_rung.items()):
            name, cost, measure = {
                1: ("output", few * self.scorer.timesteps, self._output_error),
                2: (f"latents of {few}", few * self.asked.probe.num_inference_steps, self._shift_of_few),
                3: (f"latents of {many}", (many - few) * self.asked.probe.num_inference_steps, self._shift_of_many),
            }[rung]
            found = self.asked.ledger.measured(name, going, measure)
            self.rungs[rung] |= {key: sum(values) for key, values in found.items()}
            self.terms |= {key: (values[0], values[1]) for key, values in found.items() if len(values) == 2}
            self.spent += cost * len(going)

    def errors(self) -> dict[Key, float]:
        """The error of the output, where it was not measured as the screen tells it."""
        return {key: math.exp(belief.mean) for key, belief in beliefs(self.rungs[:2]).items()}

    def score(self, edit: Edit, belief: Belief, error: float, *, seconds: float) -> Score:
        mean, std = self.terms.get(key_of(edit), (None, None))
        few, many = self.samples
        return Score(
            operator=edit.operator,
            replacement=edit.replacement,
            score=min(math.exp(min(belief.mean, HIGHEST)), BROKEN),
            mean_shift=mean,
            std_shift=std,
            output_error=min(error, BROKEN),
            seconds=seconds,
            judged=("screen", "output", f"latents of {few}", f"latents of {many}")[belief.rung],
            doubt=belief.doubt,
        )

    def _cuts(self, believed: Mapping[Key, Belief]) -> list[float]:
        """For every target the logarithm of the highest score that the paper's order takes."""
        scores = [self.score(edit, believed[key_of(edit)], 0.0, seconds=0.0) for edit in self.asked.edits]
        choices = (choose(self.operators, scores, target) for target in self.asked.targets)
        highest = (max((edit.score for edit in choice.edits if edit.score is not None), default=0.0) for choice in choices)
        return [math.log(max(value, FLOOR)) for value in highest]

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

    def _output_error(self, edit: Edit) -> list[float]:
        with self._changed(edit) as denoiser:
            error = mean_squared_error(self.known, answers(denoiser, self.calls)) ** 0.5
        return [error if math.isfinite(error) else BROKEN]

    def _shift_of_few(self, edit: Edit) -> list[float]:
        self.latents[key_of(edit)] = made = self._generated(edit, self.asked.probe, self.samples[0])
        return list(shifts(self.references[0], Statistics.of(made)))

    def _shift_of_many(self, edit: Edit) -> list[float]:
        few, many = self.samples
        first = self.latents.pop(key_of(edit), None)
        if first is None:  # another process, or an earlier run, has it
            first = self._generated(edit, self.asked.probe, few)
        others = self._generated(edit, shifted(self.asked.probe, few), many - few)
        return list(shifts(self.references[1], Statistics.of(torch.cat([first, others]))))

    def _generated(self, edit: Edit, probe: Probe, samples: int) -> Tensor:
        with torch.inference_mode(), self._changed(edit):
            return self.asked.pipeline.latents(replace(probe, samples=samples), batch_size=self.asked.batch_size)

    def _changed(self, edit: Edit) -> AbstractContextManager[nn.Module]:
        return trial(self.asked.pipeline.denoiser, [edit], fitted=self.asked.fitted)


HIGHEST = math.log(BROKEN)


def gap(belief: Belief, cut: float) -> float:
    """How many doubts a score is from a cut."""
    return abs(belief.mean - cut) / max(belief.doubt, FLOOR)


def shifted(probe: Probe, samples: int) -> Probe:
    """The probe of the samples that come after so many: other noise, and the prompts that they take."""
    turned = samples % max(1, len(probe.prompts))
    return replace(probe, seed=probe.seed + samples, prompts=probe.prompts[turned:] + probe.prompts[:turned])
