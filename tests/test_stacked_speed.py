"""What makes a pipeline smaller or faster stacks on a pruned one: number formats, files in parts, offloading, slicing,
compiling. Each hooks into a model's modules in its own way, and has to find the weights of stand-ins too."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, UNet2DConditionModel

import ldpruner
from ldpruner import surgery
from ldpruner.opening import _DTYPE, FORMAT_MODULE
from stacking import Stacked, generated, is_stand_in

HALVES = [torch.float16, torch.bfloat16]
ACCELERATED = torch.accelerator.is_available()

# of diffusers' own schedulers, with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")


def with_loader(folder: Path, stacked: Stacked) -> Path:
    """A folder that diffusers saved, made portable again: it says where the loader is, and has it."""
    shutil.copy(stacked.folder / "model_index.json", folder)
    shutil.copy(stacked.folder / "unet" / f"{FORMAT_MODULE}.py", folder / "unet")
    return folder


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_is_the_same_asked_for_at_loading_or_after(half: torch.dtype, stacked: Stacked) -> None:
    loaded, cast = stacked.load(**{_DTYPE: half}), stacked.load().to(half)
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {half}
    assert torch.equal(stacked.output(loaded.unet), stacked.output(cast.unet))
    assert torch.equal(stacked.output(loaded.unet), stacked.output(stacked.pruned().to(half)))
    assert np.array_equal(generated(loaded, output_type="latent"), generated(cast, output_type="latent"))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [None, "40KB"])
def test_variants_and_shards_load_with_the_same_bits(
    variant: str | None, shards: str | None, stacked: Stacked, tmp_path: Path
) -> None:
    options: dict[str, Any] = {_DTYPE: torch.float16} if variant else {}
    pipe = stacked.load(**options)
    pipe.save_pretrained(tmp_path, variant=variant, **({"max_shard_size": shards} if shards else {}))
    files = sorted(file.name for file in (tmp_path / "unet").glob("*.safetensors"))
    assert (len(files) > 2) == (shards is not None)
    assert all(".fp16." in name or ".fp16-" in name for name in files) == (variant is not None)
    for folder in (tmp_path, with_loader(tmp_path, stacked)):
        again = DiffusionPipeline.from_pretrained(folder, variant=variant, trust_remote_code=True, **options)
        assert torch.equal(stacked.output(again.unet), stacked.output(pipe.unet))
    ours = ldpruner.load(tmp_path, variant=variant, **({"dtype": torch.float16} if variant else {}))
    assert torch.equal(stacked.output(ours.denoiser), stacked.output(pipe.unet))


def test_the_whole_is_offloaded_part_by_part_where_there_is_an_accelerator(sd: Stacked) -> None:
    pipe = sd.load()
    if ACCELERATED:
        pipe.enable_model_cpu_offload()
        assert generated(pipe).shape == (1, 8, 8, 3)
    else:
        with pytest.raises(RuntimeError, match="`enable_model_cpu_offload` requires accelerator, but not found"):
            pipe.enable_model_cpu_offload()


def test_the_hooks_that_offload_a_whole_change_no_bit(stacked: Stacked) -> None:
    pipe, usual = stacked.load(), generated(stacked.load())
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(generated(pipe), usual)


def test_weights_that_are_there_only_while_their_module_runs_give_the_same_bits(stacked: Stacked) -> None:
    unet = stacked.load().unet
    before = stacked.output(unet)
    cpu_offload(unet, execution_device="cpu", offload_buffers=True)
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert torch.equal(stacked.output(unet), before)


@pytest.mark.parametrize("how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_groups_of_modules_are_offloaded_and_give_the_same_bits(how: dict[str, Any], stacked: Stacked) -> None:
    unet = stacked.load().unet
    before = stacked.output(unet)
    unet.enable_group_offload(onload_device=torch.device("cpu"), **how)
    assert torch.equal(stacked.output(unet), before)


def test_weights_kept_in_eight_bits_and_cast_layer_by_layer_work_in_stand_ins_too(stacked: Stacked) -> None:
    unet = stacked.load().unet
    before = stacked.output(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    maps = [module.map for module in unet.modules() if is_stand_in(module) and hasattr(module, "map")]
    assert maps
    assert {linear.weight.dtype for linear in maps} == {torch.float8_e4m3fn}
    assert 0 < relative_error(stacked.output(unet), before) < 0.2


def relative_error(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


def test_attention_in_slices_works_where_some_of_it_is_gone(stacked: Stacked) -> None:
    pipe = stacked.load()
    usual = generated(pipe)
    pipe.enable_attention_slicing(1)
    kinds = {type(processor).__name__ for processor in pipe.unet.attn_processors.values()}
    assert "SlicedAttnProcessor" in kinds
    np.testing.assert_allclose(generated(pipe), usual, atol=1e-4)
    pipe.disable_attention_slicing()
    np.testing.assert_allclose(generated(pipe), usual, atol=1e-4)


def test_decoding_in_slices_and_tiles_works_as_in_the_original(sd: Stacked) -> None:
    pipe = sd.load()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    asked = {"height": 16, "width": 16, "num_images_per_prompt": 2}
    latents = torch.from_numpy(generated(pipe, **asked | {"output_type": "latent"})).split(1)
    with torch.no_grad():
        parts = [sd.pipe.vae.tiled_decode(one / sd.pipe.vae.config.scaling_factor).sample for one in latents]
    wanted = sd.pipe.image_processor.postprocess(torch.cat(parts), output_type="np")
    np.testing.assert_allclose(generated(pipe, **asked), wanted, atol=1e-5)


@pytest.mark.slow
def test_the_denoiser_is_compiled_into_one_graph_once(sd: Stacked) -> None:
    unet = sd.load().unet
    before, other = sd.output(unet), sd.output(unet, timestep=torch.tensor(9))
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")  # a graph break would be an error
    assert torch.equal(sd.output(compiled), before)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(sd.output(compiled, timestep=torch.tensor(9)), other)


def test_blocks_that_repeat_are_compiled_where_they_are_left(families: dict[str, Stacked]) -> None:
    stacked = families["sdxl"]
    unet = stacked.load().unet
    before = stacked.output(unet)
    torch._dynamo.reset()
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(stacked.output(unet), before)


@pytest.mark.parametrize("where", ["auto", "balanced", "cpu", {"": "cpu"}])
def test_the_denoiser_alone_takes_a_device_map(where: Any, sd: Stacked) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd.folder, subfolder="unet", device_map=where)
    if not ACCELERATED:
        assert {str(device) for device in unet.hf_device_map.values()} == {"cpu"}
    output = sd.output(unet.to("cpu")) if not ACCELERATED else sd.output(unet)
    assert torch.equal(output, sd.output(sd.pruned()))


def test_a_portable_pipeline_takes_one_device_but_is_not_balanced_over_several(sd: Stacked, tmp_path: Path) -> None:
    """diffusers forgets `trust_remote_code` there, and asks for it; the plugin form has nothing to trust."""
    assert np.array_equal(generated(sd.load(device_map="cpu")), generated(sd.load()))
    with pytest.raises(ValueError, match=f"contains custom code in {FORMAT_MODULE}.py which must be executed"):
        sd.load(device_map="balanced")
    sd.load().save_pretrained(tmp_path)
    balanced = DiffusionPipeline.from_pretrained(tmp_path, device_map="balanced")
    assert generated(balanced).shape == (1, 8, 8, 3)


def test_projections_are_fused_where_attentions_are_whole_or_gone_and_refused_where_one_is_a_stand_in(sd: Stacked) -> None:
    unet = sd.load().unet
    with pytest.raises(AttributeError, match="'Identity' object has no attribute 'weight'"):
        unet.fuse_qkv_projections()
    edits = tuple(edit for edit in sd.plan.edits if not edit.operator.endswith("to_q"))
    unet = surgery.prune(sd.pipe.unet, replace(sd.plan, edits=edits), fitted=sd.fitted)
    before = sd.output(unet)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(sd.output(unet), before, rtol=1e-4, atol=1e-5)
