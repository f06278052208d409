"""What a student is to minimise; every term is a mean over samples, so that a batch may be cut among processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldpruner.recovery.batches import Batch
from ldpruner.recovery.conditioning import first_tensor
from ldpruner.recovery.settings import Distillation
from ldpruner.recovery.taps import tapped

Terms = dict[str, Tensor]


def squared_error(answer: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared difference, in float32."""
    return (answer.float() - wanted.float()).square().mean()


def feature_error(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], scale: str) -> Tensor:
    """mean over taps and samples of |s - t|^2 / |t|^2, the norm mean-square; without the division for scale `none`.

    BK-SDM (arXiv 2305.15798) adds up plain errors over stages; LAPTOP-Diff (arXiv 2404.11098) divides by the teacher's norm.
    We divide sample by sample, so that the loss of a batch does not depend on how processes share it, and average over taps:
    plans have a few of them or a hundred, and the weight should mean the same.
    """
    errors = []
    for path, feature in teacher.items():
        wanted = feature.float().flatten(1)
        error = (student[path].float().flatten(1) - wanted).square().mean(1)
        if scale == "teacher":
            error = error / wanted.square().mean(1).clamp(min=1e-12)
        errors.append(error.mean())
    return torch.stack(errors).mean()


def guided(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """u + g (c - u), away from the weak answer u through the strong one c.

    Classifier-free guidance where the weak one has no prompt (arXiv 2207.12598, equation 6 with g = 1 + w); autoguidance where
    it comes from a worse model of the same kind (Karras et al., arXiv 2406.02507). All are `(n, ...)`; the result is float32.
    """
    return weak.float() + scale * (strong.float() - weak.float())


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What one batch teaches: every loss that has a weight."""

    teacher: nn.Module
    taps: tuple[str, ...]
    settings: Distillation
    guidance_scale: float
    accelerator: Accelerator
    guide: nn.Module | None = None  # a worse model than the teacher, whose answers the teacher's are moved away from

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        """The losses `task`, `output`, `feature` and `guidance`, unweighted, as far as they count, and their weighted `loss`.

        `student` may be wrapped, as accelerate wraps it.
        """
        weights, samples = self.weights(), len(batch.target)
        answer, features = _answer(student, self.accelerator.unwrap_model(student), batch, self.taps)
        terms = {"task": squared_error(answer[:samples], batch.target)} if "task" in weights else {}
        if weights.keys() - {"task"}:
            with torch.no_grad(), self.accelerator.autocast():
                wanted, known = _answer(self.teacher, self.teacher, batch, self.taps)
                if self.guide is not None:
                    weak, _ = _answer(self.guide, self.guide, batch, ())
                    wanted = guided(weak, wanted, self.settings.autoguidance_scale)
            if "output" in weights:
                terms["output"] = squared_error(answer[:samples], wanted[:samples])
            if "feature" in weights:
                terms["feature"] = feature_error(features, known, self.settings.feature_scale)
            if "guidance" in weights:
                both = [guided(each[samples:], each[:samples], self.guidance_scale) for each in (answer, wanted)]
                terms["guidance"] = squared_error(*both)
        return terms | {"loss": torch.stack([weights[name] * term for name, term in terms.items()]).sum()}

    def weights(self) -> dict[str, float]:
        """The weight of every loss that counts; features do where there are taps."""
        given = {name: getattr(self.settings, f"{name}_weight") for name in ("task", "output", "feature", "guidance")}
        return {name: weight for name, weight in given.items() if weight and (name != "feature" or self.taps)}


def _answer(model: nn.Module, bare: nn.Module, batch: Batch, taps: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    with tapped(bare, taps) as features:
        answer = first_tensor(batch.call.run(model))
    return answer, features
