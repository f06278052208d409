"""How tensors lie in memory, and which modules get them laid otherwise once a plan is made.

An attention that makes pictures of tokens hands its channels on last in memory, and what comes after keeps them so: take it
away, and every module down to the next one that lays its output anew takes another time than before, though it stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ldpruner.operators.timing import device_of, giving_back
from ldpruner.operators.tracing import Call


@torch.inference_mode()
def layouts(denoiser: nn.Module, call: Call) -> dict[str, bool]:
    """Whether the first grid that each module gets, a tensor `(n, channels, ...)` of rank 4 or more, is contiguous.

    The call runs on the denoiser's own device: on the meta device, some operations lay their outputs otherwise.
    """
    found: dict[str, bool] = {}
    with ExitStack() as stack:
        for name, module in denoiser.named_modules():
            stack.callback(module.register_forward_pre_hook(_noting(name, found), with_kwargs=True).remove)
        with giving_back(device_of(denoiser)):
            call.run(denoiser)
    return found


def _noting(name: str, found: dict[str, bool]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grids = (given for given in (*args, *kwargs.values()) if isinstance(given, Tensor) and given.ndim >= 4)
        grid = next(grids, None)
        if grid is not None:
            found[name] = grid.is_contiguous()

    return hook


def relaid(before: Mapping[str, bool], after: Mapping[str, bool]) -> dict[str, bool]:
    """The modules whose input lies otherwise than it did, and whether it is contiguous now."""
    return {name: now for name, now in after.items() if before.get(name, now) != now}
