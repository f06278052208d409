"""Plans from scores, and how far each of them moves the latents beside another: what `scoring.py` compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldpruner.improving import improve
from ldpruner.judging import JointShift
from ldpruner.originals import Original
from ldpruner.pipelines import Pipeline
from ldpruner.planning import APART, IMPROVED_ON, JUDGED_ON
from ldpruner.plans import Edit, Quantity
from ldpruner.probes import Probe
from ldpruner.scoring import Run
from ldpruner.scoring.latent import distances, latent_shift
from ldpruner.selection import SWEEP, choice_of, choose, chosen_in, selections_of
from ldpruner.selection.choice import Chosen
from ldpruner.surgery import Fitted, pruned_view
from ldpruner.trajectories import counted


@dataclass(frozen=True, kw_only=True)
class Moves:
    """What edits make of the samples that judge plans."""

    reference: Tensor
    latents: Tensor

    @property
    def shift(self) -> float:
        """The joint latent shift."""
        return latent_shift(self.reference, self.latents)

    @property
    def movement(self) -> float:
        """The geometric mean of what samples move by, in which no single one counts for much."""
        return float(distances(self.reference, self.latents).clamp(min=1e-12).log().mean().exp())

    def beside(self, other: Moves) -> dict[str, Any]:
        """The shift as a multiple of another's, of all samples and of either half of them, and the same of movements."""
        halves = [self._of(part).shift / other._of(part).shift for part in torch.arange(len(self.reference)).chunk(2)]
        return {
            "joint_shift": self.shift,
            "to_paper": self.shift / other.shift,
            "to_paper_by_halves": halves,
            "movement": self.movement,
            "movement_to_paper": self.movement / other.movement,
        }

    def _of(self, drawn: Tensor) -> Moves:
        return Moves(reference=self.reference[drawn], latents=self.latents[drawn])


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Generations of the original by which plans are compared; nothing was scored or chosen on these samples."""

    pipeline: Pipeline
    probe: Probe
    reference: Tensor
    fitted: Fitted
    batch_size: int | None

    @classmethod
    def on(cls, pipeline: Pipeline, probe: Probe, fitted: Fitted, batch_size: int | None) -> Judge:
        reference = Original.of(pipeline).latents(probe, batch_size=batch_size)
        return cls(pipeline=pipeline, probe=probe, reference=reference, fitted=fitted, batch_size=batch_size)

    def moves(self, edits: Sequence[Edit]) -> Moves:
        with torch.inference_mode(), self.pipeline.with_denoiser(pruned_view(self.pipeline.denoiser, edits, self.fitted)):
            latents = self.pipeline.latents(self.probe, batch_size=self.batch_size)
        return Moves(reference=self.reference, latents=latents)


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """Plans from a run's scores that are chosen by their joint shift, for one share of the latency as operators' times predict it.

    As planning has it, but that no latency is measured: a plan by each ranking and objective, of which the one that shifts least
    is taken (`swept`); and that plan improved.
    """

    pipeline: Pipeline
    run: Run
    share: float

    def swept(self) -> tuple[str, Sequence[Edit], int]:
        """The selection that is taken, its edits, and the denoiser passes that it took to tell."""
        with counted(self.pipeline.denoiser) as passes:
            plans: dict[str, Sequence[Edit]] = {}
            for name in selections_of(SWEEP, self.run.scores):
                edits = choose(self.run.operators, self.run.scores, self.targets, selection=name).edits
                if edits not in plans.values():
                    plans[name] = edits
            judge = self._judge(JUDGED_ON, 3 * APART, next(iter(plans.values())))
            best = min(plans, key=lambda name: judge.of(plans[name], self.run.fitted))
        return best, plans[best], passes.count

    def improved(self, edits: Sequence[Edit]) -> tuple[Sequence[Edit], list[float], int]:
        """The edits of a plan, improved; the shifts on the way as the search saw them; and the passes that it took."""
        operators, scores = self.run.operators, self.run.scores
        with counted(self.pipeline.denoiser) as passes:
            judge = self._judge(IMPROVED_ON, 2 * APART, edits)

            def shift(chosen: Chosen) -> float:
                return judge.of(choice_of(chosen, operators, scores, {}).edits, self.run.fitted)

            found = improve(chosen_in(edits, operators), operators, scores, self.targets, judge=shift)
        better = choice_of(found.chosen, operators, scores, {}).edits
        return better, [step.shift for step in found.steps], passes.count

    def _judge(self, samples: int, apart: int, edits: Sequence[Edit]) -> JointShift:
        seed = self.run.probe.seed + apart
        judge = JointShift.on(self.pipeline, self.run.probe, samples=samples, seed=seed, batch_size=None)
        return judge.tamed(edits, self.run.fitted)

    @property
    def targets(self) -> dict[Quantity, float]:
        return {"latency": self.share}
