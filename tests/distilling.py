"""A tiny student, how it is taught in a few steps, and what came of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldpruner import Distillation, Edit, Plan
from ldpruner.operators.tracing import architecture, weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators
from ldpruner.probes import Probe
from ldpruner.recovery.latents import FIRST_SEED
from ldpruner.surgery import prune

CHOSEN = {
    "down_blocks.1.resnets.0": "shortcut",
    "mid_block.attentions.0": "identity",
    "up_blocks.0.attentions.0.to_out.0": "zero",
}
SHORT = Distillation(max_train_steps=4, train_batch_size=4, learning_rate=1e-3, lr_warmup_steps=1, checkpointing_steps=2)
FEW = Probe(samples=6, num_inference_steps=2, seed=FIRST_SEED)
FLAGS = {"--samples": 6, "--steps": 2, "--max_train_steps": 4, "--train_batch_size": 4, "--learning_rate": 1e-3,
         "--lr_warmup_steps": 1, "--checkpointing_steps": 2}  # fmt: skip


def flags(**changed: Any) -> list[str]:
    """The command line of `SHORT` and `FEW`, and what is changed of it."""
    given = FLAGS | {f"--{name}": value for name, value in changed.items()}
    return [str(word) for pair in given.items() for word in pair]


def pruned(pipeline: Pipeline, chosen: dict[str, str], operators: Operators) -> Pipeline:
    """The pipeline around a denoiser without these operators."""
    edits = tuple(
        Edit(operator=name, replacement=replacement, options=operators[name].candidate(replacement).options)
        for name, replacement in chosen.items()
    )
    plan = Plan(model=architecture(pipeline.denoiser), denoiser=type(pipeline.denoiser).__name__, edits=edits)
    pipe = copy.copy(pipeline.pipe)
    setattr(pipe, pipeline.component, prune(pipeline.denoiser, plan))
    return Pipeline(pipe, source="student")


def log_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return weights_digest(one) == weights_digest(other)


def changed_weights(before: nn.Module, after: nn.Module) -> set[str]:
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, old), new in pairs if not torch.equal(old, new)}


def captioned_folder(folder: Path) -> Path:
    """Six pictures: four of split `train`, red or blue, and two of split `test`."""
    folder.mkdir()
    lines = []
    for number in range(6):
        colour = (255, 0, 0) if number % 2 else (0, 0, 255)
        Image.new("RGB", (9, 12), colour).save(folder / f"{number}.png")
        entry = {"file_name": f"{number}.png", "text": "red" if number % 2 else "blue", "style": "flat"}
        lines.append(json.dumps(entry | {"split": "train" if number < 4 else "test"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
