"""One training loop for every network of the zoo: resumable to the bit, logged, with an exponential moving average."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from ldpruner.errors import RunError
from ldpruner.files import append_json_line, read_json_lines, write_text

Loss = Callable[[nn.Module, torch.Generator, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast one network learns: AdamW, linear warm-up, a constant rate, then a linear decay to zero.

    Until the decay begins, a run does not depend on `steps`: a run may be lengthened or shortened on the way.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 4e-4
    warmup_steps: int = 200
    decay: float = 0.3  # the share of the steps over which the rate falls
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    checkpoint_every: int = 250
    seed: int = 0


def train(module: nn.Module, loss: Loss, training: Training, folder: Path) -> nn.Module:
    """Train `module` and return its moving average; go on from `folder` where an earlier run stopped.

    `loss(module, generator, step)` draws its own batch from the generator, which depends on the seed and the step alone:
    a resumed run sees the batches that an unbroken one would have seen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _State(module, training)
    first = state.load(folder / "checkpoint.safetensors")
    log = folder / "log.jsonl"
    _cut_log(log, first)
    module.train()
    began = time.monotonic()
    for step in (bar := tqdm(range(first, training.steps), initial=first, total=training.steps, desc=folder.name, mininterval=5)):
        value = state.step(loss, step)
        if (step + 1) % 50 == 0 or step + 1 == training.steps:
            recent = float(value)
            bar.set_postfix(loss=f"{recent:.4f}")
            append_json_line(log, {"step": step + 1, "loss": recent, "seconds": round(time.monotonic() - began, 1)})
        if (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps:
            state.save(folder / "checkpoint.safetensors", step + 1)
    averaged: nn.Module = state.average.module
    return averaged.eval()


class _State:
    """A network, its average and its optimiser: what a checkpoint holds."""

    def __init__(self, module: nn.Module, training: Training) -> None:
        self.module = module
        self.training = training
        self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(training.ema_decay))  # type: ignore[no-untyped-call]
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.99), fused=True
        )

    def step(self, loss: Loss, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.training.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * _schedule(step, self.training)
        value = loss(self.module, generator, step)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.module)
        return value.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, sharing memory with the live state."""
        named = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        named |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            named |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return named

    def save(self, path: Path, step: int) -> None:
        scratch = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, scratch, {"step": str(step)})
        scratch.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> int:
        if not path.exists():
            return 0
        for parameter in self.module.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        with safe_open(path, framework="pt") as stored:
            try:
                for name, tensor in self.tensors().items():
                    tensor.copy_(stored.get_tensor(name))
            except (SafetensorError, RuntimeError) as error:
                raise RunError(f"{path}: is the checkpoint of another network. Name another folder with --work.") from error
            return int(stored.metadata()["step"])


def _schedule(step: int, training: Training) -> float:
    rising = (step + 1) / training.warmup_steps
    falling = (training.steps - step) / (training.decay * training.steps)
    return min(1.0, rising, falling)


def _cut_log(log: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run goes on from."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    kept = [line for line, entry in zip(lines, read_json_lines(log), strict=False) if entry["step"] <= step]
    write_text(log, "".join(kept))


def draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` row numbers below `count`, with repeats."""
    return torch.randint(0, count, (size,), generator=generator)
