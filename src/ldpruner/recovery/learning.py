"""One step after another: gradients, AdamW, a schedule, a moving average, and the state that a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldpruner.errors import RunError
from ldpruner.recovery.batches import Batches
from ldpruner.recovery.checkpoints import Checkpoint
from ldpruner.recovery.losses import Lesson
from ldpruner.recovery.settings import Distillation
from ldpruner.recovery.trainable import Learner


class Learning:
    """A student on its way."""

    def __init__(
        self, learner: Learner, settings: Distillation, *, lesson: Lesson, batches: Batches, accelerator: Accelerator
    ) -> None:
        self.settings, self.lesson, self.batches, self.accelerator = settings, lesson, batches, accelerator
        self.parameters: dict[str, nn.Parameter] = learner.parameters()
        self.average = EMAModel(self.parameters.values(), decay=settings.ema_decay, foreach=True) if settings.use_ema else None
        self.bare_optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.rate_factor = _schedule(settings)
        self.model, self.optimizer = accelerator.prepare(learner.denoiser, self.bare_optimizer)
        self.model.eval()

    def step(self, step: int) -> dict[str, float]:
        """Move the weights once; every loss, and the learning rate. Raises `RunError` where a loss or gradient is not finite."""
        terms = self._gradients(step)
        self._check_finite(step, terms["loss"], "loss")
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        if self.accelerator.scaler is None:  # with one, it skips a step that overflowed
            self._check_finite(step, float(norm), "gradient")
        rate = self.settings.learning_rate * self.rate_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step(self.parameters.values())
        return terms | {"lr": rate}

    def _gradients(self, step: int) -> dict[str, float]:
        """Add up the gradients of the step's batches; its losses, averaged over batches and processes."""
        parts = self.settings.gradient_accumulation_steps
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(self.batches.of_step(step, self.accelerator.process_index)):
            last = number + 1 == parts
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                terms = self.lesson.terms(self.model, batch)
                self.accelerator.backward(terms["loss"] / parts)
            totals = {name: totals.get(name, 0) + term.detach() / parts for name, term in terms.items()}
        averaged: Any = self.accelerator.reduce(torch.stack(list(totals.values())), reduction="mean")
        return dict(zip(totals, averaged.tolist(), strict=True))

    def _check_finite(self, step: int, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise RunError(
                f"step {step + 1}: the {what} is {value}; the checkpoints before it are kept. "
                f"Lower the learning rate of {self.settings.learning_rate:g}, or use bf16 or no mixed precision."
            )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that decides how it goes on, by name, sharing memory with the live state."""
        named: dict[str, Tensor] = {f"student.{name}": parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            named |= {f"optimizer.{name}.{key}": value for key, value in self.bare_optimizer.state[parameter].items()}
        if self.average is not None:
            named |= {f"average.{name}": value for name, value in zip(self.parameters, self.average.shadow_params, strict=True)}
        return named

    def facts(self) -> dict[str, Any]:
        """The state of the scaler of fp16's losses, where there is one."""
        return {"scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None}

    @torch.no_grad()
    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take up the state of a checkpoint. Raises `RunError` where it is damaged."""
        for parameter in self.parameters.values():
            self.bare_optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        checkpoint.fill(self.tensors())
        if self.average is not None:
            self.average.optimization_step = checkpoint.step
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.facts()["scaler"])

    def finish(self) -> None:
        """Put the moving average, if there is one, in the place of the weights, and take accelerate's wrapping off."""
        if self.average is not None:
            self.average.copy_to(self.parameters.values())
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


def _schedule(settings: Distillation) -> Any:
    """The factor of the learning rate by step, without a scheduler's state: a resumed run has the same."""
    name = "constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler
    idle = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=settings.learning_rate or 1.0)
    schedule = get_scheduler(
        name, idle, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=settings.max_train_steps
    ).lr_lambdas[0]
    return lambda step: schedule(step + 1 if step < settings.lr_warmup_steps else step)  # the first step moves something too
