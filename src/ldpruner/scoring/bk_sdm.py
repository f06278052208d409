"""The scheme that was picked by hand for Stable Diffusion, on any UNet with stages (BK-SDM, arXiv 2305.15798)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ldpruner.errors import OperatorError
from ldpruner.plans import Score
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.shared import scored

SIZES = ("base", "small", "tiny")
PREFERENCE = ("identity", "shortcut", "zero")  # the cheapest first; anything else after them


@SCORERS.register("bk-sdm")
@dataclass(frozen=True, kw_only=True)
class BKSDMScorer(Scorer):
    """The place of an operator in BK-SDM's list of what goes: Base, then Small, then Tiny. Costs no denoiser pass.

    Base: in each stage, all residual+attention pairs but the first on the way down, and but the first and the last on the
    way up (with two layers per block, the second pair of each). Small: the mid block. Tiny: the innermost stage. The paper
    gives three models and no order inside them: we go from the outermost stage inwards, down before up, and put a whole
    block before its pairs. Samplers stay, so Tiny keeps the innermost grid, which has nothing left to do. A module's
    replacements follow each other: `identity`, `shortcut`, `zero`, others.

    What the scheme does not name comes after all of it: by stage, outermost first, then the mid block, then what lies in
    no stage. Raises `OperatorError` for a denoiser without such stages.
    """

    def scores(self, asked: Asked) -> Iterator[Score]:
        places = {name: place for place, name in enumerate(scheme(asked.pipeline.denoiser))}
        stages = list(_stages(asked.pipeline.denoiser))
        for edit in asked.edits:
            behind = len(places) + _depth(edit.operator, stages)
            place = places.get(edit.operator, behind)
            yield scored(edit, place + _preference(edit.replacement) / 10, seconds=0.0)


def scheme(denoiser: nn.Module) -> list[str]:
    """What BK-SDM removes, in our order. Raises `OperatorError` where there are no stages."""
    modules = dict(denoiser.named_modules())
    stages = list(_stages(denoiser))
    names = _inner_pairs(stages, modules)
    for block in ("mid_block", *stages[-1]):
        names += [block, *_pairs(block, range(_layers(block, modules)))]
    return [name for name in dict.fromkeys(names) if name in modules]


def removed(denoiser: nn.Module, size: str) -> list[str]:
    """What the published model of that size lacks, paths that do not lie in each other. Raises `OperatorError` as `scheme`."""
    modules = dict(denoiser.named_modules())
    stages = list(_stages(denoiser))
    if size != "tiny":
        names = [*_inner_pairs(stages, modules), *(["mid_block"] if size == "small" else [])]
    else:
        inner, (before, _) = stages[-1], stages[-2]
        whole = [name for block in inner for name in _pairs(block, range(_layers(block, modules)))]
        samplers = [f"{before}.downsamplers.0", f"{inner[1]}.upsamplers.0"]
        names = [*_inner_pairs(stages[:-1], modules), "mid_block", *whole, *samplers]
    return [name for name in names if name in modules]


def _inner_pairs(stages: Sequence[tuple[str, str]], modules: dict[str, nn.Module]) -> list[str]:
    names: list[str] = []
    for down, up in stages:
        names += _pairs(down, range(1, _layers(down, modules)))
        names += _pairs(up, range(1, _layers(up, modules) - 1))
    return names


def _stages(denoiser: nn.Module) -> Iterator[tuple[str, str]]:
    """The down and up block of each stage, outermost first."""
    down, up = getattr(denoiser, "down_blocks", None), getattr(denoiser, "up_blocks", None)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList) or not len(down) or len(down) != len(up):
        raise OperatorError(
            f"bk-sdm: this {type(denoiser).__name__} has no down_blocks and up_blocks in pairs, and the scheme is about "
            "nothing else. Use another method, such as ends-and-spread."
        )
    return ((f"down_blocks.{depth}", f"up_blocks.{len(up) - 1 - depth}") for depth in range(len(down)))


def _layers(block: str, modules: dict[str, nn.Module]) -> int:
    resnets = modules.get(f"{block}.resnets")
    return len(resnets) if isinstance(resnets, nn.ModuleList) else 0


def _pairs(block: str, layers: Iterable[int]) -> list[str]:
    return [f"{block}.{kind}.{layer}" for layer in layers for kind in ("resnets", "attentions")]


def _depth(operator: str, stages: Sequence[tuple[str, str]]) -> int:
    top = ".".join(operator.split(".")[:2])
    outside = len(stages) + (not operator.startswith("mid_block"))
    return next((depth for depth, stage in enumerate(stages) if top in stage), outside)


def _preference(replacement: str) -> int:
    return PREFERENCE.index(replacement) if replacement in PREFERENCE else len(PREFERENCE)
