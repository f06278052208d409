"""Errors of a changed denoiser on inputs that the original met: nothing builds up from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ldpruner.operators.tracing import Call, tensors_in


@torch.inference_mode()
def answers(denoiser: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """What a denoiser makes of calls, float32."""
    return [tensors_in(call.run(denoiser))[0].float() for call in calls]


def mean_squared_error(reference: Sequence[Tensor], changed: Iterable[Tensor]) -> float:
    """sum (r - c)^2 / count over all numbers of all calls."""
    total = sum(float((mine - other).square().sum()) for mine, other in zip(reference, changed, strict=True))
    return total / sum(tensor.numel() for tensor in reference)
