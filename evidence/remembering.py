"""A teacher that is asked the same by every student, and answers from memory the second time.

Distillation draws its batches from the seed and the step alone, so that students of one seed see the same noisy latents.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ldpruner.operators.tracing import weights_digest
from ldpruner.recovery.conditioning import first_tensor


def remembering(denoiser: nn.Module, folder: Path) -> Any:
    """A copy that keeps in `folder` what it answers without gradients; it gives tuples."""
    folder = folder / weights_digest(denoiser)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    kind: Any = type(denoiser)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() or any(tensor.is_meta for tensor in given):
            return (first_tensor(kind.forward(self, *args, **kwargs)),)
        digest = hashlib.sha256()
        for tensor in given:
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file = folder / f"{digest.hexdigest()[:32]}.safetensors"
        if not file.exists():
            answer = first_tensor(kind.forward(self, *args, **kwargs)).contiguous()
            scratch = file.with_suffix(".partial")
            save_file({"answer": answer.cpu()}, scratch)
            scratch.replace(file)
        return (load_file(file)["answer"].to(given[0].device),)

    copied = copy.deepcopy(denoiser)
    copied.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return copied
