"""Blocks and stages of a denoiser, derived from its tree of modules: no list of names to keep up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ldpruner.plans import within


def stage_of_blocks(denoiser: nn.Module, called: Iterable[str]) -> dict[str, str]:
    """The stage of every block, blocks in the order of `called`.

    A *block list* is a list of modules that have children; a *block* is its member that holds no further list: a residual
    block, a transformer block. A *stage* is what an outermost list holds (`down_blocks.1`), or, where lists do not nest, what
    holds them (`mid_block`) or the list itself (`transformer_blocks`). Without any block list, top-level modules are the
    blocks of one stage.
    """
    members = {
        f"{name}.{child}": name
        for name, module in denoiser.named_modules()
        if name and isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and all(map(_has_parts, module))
        for child in module._modules
    }
    blocks = [path for path in called if path in members and not any(within(other, path) for other in members if other != path)]
    if not blocks:
        return {path: "" for path in called if path and "." not in path}
    return {block: _stage(block, members) for block in blocks}


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _stage(block: str, members: Mapping[str, str]) -> str:
    outermost = min((path for path in members if within(block, path)), key=len)
    if outermost != block:
        return outermost
    listed = members[block]
    return listed.rpartition(".")[0] or listed
