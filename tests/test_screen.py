"""The screen: one forward and a few backward passes see every operator, to first order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import PROBE
from ldpruner import Edit
from ldpruner.operators.watching import tensors_in
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators
from ldpruner.scoring import Asked
from ldpruner.scoring.latent import BROKEN
from ldpruner.scoring.output_mse import OutputErrorScorer
from ldpruner.scoring.screen import ScreenScorer
from ldpruner.trajectories import spread_calls

MANY = ScreenScorer(timesteps=2, projections=64)


def screened(pipeline: Pipeline, edit: Edit, scorer: Any = MANY, **settings: Any) -> float:
    [entry] = scorer.scores(Asked(pipeline=pipeline, edits=[edit], probe=PROBE, **settings))
    return float(entry.score)


def edit_of(operators: Operators, name: str, replacement: str) -> Edit:
    return Edit(operator=name, replacement=replacement, options=operators[name].candidate(replacement).options)


def test_where_the_output_is_linear_it_is_the_output_error(ldm: Pipeline, operators: Operators) -> None:
    edit = edit_of(operators, "conv_out", "pointwise")
    fitted = {"conv_out": (torch.ones(*reversed(edit.options["channels"])), torch.zeros(edit.options["channels"][1]))}
    error = screened(ldm, edit, OutputErrorScorer(timesteps=2), fitted=fitted)
    for size in (None, 2):
        assert screened(ldm, edit, fitted=fitted, batch_size=size) == pytest.approx(error**0.5, rel=0.05)


@pytest.mark.parametrize("name", ["mid_block.attentions.0", "time_embedding", "up_blocks.0.attentions.1"])
def test_it_is_the_slope_of_the_output_as_a_stand_in_is_blended_in(name: str, ldm: Pipeline, operators: Operators) -> None:
    """Against central differences, in the operator's middle and where one row serves every sample."""
    replacement = "identity" if "attentions" in name else "pointwise"
    edit = edit_of(operators, name, replacement)
    module, slopes = ldm.denoiser.get_submodule(name), []
    width = module.linear_2.out_features if name == "time_embedding" else 0  # type: ignore[union-attr]
    fitted = {name: (torch.zeros(width, edit.options["channels"][0]), torch.zeros(width))} if width else {}

    def output(call: Any, share: float) -> Tensor:
        def moved(_: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> Tensor:
            return made + share * ((args[0] if replacement == "identity" else 0.0) - made)

        hook = module.register_forward_hook(moved)
        with torch.no_grad():
            made = tensors_in(call.run(ldm.denoiser))[0]
        hook.remove()
        return made

    for call in spread_calls(ldm, PROBE, 2):
        slopes.append((output(call, 0.01) - output(call, -0.01)) / 0.02)
    expected = torch.cat(slopes).square().mean().sqrt()
    assert screened(ldm, edit, fitted=fitted) == pytest.approx(float(expected), rel=0.15)


def test_an_edit_that_breaks_the_denoiser_scores_worst(ldm: Pipeline, operators: Operators) -> None:
    edit = edit_of(operators, "mid_block.resnets.0", "pointwise")
    assert screened(ldm, edit, fitted={edit.operator: (torch.full((16, 16), torch.nan), torch.zeros(16))}) == BROKEN
