"""The rival scoring methods: one contract for all, and each against its formula worked out by hand."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from conftest import PROBE, tiny_audio, tiny_ldm, tiny_stable_diffusion
from ldpruner import Edit, score
from ldpruner.errors import PipelineError, RunError
from ldpruner.fitting import Weights, fit_pointwise, pointwise_wanted
from ldpruner.operators import discover
from ldpruner.operators.tracing import weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators
from ldpruner.scoring import SCORERS, Asked, Run
from ldpruner.scoring.block_influence import BlockInfluenceScorer
from ldpruner.scoring.chance import RandomScorer
from ldpruner.scoring.denoising import questions
from ldpruner.scoring.diff_pruning import DiffPruningScorer, above
from ldpruner.scoring.gradients import FirstOrder
from ldpruner.scoring.latent import BROKEN
from ldpruner.scoring.magnitude import MagnitudeScorer
from ldpruner.scoring.output_mse import OutputErrorScorer
from ldpruner.scoring.taylor import TaylorScorer
from ldpruner.trajectories import record_calls

RIVALS = [name for name in SCORERS if name != "paper"]
PIPELINES = {
    "unconditional": tiny_ldm,
    "text-to-image": lambda: tiny_stable_diffusion(Path(tempfile.gettempdir())),
    "audio": tiny_audio,
}


@functools.cache
def known(kind: str) -> tuple[Pipeline, Operators]:
    """A pipeline and its operators; every test leaves it as it was."""
    pipeline = Pipeline(PIPELINES[kind](), source=kind)
    return pipeline, discover(pipeline.denoiser, pipeline.call(PROBE), timing_repeats=0)


@functools.cache
def prepared(kind: str) -> tuple[Pipeline, list[Edit], Weights]:
    """A pipeline, some of its edits, and their fitted weights."""
    pipeline, operators = known(kind)
    pairs = operators.pairs()[:: len(operators.pairs()) // 9]
    edits = [Edit(operator=o.name, replacement=c.replacement, options=c.options) for o, c in pairs]
    return pipeline, edits, fit_pointwise(pipeline, pointwise_wanted(edits), PROBE)


def edit_of(operators: Operators, name: str, replacement: str) -> Edit:
    return Edit(operator=name, replacement=replacement, options=operators[name].candidate(replacement).options)


def values(scorer: Any, pipeline: Pipeline, edits: Sequence[Edit], **settings: Any) -> list[float]:
    asked = Asked(**{"pipeline": pipeline, "edits": edits, "probe": PROBE} | settings)
    return [entry.score for entry in scorer.scores(asked)]


def outputs(pipeline: Pipeline, path: str, calls: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """First input and output of one module during calls."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = pipeline.denoiser.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        for call in calls:
            call.run(pipeline.denoiser)
    hook.remove()
    return seen


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("method", ["paper", *RIVALS])
def test_every_scorer_keeps_the_contract(method: str, kind: str) -> None:
    pipeline, edits, fitted = prepared(kind)
    denoiser = pipeline.denoiser
    parameters = list(denoiser.parameters())
    parameters[3].requires_grad_(False)
    before, modules = weights_digest(denoiser), dict(denoiser.named_modules())
    wanted = [parameter.requires_grad for parameter in parameters]
    asked = Asked(pipeline=pipeline, edits=edits, probe=PROBE, fitted=fitted, operators=known(kind)[1])

    entries = list(SCORERS[method]().scores(asked))
    assert [entry.key for entry in entries] == [(edit.operator, edit.replacement) for edit in edits]
    assert all(np.isfinite(entry.score) and entry.score >= 0 and entry.seconds >= 0 for entry in entries)
    assert len({entry.score for entry in entries}) > len(edits) / 3

    assert weights_digest(denoiser) == before
    assert dict(denoiser.named_modules()) == modules
    assert all(parameter.grad is None for parameter in parameters)
    assert [parameter.requires_grad for parameter in parameters] == wanted
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())

    again = SCORERS[method]().scores(replace(asked, edits=edits[::-2]))
    assert {entry.key: entry.score for entry in again}.items() <= {entry.key: entry.score for entry in entries}.items()


@pytest.mark.parametrize("method", RIVALS)
def test_a_method_is_named_and_its_run_can_be_read_back(method: str, ldm: Pipeline, operators: Operators, tmp_path: Path) -> None:
    run = score(ldm, PROBE, method=method, operators=operators, replacements=["shortcut"], out=tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    assert loaded.method == method
    assert loaded.scores == run.scores
    assert len(run.scores) == len(operators.pairs(["shortcut"]))
    for entry in run.scores:
        by_latents = str(entry.judged).startswith("latents")
        assert (entry.mean_shift is not None, entry.std_shift is not None) == (by_latents, by_latents)


@pytest.mark.parametrize("scorer", [TaylorScorer(), DiffPruningScorer(), BlockInfluenceScorer(), OutputErrorScorer()])
def test_an_edit_that_breaks_the_denoiser_scores_worst_and_stays_a_number(scorer: Any, ldm: Pipeline, operators: Operators) -> None:
    edit = edit_of(operators, "mid_block.resnets.0", "pointwise")
    fitted = {edit.operator: (torch.full((16, 16), torch.nan), torch.zeros(16))}
    assert values(scorer, ldm, [edit], fitted=fitted) == [BROKEN]


def test_batch_size_does_not_matter(ldm: Pipeline, operators: Operators) -> None:
    edits = [edit_of(operators, "mid_block.attentions.0", "identity"), edit_of(operators, "up_blocks.1.resnets.0.conv2", "zero")]
    for scorer in (TaylorScorer(timesteps=4), BlockInfluenceScorer(timesteps=2), OutputErrorScorer(timesteps=2)):
        assert values(scorer, ldm, edits, batch_size=2) == pytest.approx(values(scorer, ldm, edits), rel=1e-4)


def test_chance_is_uniform_and_new_for_every_seed(ldm: Pipeline) -> None:
    edits = [Edit(operator=f"block.{number}", replacement="zero", options={}) for number in range(4000)]
    first, second = (np.array(values(RandomScorer(), ldm, edits, probe=replace(PROBE, seed=seed))) for seed in (0, 1))
    counts = np.histogram(first, bins=10, range=(0, 1))[0]
    assert counts.sum() == 4000
    assert abs(counts - 400).max() < 80
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_magnitude_is_a_mean_over_all_parameters_that_go(ldm: Pipeline, operators: Operators) -> None:
    block = ldm.denoiser.get_submodule("down_blocks.1.resnets.0")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(0.0)
        block.conv1.weight.fill_(-3.0)
        block.conv1.bias.fill_(2.0)
        block.conv_shortcut.weight.fill_(100.0)
    conv, norm_only = 8 * 16 * 9, 2 * 8
    edits = [
        Edit(operator="down_blocks.1.resnets.0.conv1", replacement="identity", options={"returns": [[0, "input"]], "many": False}),
        edit_of(operators, "down_blocks.1.resnets.0", "shortcut"),
        Edit(
            operator="down_blocks.1.resnets.0.nonlinearity",
            replacement="identity",
            options={"returns": [[0, "input"]], "many": False},
        ),
    ]
    total = sum(p.numel() for p in block.parameters()) - sum(p.numel() for p in block.conv_shortcut.parameters())
    assert total > conv + norm_only
    expected = [(3 * conv + 2 * 16) / (conv + 16), (3 * conv + 2 * 16) / total, 0.0]
    assert values(MagnitudeScorer(), ldm, edits) == pytest.approx(expected, rel=1e-9)


def test_the_loss_is_that_of_noised_generations(ldm: Pipeline) -> None:
    clean = ldm.latents(PROBE)
    noise = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3 + row)) for row in range(3)])
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)  # DDIM's default schedule
    asked = list(questions(ldm, PROBE, timesteps=4, batch_size=None))
    assert [int(batch[0].call.args[1]) for batch in asked] == [750, 500, 250, 0]
    for time, (question,) in zip((750, 500, 250, 0), asked, strict=True):
        noisy = alphas[time].sqrt() * clean + (1 - alphas[time]).sqrt() * noise
        with torch.no_grad():
            expected = (ldm.denoiser(noisy, time).sample - noise).square().mean()
            assert float(question.loss(ldm.denoiser)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_the_loss_follows_what_the_denoiser_predicts(prediction: str, ldm: Pipeline) -> None:
    ldm.pipe.scheduler.register_to_config(prediction_type=prediction)
    clean = ldm.latents(PROBE)
    noise = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3 + row)) for row in range(3)])
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[500]
    target = clean if prediction == "sample" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    question = next(questions(ldm, PROBE, timesteps=2, batch_size=None))[0]
    assert torch.allclose(question.target, target, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, with numpy 2
def test_schedulers_that_scale_their_input_are_followed(ldm: Pipeline) -> None:
    ldm.pipe.scheduler = EulerDiscreteScheduler(num_train_timesteps=1000)
    clean = ldm.latents(PROBE)
    ldm.pipe.scheduler.set_timesteps(3)
    sigmas = ldm.pipe.scheduler.sigmas[:3]
    noise = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3 + row)) for row in range(3)])
    for sigma, (question,) in zip(sigmas, questions(ldm, PROBE, timesteps=3, batch_size=None), strict=True):
        given = (clean + sigma * noise) / (sigma**2 + 1).sqrt()
        assert torch.allclose(question.call.args[0], given, atol=1e-4)


def test_guided_rows_are_noised_alike_and_keep_their_prompts(text_to_image: Pipeline) -> None:
    probe = replace(PROBE, prompts=("a", "b"))
    recorded = record_calls(text_to_image, probe, batch_size=2)
    (first, second) = next(questions(text_to_image, probe, timesteps=2, batch_size=2))
    assert (first.share, second.share) == (2 / 3, 1 / 3)
    assert [len(part) for part in (first.target, second.target)] == [4, 2]
    assert torch.equal(first.call.args[0][:2], first.call.args[0][2:])
    for question, call in ((first, recorded[0]), (second, recorded[2])):
        assert torch.equal(question.call.kwargs["encoder_hidden_states"], call.kwargs["encoder_hidden_states"])


def test_a_scheduler_without_a_loss_is_told(ldm: Pipeline, operators: Operators) -> None:
    edit = edit_of(operators, "mid_block.attentions.0", "identity")
    ldm.pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(PipelineError, match="tiny-ldm: no loss is known for prediction type 'flow'; known: epsilon, sample, v_pre"):
        values(TaylorScorer(), ldm, [edit])
    ldm.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(PipelineError, match=r"FlowMatchEulerDiscreteScheduler has no add_noise, .* Use a method that needs none"):
        values(DiffPruningScorer(), ldm, [edit])


def test_a_denoiser_that_is_given_more_than_latents_is_told(ldm: Pipeline, operators: Operators) -> None:
    forward = ldm.denoiser.forward

    def other(pixels: Tensor, time: Tensor) -> Any:
        return forward(pixels, time)

    ldm.denoiser.forward = other
    with pytest.raises(PipelineError, match="UNet2DModel takes no sample and timestep, so its loss is not known here"):
        values(TaylorScorer(), ldm, [edit_of(operators, "mid_block.attentions.0", "identity")])


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("mid_block.attentions.0", "identity"),
        ("down_blocks.1.resnets.0", "shortcut"),
        ("up_blocks.0.resnets.0.time_emb_proj", "zero"),
    ],
)
def test_taylor_is_the_slope_of_the_loss(name: str, replacement: str) -> None:
    """Against central differences of the loss while the output moves from the operator's to its stand-in's."""
    text_to_image, operators = known("text-to-image")
    edit = edit_of(operators, name, replacement)
    asked = [question for batch in questions(text_to_image, PROBE, timesteps=2, batch_size=None) for question in batch]
    module = text_to_image.denoiser.get_submodule(name)
    instead = {"identity": lambda x: x, "shortcut": getattr(module, "conv_shortcut", None), "zero": lambda x: torch.zeros(())}

    def loss(share: float) -> float:
        def moved(_: nn.Module, args: tuple[Tensor, ...], out: Any) -> Any:
            many, made = isinstance(out, tuple), out[0] if isinstance(out, tuple) else out
            made = made + share * (instead[replacement](args[0]) - made)
            return (made,) if many else made

        hook = module.register_forward_hook(moved)
        with torch.no_grad():
            total = sum(float(question.loss(text_to_image.denoiser)) for question in asked)
        hook.remove()
        return total

    slope = (loss(0.02) - loss(-0.02)) / 0.04
    assert values(TaylorScorer(timesteps=2), text_to_image, [edit]) == [pytest.approx(abs(slope), rel=0.02, abs=1e-5)]


def test_for_a_linear_map_taylor_is_weight_times_gradient(ldm: Pipeline, operators: Operators) -> None:
    name = "down_blocks.0.resnets.0.conv2"
    conv = ldm.denoiser.get_submodule(name)
    for batch in list(questions(ldm, PROBE, timesteps=3, batch_size=None)):
        batch[0].loss(ldm.denoiser).backward()
    expected = abs(sum(float((p.detach() * p.grad).sum()) for p in conv.parameters()))
    ldm.denoiser.zero_grad()
    assert expected > 1e-3
    assert values(TaylorScorer(timesteps=3), ldm, [edit_of(operators, name, "zero")]) == [pytest.approx(expected, rel=1e-3)]


def test_diff_pruning_leaves_out_timesteps_of_little_loss(ldm: Pipeline, operators: Operators) -> None:
    key = ("block", "zero")
    found = FirstOrder(losses=(0.04, 0.05, 0.2, 1.0), changes={key: (8.0, 4.0, -2.0, 1.0)})
    assert above(found, 0.0) == {key: 11.0}
    assert above(found, 0.04) == {key: 3.0}
    assert above(found, 0.05) == {key: 1.0}
    assert above(found, 0.2) == {key: 1.0}
    edits = [edit_of(operators, "mid_block.attentions.0", "identity")]
    assert values(DiffPruningScorer(threshold=0.0, timesteps=3), ldm, edits) == values(TaylorScorer(timesteps=3), ldm, edits)
    assert values(DiffPruningScorer(threshold=0.99, timesteps=3), ldm, edits) != values(TaylorScorer(timesteps=3), ldm, edits)


def test_a_threshold_that_no_loss_can_pass_is_refused() -> None:
    with pytest.raises(RunError, match=r"threshold=1\.0: a loss is compared with the largest one, so give 0 or more, below 1\."):
        DiffPruningScorer(threshold=1.0)


def test_block_influence_is_one_minus_the_cosine_of_input_and_output(ldm: Pipeline, operators: Operators) -> None:
    name = "mid_block.resnets.0"
    dropout = Edit(operator=f"{name}.dropout", replacement="identity", options={"returns": [[0, "input"]], "many": False})
    pairs = outputs(ldm, name, record_calls(ldm, PROBE))
    cosines = [
        (given * made).sum(1) / given.norm(dim=1) / made.norm(dim=1)  # one for each sample and position of the grid
        for given, made in pairs
    ]
    influence, nothing = values(BlockInfluenceScorer(), ldm, [edit_of(operators, name, "identity"), dropout])
    assert influence == pytest.approx(1 - float(torch.stack(cosines).mean()), rel=1e-4)
    assert nothing == pytest.approx(0.0, abs=1e-6)


def test_a_branch_is_judged_by_the_stream_that_it_joins(ldm: Pipeline, operators: Operators) -> None:
    block, branch = "mid_block.resnets.0", "mid_block.resnets.0.conv2"
    calls = record_calls(ldm, PROBE)
    edit = edit_of(operators, branch, "zero")
    told = values(BlockInfluenceScorer(), ldm, [edit])
    stream = torch.stack([made for _, made in outputs(ldm, block, calls)])
    without = torch.stack([given for given, _ in outputs(ldm, block, calls)])  # the block is x + conv2(...)
    assert told == [pytest.approx(1 - float(torch.cosine_similarity(stream, without, dim=2).mean()), rel=1e-4)]


def test_output_mse_is_the_error_on_the_originals_own_inputs(ldm: Pipeline, operators: Operators) -> None:
    edit = edit_of(operators, "down_blocks.1.resnets.0", "shortcut")
    probe = replace(PROBE, num_inference_steps=4)
    told = values(OutputErrorScorer(timesteps=2), ldm, [edit], probe=probe)
    calls = record_calls(ldm, probe)
    calls = [calls[0], calls[3]]
    before = [made for _, made in outputs(ldm, "conv_out", calls)]
    block = ldm.denoiser.get_submodule(edit.operator)
    block.forward = lambda hidden, *_: block.conv_shortcut(hidden)
    after = [made for _, made in outputs(ldm, "conv_out", calls)]
    errors = [float((a - b).square().mean()) for a, b in zip(before, after, strict=True)]
    assert told == [pytest.approx(np.mean(errors), rel=1e-4)]
