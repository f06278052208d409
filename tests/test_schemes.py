"""The rivals that are schemes rather than measures: BK-SDM's, and the ends kept and the rest spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from diffusers import UNet2DModel
from torch import nn

from conftest import PROBE, tiny_unet
from ldpruner import Edit
from ldpruner.errors import OperatorError
from ldpruner.pipelines import Pipeline
from ldpruner.scoring import SCORERS, Asked
from ldpruner.scoring.bk_sdm import BKSDMScorer, scheme
from ldpruner.scoring.ends_and_spread import block_order, spread_over, stage_of_blocks


def scores_of(scorer: Any, pipeline: Pipeline, edits: Sequence[Edit]) -> list[float]:
    return [entry.score for entry in scorer.scores(Asked(pipeline=pipeline, edits=edits, probe=PROBE))]


def two_layer_unet() -> UNet2DModel:
    return tiny_unet(size=4, channels=4, layers=2)


def test_bk_sdm_goes_through_second_pairs_then_the_mid_block_then_the_innermost_stage() -> None:
    assert scheme(two_layer_unet()) == [
        "down_blocks.0.resnets.1",
        "up_blocks.1.resnets.1",
        "down_blocks.1.resnets.1",
        "down_blocks.1.attentions.1",
        "up_blocks.0.resnets.1",
        "up_blocks.0.attentions.1",
        "mid_block",
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
        "down_blocks.1",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "up_blocks.0",
        "up_blocks.0.resnets.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.resnets.2",
        "up_blocks.0.attentions.2",
    ]


def test_bk_sdm_takes_the_cheapest_stand_in_first_and_the_rest_of_the_model_last(ldm: Pipeline) -> None:
    with ldm.with_denoiser(two_layer_unet()):
        asked = [
            ("conv_in", "pointwise"),
            ("mid_block.resnets.0.conv1", "zero"),
            ("down_blocks.1.resnets.0.conv1", "zero"),
            ("down_blocks.0.resnets.0", "identity"),
            ("mid_block", "identity"),
            ("up_blocks.1.resnets.1", "pointwise"),
            ("up_blocks.1.resnets.1", "zero"),
            ("up_blocks.1.resnets.1", "shortcut"),
            ("down_blocks.0.resnets.1", "pointwise"),
            ("down_blocks.0.resnets.1", "identity"),
        ]
        edits = [Edit(operator=name, replacement=replacement, options={}) for name, replacement in asked]
        given = scores_of(BKSDMScorer(), ldm, edits)
    assert sorted(given, reverse=True) == given
    assert given[-5:] == [1.3, 1.2, 1.1, 0.3, 0.0]
    assert min(given[:4]) == len(scheme(two_layer_unet()))


def test_bk_sdm_says_that_it_needs_stages(ldm: Pipeline) -> None:
    edit = Edit(operator="0", replacement="identity", options={})
    with (
        ldm.with_denoiser(nn.Sequential(nn.Linear(4, 4))),
        pytest.raises(OperatorError, match=r"bk-sdm: this Sequential has no down_blocks and up_blocks in pairs"),
    ):
        scores_of(BKSDMScorer(), ldm, [edit])


def test_cuts_are_spread_by_halving_the_depth() -> None:
    assert spread_over(range(7), 7) == [3, 1, 5, 0, 2, 4, 6]
    assert spread_over([1, 2, 3, 8], 10) == [3, 1, 8, 2]


class Layer(nn.Module):
    """A layer with a list of its own inside, as attention and feed-forward layers of diffusers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(2, 2), nn.Dropout(0.0)])


class Layers(nn.Module):
    """A transformer of eight layers: one flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.transformer_blocks = nn.ModuleList([Layer() for _ in range(8)])


def test_the_ends_of_a_stage_come_last() -> None:
    model = Layers()
    stages = stage_of_blocks(model, [name for name, _ in model.named_modules()])
    assert stages == {f"transformer_blocks.{number}": "transformer_blocks" for number in range(8)}
    order = sorted(stages, key=block_order(stages).__getitem__)
    assert [int(name[-1]) for name in order] == [3, 1, 5, 2, 4, 6, 0, 7]


def test_stages_and_blocks_are_found_in_the_module_tree() -> None:
    unet = two_layer_unet()
    called = ["conv_in", "down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.0", "mid_block.attentions.0"]
    assert stage_of_blocks(unet, [*called, "mid_block.attentions.0.to_out.0", "mid_block.resnets.1"]) == {
        "down_blocks.1.resnets.0": "down_blocks.1",
        "down_blocks.1.attentions.0": "down_blocks.1",
        "mid_block.resnets.0": "mid_block",
        "mid_block.attentions.0": "mid_block",
        "mid_block.resnets.1": "mid_block",
    }


def test_parts_follow_their_block_and_wholes_their_last_block(ldm: Pipeline) -> None:
    names = ["mid_block.attentions.0", "mid_block.attentions.0.to_q", "mid_block.resnets.0", "mid_block", "conv_in"]
    edits = [Edit(operator=name, replacement="identity", options={}) for name in names]
    attention, part, resnet, whole, stem = scores_of(SCORERS["ends-and-spread"](), ldm, edits)
    assert part == attention + 0.5
    assert attention < resnet < whole < stem
    assert whole % 1 == 0.75
