"""How far edits move the latents, all together, on samples of which none was scored on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldpruner.originals import Original
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit
from ldpruner.probes import Probe
from ldpruner.scoring.latent import FAR, distances, latent_shift, within_reach
from ldpruner.surgery import Fitted, pruned_view


@dataclass(frozen=True, kw_only=True)
class JointShift:
    """Judges edits by the latents that they make of the same noise as the original's, `reference`.

    With a `limit`, a sample counts as moved by at most that. A pruned model turns few samples into other pictures, by chance and
    far; of some tens of samples, the shift is mostly these, and says little of the next ones.
    """

    pipeline: Pipeline
    probe: Probe
    reference: Tensor
    batch_size: int | None
    limit: float | None = None

    @classmethod
    def on(cls, pipeline: Pipeline, probe: Probe, *, samples: int, seed: int, batch_size: int | None) -> JointShift:
        """The probe's generations of so many samples from other noise."""
        probe = replace(pipeline.varied(probe), samples=samples, seed=seed)
        reference = Original.of(pipeline).latents(probe, batch_size=batch_size)
        return cls(pipeline=pipeline, probe=probe, reference=reference, batch_size=batch_size)

    def of(self, edits: Sequence[Edit], fitted: Fitted) -> float:
        """The joint latent shift."""
        latents = self._latents(edits, fitted)
        return latent_shift(self.reference, latents if self.limit is None else within_reach(self.reference, latents, self.limit))

    def tamed(self, edits: Sequence[Edit], fitted: Fitted) -> JointShift:
        """The same judge with a limit: `FAR` times the median of what these edits move the samples by."""
        moved = distances(self.reference, self._latents(edits, fitted))
        limit = FAR * float(moved.median())
        return replace(self, limit=limit if 0 < limit < math.inf else None)

    def _latents(self, edits: Sequence[Edit], fitted: Fitted) -> Tensor:
        with torch.inference_mode(), self.pipeline.with_denoiser(pruned_view(self.pipeline.denoiser, edits, fitted)):
            return self.pipeline.latents(self.probe, batch_size=self.batch_size)
