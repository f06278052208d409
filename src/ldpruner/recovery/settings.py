"""How a pruned student learns from its teacher. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ldpruner.errors import RunError, UnknownNameError, suggest

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PRECISIONS = ("no", "fp16", "bf16")
LATEST = "latest"

# What may differ between a checkpoint and the run that goes on from it: none of it changes what is learnt. The samples of
# one step are compared as a whole, so that a run may go on with other processes and smaller batches.
_FREE = {
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
}


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Losses, their weights, and how they are minimised; argument names are those of diffusers' training scripts.

    The weights 1, 1, 1 of task, output and feature loss, and the learning rate, are BK-SDM's (arXiv 2305.15798). Dividing
    a feature's error by the teacher's feature is LAPTOP-Diff's (arXiv 2404.11098): without it, the deepest blocks, whose
    numbers are largest, drown the rest. Both papers keep the rate constant; we let it fall, which suits short runs.
    """

    max_train_steps: int = 5000
    train_batch_size: int = 16  # samples of one forward pass in one process
    gradient_accumulation_steps: int = 1  # forward passes of one step
    learning_rate: float = 5e-5
    lr_scheduler: str = "linear"  # a name of diffusers' `get_scheduler`; each of them warms up, `constant` too
    lr_warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    feature_scale: Literal["teacher", "none"] = "teacher"  # what a feature's squared error is divided by
    guidance_weight: float = 0.0
    guidance_scale: float | None = None  # of the guidance loss; None: the pipeline's usual
    autoguidance_scale: float = 1.5  # of a guide, see `distil`; 1: as if there were none
    prompt_dropout: float = 0.1  # the share of prompts replaced by "", for classifier-free guidance
    use_ema: bool = False  # the moving average of the weights is the result
    ema_decay: float = 0.9999  # its limit; it begins at (1 + step) / (10 + step)
    lora_rank: int | None = None  # None: the weights themselves learn
    freeze: tuple[str, ...] = ()  # dotted paths of the denoiser
    freeze_before_first_edit: bool = False
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None  # `latest`, or a folder; None: begin, and refuse where checkpoints lie
    report_to: str | None = None  # a tracker of accelerate, such as tensorboard

    def __post_init__(self) -> None:
        for name, least in (("max_train_steps", 1), ("train_batch_size", 1), ("gradient_accumulation_steps", 1), ("seed", 0),
                            ("checkpointing_steps", 1), ("lr_warmup_steps", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise RunError(f"{name}={getattr(self, name)}: {least} or more is needed.")
        for name in ("lora_rank", "checkpoints_total_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RunError(f"{name}={getattr(self, name)}: 1 or more is needed.")
        for name in ("task_weight", "output_weight", "feature_weight", "guidance_weight", "learning_rate", "max_grad_norm",
                     "autoguidance_scale"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise RunError(f"{name}={getattr(self, name)}: a number from 0 up is needed.")
        for name in ("prompt_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise RunError(f"{name}={getattr(self, name)}: a share from 0 to 1 is needed.")
        if not any((self.task_weight, self.output_weight, self.feature_weight, self.guidance_weight)):
            raise RunError("every loss has weight 0: nothing would be learnt. Give one of them a weight.")
        for name, known in (("lr_scheduler", SCHEDULES), ("mixed_precision", PRECISIONS), ("feature_scale", ("teacher", "none"))):
            if getattr(self, name) not in known:
                raise UnknownNameError(f"{name}={getattr(self, name)!r} is unknown: {suggest(getattr(self, name), known)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"freeze": list(self.freeze)}

    def learnt_by(self, processes: int) -> dict[str, Any]:
        """What decides the outcome: equal for a checkpoint and for whoever goes on from it."""
        kept = {name: value for name, value in self.to_json().items() if name not in _FREE}
        if self.lr_scheduler.startswith("constant"):
            del kept["max_train_steps"]  # nothing depends on how long such a run is meant to be
        return kept | {"samples_per_step": self.samples_per_step(processes)}

    def samples_per_step(self, processes: int) -> int:
        """How many samples the weights move on, all processes together."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes
