"""What judges plans: samples that another model turns into other pictures count, but not for how far that is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import PROBE
from ldpruner.judging import JointShift
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit
from ldpruner.scoring.latent import BROKEN, FAR, distances, latent_shift, within_reach
from ldpruner.surgery import pruned_view


def test_what_moves_too_far_is_drawn_up_to_the_limit_and_the_rest_stays() -> None:
    reference = torch.zeros(3, 1, 2, 1)
    modified = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]).view(3, 1, 2, 1)
    assert distances(reference, modified).tolist() == pytest.approx([5.0, 0.5, 0.0])
    drawn = within_reach(reference, modified, 1.0)
    assert drawn.flatten(1)[0].tolist() == pytest.approx([0.6, 0.8])
    assert torch.equal(drawn[1:], modified[1:])
    broken = torch.full_like(modified, torch.nan)
    assert latent_shift(reference, within_reach(reference, broken, 1.0)) == 2 * BROKEN


def test_a_judge_gives_the_joint_shift_on_other_noise_and_less_with_a_limit(ldm: Pipeline) -> None:
    edits = [Edit(operator="mid_block", replacement="identity", options={"returns": [[0, "hidden_states"]], "many": False})]
    judge = JointShift.on(ldm, PROBE, samples=6, seed=77, batch_size=None)
    with ldm.with_denoiser(pruned_view(ldm.denoiser, edits, {})):
        latents = ldm.latents(replace(PROBE, samples=6, seed=77))
    shift = judge.of(edits, {})
    assert shift == latent_shift(judge.reference, latents) > 0
    assert judge.of([], {}) == 0
    moved = distances(judge.reference, latents)
    tamed = judge.tamed(edits, {})
    assert tamed.limit == pytest.approx(FAR * float(moved.median()))
    assert replace(judge, limit=float(moved.min())).of(edits, {}) < shift
    assert judge.tamed([], {}).limit is None, "nothing moves: there is no measure of far"
