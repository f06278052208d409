"""What was made for the original stacks on its pruned pipeline, loaded by plain diffusers: LoRAs, ControlNets, IP-Adapters,
other tasks, other schedulers. What belongs to operators that are gone is left out, and never lands on another one."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, ControlNetModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import ldpruner
from ldpruner.operators import Call
from ldpruner.recovery.trainable import Learner
from ldpruner.surgery import trial
from stacking import CHOSEN, SIZE, Lora, Stacked, controlnet, generated, image_prompt_weights

# of diffusers' own schedulers, with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

ADAPTER = "default_0"  # the name that diffusers gives to a first LoRA
SAVED = "pytorch_lora_weights.safetensors"
NOT_FROM_FILES = {"subfolder": None, "weight_name": None, "image_encoder_folder": None}
CONTROLLED = {"sd": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}
SCHEDULERS = [
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
]


@pytest.fixture
def lora(stacked: Stacked) -> Lora:
    """One for every layer of the original."""
    return Lora(stacked.pipe.unet)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ldpruner"]


def test_the_folder_loads_as_it_was_pruned(stacked: Stacked) -> None:
    unet = stacked.load().unet
    assert type(unet) is diffusers.UNet2DConditionModel
    assert torch.equal(stacked.output(unet), stacked.output(stacked.pruned()))
    assert not torch.allclose(stacked.output(unet), stacked.output(stacked.pipe.unet), atol=0.1), "nothing pruned"


def test_what_is_loaded_later_changes_no_bit_of_what_was_loaded_before(stacked: Stacked, families: dict[str, Stacked]) -> None:
    first = stacked.load().to(torch.float16).unet  # as one bit is seen in it, where linear maps and convolutions round otherwise
    before = stacked.output(first)
    for other in families.values():
        other.load()
    assert torch.equal(stacked.output(first), before)


def test_a_lora_of_the_original_acts_on_what_is_left_as_it_did_there(stacked: Stacked, lora: Lora, tmp_path: Path) -> None:
    pipe = stacked.load()
    before = stacked.output(pipe.unet)
    pipe.load_lora_weights(**lora.save(tmp_path))
    wanted = stacked.output(lora.merged(stacked.pruned()))
    torch.testing.assert_close(stacked.output(pipe.unet), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=0.1), "it does next to nothing"


def test_what_a_lora_holds_for_operators_that_are_gone_is_told(
    stacked: Stacked, lora: Lora, caplog: pytest.LogCaptureFixture
) -> None:
    lost = lora.lost(stacked)
    assert 0 < len(lost) < len(lora.weights)
    with caplog.at_level(logging.WARNING):
        stacked.load().load_lora_weights(lora.weights)
    assert told(caplog) == [
        f"{len(lost)} of {len(lora.weights)} tensors of this LoRA are for operators that were removed from this model, "
        f"first {lost[0]}: they are left out."
    ]


def test_a_lora_for_what_is_left_is_loaded_without_a_word(
    stacked: Stacked, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    lora = Lora(stacked.pipe.unet, only=lambda name: not stacked.lost(name))
    pipe = stacked.load()
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(**lora.save(tmp_path))
    assert told(caplog) == []
    wanted = stacked.output(lora.merged(stacked.pruned()))
    torch.testing.assert_close(stacked.output(pipe.unet), wanted, rtol=1e-4, atol=1e-5)


def test_a_lora_for_nothing_but_what_is_gone_changes_nothing_and_says_so(
    stacked: Stacked, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, lora = stacked.load(), Lora(stacked.pipe.unet, only=stacked.lost)
    before = stacked.output(pipe.unet)
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(lora.weights)
    assert torch.equal(stacked.output(pipe.unet), before)
    assert told(caplog)[0].startswith(f"{len(lora.weights)} of {len(lora.weights)} tensors of this LoRA are for operators")


def test_a_lora_can_be_fused_unfused_and_unloaded(stacked: Stacked, lora: Lora) -> None:
    pipe = stacked.load()
    before, wanted = stacked.output(pipe.unet), stacked.output(lora.merged(stacked.pruned()))
    pipe.load_lora_weights(lora.weights)
    pipe.fuse_lora()
    torch.testing.assert_close(stacked.output(pipe.unet), wanted, rtol=1e-4, atol=1e-5)
    pipe.unfuse_lora()
    torch.testing.assert_close(stacked.output(pipe.unet), wanted, rtol=1e-4, atol=1e-5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(stacked.output(pipe.unet), before, rtol=1e-4, atol=1e-5)


def test_a_lora_that_was_only_loaded_leaves_no_trace_once_it_is_unloaded(stacked: Stacked, lora: Lora) -> None:
    pipe = stacked.load()
    before = stacked.output(pipe.unet)
    pipe.load_lora_weights(lora.weights)
    pipe.unload_lora_weights()
    assert torch.equal(stacked.output(pipe.unet), before)


def test_a_pipeline_with_a_fused_lora_is_saved_and_loads_with_the_same_bits(stacked: Stacked, lora: Lora, tmp_path: Path) -> None:
    pipe = stacked.load()
    pipe.load_lora_weights(lora.weights)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    assert torch.equal(stacked.output(ldpruner.load(tmp_path / "fused").denoiser), stacked.output(pipe.unet))


def test_a_lora_saved_from_the_pruned_pipeline_holds_what_acts_there_and_loads_again(
    stacked: Stacked, lora: Lora, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    pipe, again = stacked.load(), stacked.load()
    pipe.load_lora_weights(lora.weights)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name=ADAPTER))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again.load_lora_weights(tmp_path, weight_name=SAVED)
    assert told(caplog) == []
    assert torch.equal(stacked.output(again.unet), stacked.output(pipe.unet))
    saved = load_file(tmp_path / SAVED)
    assert set(saved) == lora.weights.keys() - set(lora.lost(stacked))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT, of every second one
def test_two_loras_are_weighed_against_each_other(sd: Stacked) -> None:
    pipe, lora, other = sd.load(), Lora(sd.pipe.unet), Lora(sd.pipe.unet, rank=1)
    pipe.load_lora_weights(lora.weights, adapter_name="lora")
    pipe.load_lora_weights(other.weights, adapter_name="other")
    pipe.set_adapters(["lora", "other"], [0.25, 0.5])
    wanted = other.merged(lora.merged(sd.pruned(), 0.25), 0.5)
    torch.testing.assert_close(sd.output(pipe.unet), sd.output(wanted), rtol=1e-4, atol=1e-5)


def test_a_lora_in_the_form_of_kohya_scripts_is_told_apart_and_acts_too(
    sd: Stacked, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    lora, pipe = Lora(sd.pipe.unet, only=lambda name: "attentions" in name), sd.load()
    save_file(lora.as_kohya(alpha=lora.rank), tmp_path / "lora.safetensors")
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert told(caplog)[0].startswith(f"{len(lora.lost(sd))} of {len(lora.weights)} tensors of this LoRA are for operators")
    torch.testing.assert_close(sd.output(pipe.unet), sd.output(lora.merged(sd.pruned())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["unet", "transformer", None])
def test_a_lora_is_put_into_the_denoiser_itself_under_any_prefix(prefix: str | None, sd: Stacked) -> None:
    lora, unet = Lora(sd.pipe.unet), sd.load().unet
    given = {key.replace("unet.", f"{prefix}." if prefix else "", 1): tensor for key, tensor in lora.weights.items()}
    unet.load_lora_adapter(given, **({} if prefix == "transformer" else {"prefix": prefix}))  # the usual one
    torch.testing.assert_close(sd.output(unet), sd.output(lora.merged(sd.pruned())), rtol=1e-4, atol=1e-5)


def test_a_lora_that_tells_its_own_settings_is_scaled_by_them(sd: Stacked, tmp_path: Path) -> None:
    lora, pipe = Lora(sd.pipe.unet, only=lambda name: name.endswith(("to_q", "to_v"))), sd.load()
    layers = {key.removeprefix("unet."): tensor for key, tensor in lora.weights.items()}
    names = {"target_modules": ["to_q", "to_v"], "rank_pattern": {}, "alpha_pattern": {}}
    settings = {"r": lora.rank, "lora_alpha": 2 * lora.rank, **names}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
    with pytest.warns(RuntimeWarning, match=r"additional target modules: \['up_blocks.1.attentions.0.*to_q'\]"):  # a stand-in
        pipe.load_lora_weights(tmp_path, weight_name=SAVED)
    torch.testing.assert_close(sd.output(pipe.unet), sd.output(lora.merged(sd.pruned(), 2.0)), rtol=1e-4, atol=1e-5)


def test_a_lora_loaded_into_a_copy_leaves_the_model_alone(sd: Stacked) -> None:
    for pruned in (sd.load().unet, sd.pruned()):
        before, copied = sd.output(pruned), copy.deepcopy(pruned)
        copied.load_lora_adapter(Lora(sd.pipe.unet).weights, prefix="unet")
        assert torch.equal(sd.output(pruned), before)
        assert not torch.allclose(sd.output(copied), before, atol=0.1)


def test_a_new_lora_asks_to_leave_stand_ins_out_and_then_fits(sd: Stacked) -> None:
    unet = sd.load().unet
    with pytest.raises(ValueError, match=r"Target module Identity\(.*\) is not supported"):
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    unet = sd.load().unet
    removed = list(unet.config.quantization_config["operators"])
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], exclude_modules=removed))
    learning = {name.rpartition(".lora_")[0] for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert learning
    assert not any(sd.lost(name) for name in learning)


def test_a_lora_on_the_map_of_a_stand_in_acts_and_loads_again(sd: Stacked) -> None:
    maps = [f"{edit.operator}.map" for edit in sd.plan.edits if edit.replacement == "pointwise"]
    assert len(maps) == 3
    lora = Lora(sd.load().unet, only=lambda name: name in maps)
    pipe = sd.load()
    pipe.load_lora_weights(lora.weights)
    torch.testing.assert_close(sd.output(pipe.unet), sd.output(lora.merged(sd.pruned())), rtol=1e-4, atol=1e-5)


def test_a_student_that_plain_diffusers_loaded_learns_in_its_stand_ins_too(sd: Stacked) -> None:
    learning = [
        Learner(unet, ldpruner.Distillation(lora_rank=2), Call((), sd.inputs())).parameters()
        for unet in (sd.load().unet, ldpruner.load(sd.folder).denoiser)
    ]
    assert learning[0].keys() == learning[1].keys()
    assert {name for name in learning[0] if name.endswith(".map.weight")} == {
        f"{edit.operator}.map.weight" for edit in sd.plan.edits if edit.replacement == "pointwise"
    }


def test_a_controlnet_of_the_original_steers_the_pruned_pipeline(stacked: Stacked) -> None:
    pipe, control = stacked.load(), controlnet(stacked)
    steered = getattr(diffusers, CONTROLLED[stacked.family]).from_pipe(pipe, controlnet=control)
    assert steered.unet is pipe.unet
    size = SIZE[stacked.family]
    condition = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(6))
    assert not np.allclose(generated(steered, image=condition), generated(pipe, height=size, width=size), atol=1e-2)


@torch.no_grad()
def test_a_controlnet_of_the_original_gives_as_many_residuals_as_the_pruned_denoiser_takes(stacked: Stacked) -> None:
    control, unet, size = controlnet(stacked), stacked.load().unet, SIZE[stacked.family]
    condition = torch.ones(2, 3, size, size)
    down, mid = control(**stacked.inputs(), controlnet_cond=condition, return_dict=False)
    given = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert len(down) == len(stacked.pipe.unet.down_blocks) * 2
    assert torch.equal(stacked.output(unet, **given), stacked.output(stacked.pruned(), **given))
    assert not torch.allclose(stacked.output(unet, **given), stacked.output(unet), atol=0.1)


def test_a_controlnet_cannot_start_from_a_pruned_denoiser_and_fails_aloud(sd: Stacked) -> None:
    with pytest.raises(RuntimeError, match=r"loading state_dict .*\n.*Missing key"):
        ControlNetModel.from_unet(sd.load().unet)


def image_prompted(stacked: Stacked, unet: Any, weights: Any) -> dict[str, Any]:
    """The IP-Adapter put into a denoiser, as a pipeline does, and what a call then is given beside."""
    pipe = copy.copy(stacked.pipe)
    pipe.unet = unet
    pipe.load_ip_adapter(copy.deepcopy(weights), **NOT_FROM_FILES)
    return {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(7))]}}


def test_an_image_prompt_reaches_each_attention_that_is_left_by_its_own_weights(stacked: Stacked) -> None:
    weights, unet, original = image_prompt_weights(stacked.pipe.unet), stacked.load().unet, copy.deepcopy(stacked.pipe.unet)
    before = stacked.output(unet)
    seen = image_prompted(stacked, unet, weights)
    image_prompted(stacked, original, weights)
    with trial(original, stacked.plan.edits, fitted=stacked.fitted) as oracle:
        assert torch.equal(stacked.output(unet, **seen), stacked.output(oracle, **seen))
    assert not torch.allclose(stacked.output(unet, **seen), before, atol=1e-2), "it does next to nothing"


@pytest.mark.parametrize("attention", ["down_blocks.0", "up_blocks.1.attentions.0", "mid_block"])
def test_an_attention_that_is_gone_moves_no_other_one_s_weights(attention: str, sd: Stacked) -> None:
    unet = sd.load().unet
    weights = image_prompt_weights(sd.pipe.unet)
    image_prompted(sd, unet, weights)
    names = [name.removesuffix(".processor") for name in sd.pipe.unet.attn_processors if "attn2" in name]
    number, name = next((2 * place + 1, name) for place, name in enumerate(names) if name.startswith(attention))
    processor = unet.attn_processors[f"{name}.processor"]
    if sd.lost(name):
        assert not hasattr(processor, "to_k_ip"), "weights are held that nothing uses"
    else:
        assert torch.equal(processor.to_k_ip[0].weight, weights["ip_adapter"][f"{number}.to_k_ip.weight"])


def test_attentions_keep_their_names_and_their_order(stacked: Stacked) -> None:
    wanted = list(stacked.pipe.unet.attn_processors)
    for pruned in (stacked.load().unet, stacked.pruned(), copy.deepcopy(stacked.load().unet)):
        assert list(pruned.attn_processors) == wanted
        pruned.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        torch.testing.assert_close(stacked.output(pruned), stacked.output(stacked.pruned()), rtol=1e-4, atol=1e-5)
        pruned.set_default_attn_processor()


def test_an_image_prompt_works_in_the_pipeline_fades_and_is_taken_out_again(sd: Stacked) -> None:
    pipe = sd.load()
    plain = generated(pipe)
    pipe.load_ip_adapter(image_prompt_weights(sd.pipe.unet), **NOT_FROM_FILES)
    seen = {"ip_adapter_image_embeds": [torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(7))]}
    assert not np.allclose(generated(pipe, **seen), plain, atol=1e-2)
    pipe.set_ip_adapter_scale(0.0)
    assert np.array_equal(generated(pipe, **seen), plain)
    pipe.unload_ip_adapter()
    assert np.array_equal(generated(pipe), plain)


@pytest.mark.parametrize("kind", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_other_tasks_are_made_from_the_pruned_pipeline(kind: Any, stacked: Stacked) -> None:
    size = SIZE[stacked.family]
    given: dict[str, Any] = {"image": torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(8)), "strength": 1.0}
    if kind is AutoPipelineForInpainting:
        given |= {"mask_image": torch.ones(1, 1, size, size), "height": size, "width": size}
    pipe = stacked.load()
    other = kind.from_pipe(pipe)
    assert other.unet is pipe.unet
    dense = kind.from_pipe(stacked.pipe)
    assert generated(other, **given).shape == generated(dense, **given).shape
    assert not np.allclose(generated(other, **given), generated(dense, **given), atol=1e-2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_swapped_as_in_the_original(name: str, sd: Stacked) -> None:
    pipe, usual = sd.load(), generated(sd.load())
    ours = copy.copy(sd.pipe)
    ours.unet = sd.pruned()
    for each in (pipe, ours):
        each.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert np.array_equal(generated(pipe), generated(ours))
    assert not np.array_equal(generated(pipe), usual)


def test_free_u_and_residual_scales_act_on_what_is_left(sd: Stacked) -> None:
    pipe = sd.load()
    usual = generated(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not np.array_equal(generated(pipe), usual)
    pipe.disable_freeu()
    assert np.array_equal(generated(pipe), usual)


def test_the_choice_covers_blocks_attentions_and_single_layers(families: dict[str, Stacked]) -> None:
    for family, stacked in families.items():
        replaced = {type(stacked.pipe.unet.get_submodule(name)).__name__ for name in CHOSEN[family]}
        assert {"Attention", "ResnetBlock2D"} <= replaced
        assert replaced & {"Linear", "LoRACompatibleConv", "Conv2d"}
        assert replaced & {"Transformer2DModel", "BasicTransformerBlock"}
