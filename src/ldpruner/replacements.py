"""What can take an operator's place. Each entry says whether it fits a traced operator, and with which options.

The stand-ins themselves live in `ldpruner_v1`, the one file that a saved model carries along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ldpruner.operators.watching import Source, Traced
from ldpruner.plans import Cost
from ldpruner.registry import Registry

Options = dict[str, Any]
Fit = Callable[[Traced], Options | None]  # the stand-in's options, or None where it does not fit

REPLACEMENTS: Registry[Fit] = Registry("replacement")


@REPLACEMENTS.register("identity")
def identity(traced: Traced) -> Options | None:
    """Return the input: fits where every output has the shape of an input of its own, and none is changed in place later."""
    if traced.is_written:
        return None
    free = list(traced.arguments)
    sources: list[Source | None] = []
    many = isinstance(traced.output, tuple | list)
    for piece in traced.output if many else [traced.output]:
        if piece is None:
            sources.append(None)
            continue
        match = next((pair for pair in free if _alike(pair[1], piece)), None)
        if match is None:
            return None
        free.remove(match)
        sources.append(match[0])
    return {"returns": sources, "many": many}


@REPLACEMENTS.register("zero")
def zero(traced: Traced) -> Options | None:
    """Contribute nothing: fits a branch, whose output is added to the stream and used in no other way."""
    return zeros_like_output(traced) if traced.is_branch else None


@REPLACEMENTS.register("shortcut")
def shortcut(traced: Traced) -> Options | None:
    """Keep only the child on the skip path: fits a residual block that maps its input before adding it back."""
    if traced.shortcut is None:
        return None
    child, scale = traced.shortcut
    return {"source": traced.arguments[0][0], "child": child, "scale": scale}


@REPLACEMENTS.register("pointwise")
def pointwise(traced: Traced) -> Options | None:
    """A linear map over channels at every position, fitted to the original: fits where it costs less than the operator."""
    if not isinstance(traced.output, Tensor) or not traced.arguments:
        return None
    source, given = traced.arguments[0]
    made = traced.output
    if given.ndim != made.ndim or not 2 <= made.ndim <= 5 or given.shape[0] != made.shape[0] or not given.is_floating_point():
        return None
    axis = traced.channel_axis(made.ndim)
    grid: list[list[int]] | None = [_ratio(new, old) for new, old in zip(made.shape[2:], given.shape[2:], strict=True)]
    if axis != 1 and given.shape[1:-1] != made.shape[1:-1]:
        return None
    if axis != 1 or all(new == old for new, old in zip(made.shape[2:], given.shape[2:], strict=True)):
        grid = None
    options = {"source": source, "channels": [given.shape[axis], made.shape[axis]], "grid": grid, **traced.axis_options(made.ndim)}
    return options if pointwise_cost(options, made).macs * made.shape[0] < traced.macs else None


def narrow(traced: Traced) -> Options | None:
    """Keep the first channels of the input: fits where there are enough; what was concatenated behind them is left out.

    Not among what is scored: published prunings are told with it, see `published`.
    """
    if not isinstance(traced.output, Tensor) or not traced.arguments or traced.arguments[0][1].ndim != traced.output.ndim:
        return None
    source, given = traced.arguments[0]
    made, axis = traced.output, traced.channel_axis(traced.output.ndim)
    if given.shape[axis] < made.shape[axis]:
        return None
    grid = [_ratio(new, old) for new, old in zip(made.shape[2:], given.shape[2:], strict=True)] if axis == 1 else None
    kept = grid is None or all(pair == [1, 1] for pair in grid)
    return {"source": source, "channels": made.shape[axis], "grid": None if kept else grid, **traced.axis_options(made.ndim)}


def pointwise_cost(options: Options, output: Tensor) -> Cost:
    """Parameters, and MACs for one sample, of a pointwise stand-in that gives `output`."""
    channels_in, channels_out = options["channels"]
    positions = output.numel() // output.shape[0] // channels_out
    return Cost(params=(channels_in + 1) * channels_out, macs=positions * channels_in * channels_out)


def zeros_like_output(traced: Traced) -> Options | None:
    """Options of a `zero` that gives the shapes of this operator's outputs, or None where they cannot be derived."""
    many = isinstance(traced.output, tuple | list)
    pieces = list(traced.output) if many else [traced.output]
    if traced.is_written or not traced.arguments or not all(isinstance(piece, Tensor) for piece in pieces):
        return None
    returns = []
    for piece in pieces:
        match = next((pair for pair in traced.arguments if _can_size(pair[1], piece)), None)
        if match is None:
            return None
        returns.append({"source": match[0], "shape": _shape_from(match[1], piece, traced.channel_axis(piece.ndim))})
    return {"returns": returns, "many": many}


def _can_size(given: Tensor, made: Tensor) -> bool:
    """Whether a shape can be told from another: numbers of the same rank, or indices for which vectors stand."""
    if not given.is_floating_point():
        return given.shape == made.shape[:-1]
    return given.ndim == made.ndim


def _shape_from(given: Tensor, made: Tensor, channels: int) -> list[Any]:
    channels = channels if given.is_floating_point() else made.ndim - 1
    return [size if axis == channels else [axis, *_ratio(size, given.shape[axis])] for axis, size in enumerate(made.shape)]


def _ratio(new: int, old: int) -> list[int]:
    divisor = math.gcd(new, old)
    return [new // divisor, old // divisor]


def _alike(given: Tensor, made: Any) -> bool:
    return isinstance(made, Tensor) and given.shape == made.shape and given.dtype == made.dtype
