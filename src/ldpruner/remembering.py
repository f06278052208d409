"""What text encoders answered, remembered: while edits are scored, the same prompts are asked again for each of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ldpruner.files import cache_folder
from ldpruner.operators.timing import device_of
from ldpruner.originals import kept, module_digest
from ldpruner.pipelines import Pipeline


@contextmanager
def encoding_once(pipeline: Pipeline) -> Iterator[None]:
    """While the block runs, a text encoder that was asked the same before, in any run, gives the same answer, not computed anew."""
    with ExitStack() as stack:
        for name, part in pipeline.pipe.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                own = {key: value for key, value in vars(part).items() if key == "forward"}  # offloading puts one there
                part.__dict__["forward"] = _remembering(part)
                stack.callback(part.__dict__.update, own)
                stack.callback(part.__dict__.pop, "forward")
        yield


def _remembering(encoder: nn.Module) -> Callable[..., Any]:
    """Its forward pass, with a memory, and one on disk by its content."""
    forward, answers = encoder.forward, dict[str, Any]()
    folder = functools.cache(lambda: cache_folder() / "prompts" / module_digest(encoder)[:32])  # hashed once it is asked

    def remembered(*args: Any, **kwargs: Any) -> Any:
        question = _digest((args, kwargs))
        if question not in answers:
            with torch.no_grad():
                answers[question] = kept(folder(), [question], lambda: forward(*args, **kwargs), device_of(encoder))
        return answers[question]

    return remembered


def _digest(asked: Any) -> str:
    """SHA-256 of all that is asked, the contents of tensors included."""
    leaves, structure = tree_flatten(asked)
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        digest.update(f"{leaf.shape} {leaf.dtype} {leaf.device}".encode() if isinstance(leaf, Tensor) else repr(leaf).encode())
        if isinstance(leaf, Tensor):
            digest.update(leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
