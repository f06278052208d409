"""Prunings that were published as models of their own, as plans on the model that they were made from."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from ldpruner.errors import OperatorError, suggest
from ldpruner.operators.tracing import Call, architecture, trace
from ldpruner.plans import Edit, Plan
from ldpruner.replacements import identity, narrow
from ldpruner.scoring.bk_sdm import SIZES, removed

BKSDM = Literal["base", "small", "tiny"]


def bk_sdm(denoiser: nn.Module, call: Call, size: BKSDM) -> Plan:
    """BK-SDM Base, Small or Tiny (Kim et al., arXiv 2305.15798) as a plan on a UNet with stages, such as Stable Diffusion 1.x's.

    What is removed and what it has in parameters is the paper's. Where a residual block took a skip connection in, its stand-in
    leaves the skip out. Tiny differs in one thing: its authors built a UNet without the innermost grid, and here the stream is
    still averaged onto it and spread again, without weights. Raises `OperatorError` for a denoiser without such stages.
    """
    if size not in get_args(BKSDM):
        raise OperatorError(f"BK-SDM {size!r} was not published: {suggest(size, SIZES)}")
    modules = trace(denoiser, call).modules
    edits = []
    for path in removed(denoiser, size):
        replacement, options = "identity", identity(modules[path])
        if options is None:
            replacement, options = "narrow", narrow(modules[path])
        if options is None:
            raise OperatorError(f"bk-sdm: {path} of this {type(denoiser).__name__} gives more channels than it takes.")
        edits.append(Edit(operator=path, replacement=replacement, options=options))
    return Plan(
        model=architecture(denoiser), denoiser=type(denoiser).__name__, edits=tuple(edits), selection=f"bk-sdm-{size}, published"
    )
