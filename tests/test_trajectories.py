"""Calls of the denoiser, recorded from a generation."""

from __future__ import annotations

from dataclasses import replace

import torch

from conftest import PROBE
from ldpruner.pipelines import Pipeline
from ldpruner.trajectories import record_calls, spread_calls


def test_recorded_calls_are_those_of_the_generation(text_to_image: Pipeline) -> None:
    calls = record_calls(text_to_image, PROBE, batch_size=2)
    assert [call.batch for call in calls] == [4, 4, 2, 2]  # two batches of two steps, doubled by guidance
    first = text_to_image.call(PROBE, samples=2)
    assert torch.equal(calls[0].args[0], first.args[0])
    assert int(calls[0].args[1]) > int(calls[1].args[1])
    assert calls[0].kwargs["encoder_hidden_states"] is calls[1].kwargs["encoder_hidden_states"]
    assert not torch.equal(calls[0].args[0], calls[1].args[0])
    assert not text_to_image.denoiser._forward_pre_hooks


def test_calls_are_picked_from_first_to_last_of_each_batch(ldm: Pipeline) -> None:
    probe = replace(PROBE, num_inference_steps=5)
    assert [int(call.args[1]) for call in record_calls(ldm, probe)] == [800, 600, 400, 200, 0]
    picked = spread_calls(ldm, probe, 3, batch_size=2)
    assert [int(call.args[1]) for call in picked] == [800, 400, 0] * 2
    assert [call.batch for call in picked] == [2, 2, 2, 1, 1, 1]
    assert len(spread_calls(ldm, probe, 9)) == 5
