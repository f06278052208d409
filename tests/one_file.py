"""A Stable Diffusion pipeline as one file in the layout that it was first given out in, with its names, and a plan for it."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ldpruner import Edit, Plan
from ldpruner.operators.tracing import architecture
from ldpruner.probes import Probe

PROBE = Probe(samples=2, num_inference_steps=2, prompts=("a", "b"))
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def in_first_layout(pipe: Any) -> dict[str, Tensor]:
    """Every weight of a Stable Diffusion 1 pipeline under its first name."""
    unet = {f"model.diffusion_model.{_of_unet(name, pipe.unet)}": value for name, value in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.block_out_channels)
    vae = {f"first_stage_model.{_of_vae(name, blocks)}": _as_stored(name, value) for name, value in pipe.vae.state_dict().items()}
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in pipe.text_encoder.state_dict().items()
    }
    return {name: value.contiguous() for name, value in {**unet, **vae, **text}.items()}


def small_plan(pipe: Any) -> Plan:
    """A plan for the tiny pipeline that takes no search: one block goes, and one keeps its skip path alone."""
    first, second = "down_blocks.1.resnets.0", "mid_block.resnets.1"
    edits = (
        Edit(
            operator=first, replacement="shortcut", options={"source": [0, "input_tensor"], "child": "conv_shortcut", "scale": 1.0}
        ),
        Edit(operator=second, replacement="identity", options={"returns": [[0, "input_tensor"]], "many": False}),
    )
    return Plan(model=architecture(pipe.unet), denoiser="UNet2DConditionModel", edits=edits, probe=PROBE)


def _of_unet(name: str, unet: Any) -> str:
    layers = unet.config.layers_per_block
    module, _, parameter = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{parameter}"
    side, *rest = module.split(".")
    if side == "mid_block":
        part, number, *inner = rest
        place = f"middle_block.{2 * int(number) if part == 'resnets' else 1}"
    else:
        block, part, number, *inner = rest
        down = side == "down_blocks"
        index = int(block) * (layers + 1) + (layers if part.endswith("samplers") else int(number)) + down
        last = 2 if hasattr(unet.get_submodule(f"{side}.{block}"), "attentions") else 1
        slot = {"resnets": "0", "attentions": "1", "downsamplers": "0.op", "upsamplers": f"{last}.conv"}[part]
        place = f"{'input' if down else 'output'}_blocks.{index}.{slot}"
        inner = [] if part.endswith("samplers") else inner
    if "resnets" in rest:
        inner = [RESNET[inner[0]]]
    return ".".join([place, *inner, parameter])


def _of_vae(name: str, blocks: int) -> str:
    for old, new in ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{old}.", f"mid.attn_1.{new}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{blocks - 1 - int(found[1])}.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", name)
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _as_stored(name: str, value: Tensor) -> Tensor:
    """Attention's maps lie there as 1x1 convolutions."""
    linear = "mid_block.attentions.0" in name and name.endswith("weight") and value.ndim == 2
    return value[..., None, None] if linear else value
