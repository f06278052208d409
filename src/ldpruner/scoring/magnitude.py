"""Small weights matter little: the oldest criterion of pruning, here for whole operators."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ldpruner.plans import Score
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.shared import scored, stand_in

PART = 1 << 20  # numbers that are looked at at once: magnitudes of a large layer would take as much memory as it does


@SCORERS.register("magnitude")
@dataclass(frozen=True, kw_only=True)
class MagnitudeScorer(Scorer):
    """Mean absolute weight, biases included, of all that an edit takes away; 0 for an operator without parameters.

    After Li et al. (arXiv 1608.08710), who sum over filters of one layer; across operators of all sizes a sum would only
    count parameters, so it is a mean per parameter. What a stand-in keeps, such as the child of a shortcut, is not
    counted. A norm's weights lie about 1 and a convolution's far below: norms score high. Costs no denoiser pass.
    """

    def scores(self, asked: Asked) -> Iterator[Score]:
        summed = functools.cache(sum_of_magnitudes)  # operators lie in each other, and each has several stand-ins
        for edit in asked.edits:
            began = time.perf_counter()
            kept = stand_in(asked.pipeline.denoiser, edit, fitted=asked.fitted)
            value = mean_magnitude(asked.pipeline.denoiser.get_submodule(edit.operator), kept, summed)
            yield scored(edit, value, seconds=time.perf_counter() - began)


def mean_magnitude(operator: nn.Module, kept: nn.Module, summed: Callable[[nn.Parameter], float]) -> float:
    """sum |w| / count over the parameters of `operator` that are not in `kept`; `summed` gives a parameter's sum |w|."""
    still = {id(parameter) for parameter in kept.parameters()}
    gone = [parameter for parameter in operator.parameters() if id(parameter) not in still]
    count = sum(parameter.numel() for parameter in gone)
    return sum(map(summed, gone)) / count if count else 0.0


def sum_of_magnitudes(parameter: nn.Parameter) -> float:
    """sum |w|, as a double, a part at a time."""
    return sum(float(part.abs().sum(dtype=torch.float64)) for part in torch.split(parameter.detach().flatten(), PART))
