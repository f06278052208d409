"""Errors of a changed denoiser on inputs that the original met: nothing builds up from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ldpruner.operators.tracing import Call
from ldpruner.operators.watching import tensors_in


@torch.inference_mode()
def answers(denoiser: nn.Module, calls: Sequence[Call], *, guidance_scale: float | None = None) -> list[Tensor]:
    """What a denoiser makes of calls, float32; with a scale, what guidance makes of the halves of calls that have them."""
    return [steered(tensors_in(call.run(denoiser))[0].float(), call, guidance_scale) for call in calls]


def steered(output: Tensor, call: Call, guidance_scale: float | None) -> Tensor:
    """u + s (c - u) of an output's halves without and with prompts, where the call has them (Ho and Salimans, arXiv 2207.12598).

    That is what a generation goes on with: errors that the halves share count once, those that they do not share s times.
    """
    if guidance_scale is None or not call.guided:
        return output
    without, prompted = output.chunk(2)
    return without + guidance_scale * (prompted - without)


def mean_squared_error(reference: Sequence[Tensor], changed: Iterable[Tensor]) -> float:
    """sum (r - c)^2 / count over all numbers of all calls."""
    total = sum(float((mine - other).square().sum()) for mine, other in zip(reference, changed, strict=True))
    return total / sum(tensor.numel() for tensor in reference)
