"""Pruned pipelines saved in the portable form, and what users stack on them: LoRAs, ControlNets and IP-Adapters of the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from pipelines_unet import stable_diffusion_xl
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import PROBE, tiny_stable_diffusion
from ldpruner import Edit, Plan, artifacts, surgery
from ldpruner.ldpruner_v1 import STAND_INS
from ldpruner.operators import discover
from ldpruner.operators.discovery import DeadCode
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Operators, corrected, within

SECOND = "transformer_blocks.0.attn2"
CHOSEN: dict[str, dict[str, str]] = {  # whole blocks, attentions, and single layers, by every kind of stand-in
    "sd": {
        "down_blocks.0.attentions.0": "identity",
        "down_blocks.1.resnets.0": "shortcut",
        f"mid_block.attentions.0.{SECOND}": "zero",
        "up_blocks.0.resnets.0.conv2": "pointwise",
        "up_blocks.0.upsamplers.0": "pointwise",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "identity",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "zero",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1": "pointwise",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.0": "identity",
        f"mid_block.attentions.0.{SECOND}": "pointwise",
        "up_blocks.0.attentions.0": "identity",
        f"up_blocks.0.attentions.1.{SECOND}.to_out.0": "zero",
        "up_blocks.1.resnets.0": "shortcut",
        "up_blocks.1.resnets.1.conv2": "pointwise",
    },
}
BUILT: dict[str, Callable[[], DiffusionPipeline]] = {"sd": lambda: tiny_stable_diffusion(Path()), "sdxl": stable_diffusion_xl}
SIZE = {"sd": 8, "sdxl": 16}  # of pictures, for latents of 8x8
FAMILIES = list(CHOSEN)


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A family's original, and what was made of it."""

    family: str
    pipe: DiffusionPipeline  # the original
    plan: Plan
    fitted: surgery.Fitted
    folder: Path

    def load(self, **options: Any) -> DiffusionPipeline:
        """The pruned pipeline, by plain diffusers."""
        return DiffusionPipeline.from_pretrained(self.folder, trust_remote_code=True, **options)

    def pruned(self, denoiser: nn.Module | None = None) -> nn.Module:
        """The original pruned in memory, or a changed copy of it."""
        return surgery.prune(denoiser or self.pipe.unet, self.plan, fitted=self.fitted)

    def inputs(self, **more: Any) -> dict[str, Any]:
        """The arguments of a call of the denoiser."""
        generator = torch.Generator().manual_seed(1)
        width = self.pipe.unet.config.cross_attention_dim
        shapes = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 8, width)}
        inputs: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        added = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)}
        if self.family == "sdxl" or "added_cond_kwargs" in more:
            inputs["added_cond_kwargs"] = (added if self.family == "sdxl" else {}) | more.pop("added_cond_kwargs", {})
        return {"timestep": torch.tensor(7), **inputs, **more}

    @torch.no_grad()
    def output(self, denoiser: Any, **more: Any) -> Tensor:
        inputs = as_dtype(self.inputs(**more), denoiser.dtype)
        output: Tensor = denoiser(**inputs).sample
        return output

    def lost(self, name: str) -> bool:
        """Whether a layer of the original is not in the pruned one."""
        kept = [f"{edit.operator}.{edit.options['child']}" for edit in self.plan.edits if edit.replacement == "shortcut"]
        return any(within(name, edit.operator) for edit in self.plan.edits) and not any(within(name, child) for child in kept)


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Every tensor of floating point in that type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: as_dtype(each, dtype) for name, each in value.items()}
    return [as_dtype(each, dtype) for each in value] if isinstance(value, list) else value


def build(family: str, folder: Path) -> Stacked:
    """Prune by hand, with weights for every stand-in that can have some, and save."""
    pipe = BUILT[family]()
    pipeline = Pipeline(pipe, source=family)
    call = pipeline.call(PROBE)
    operators = discover(pipeline.denoiser, call, timing_repeats=0)
    plan = plan_of(pipeline.denoiser, operators, call, CHOSEN[family])
    fitted = random_weights(pipeline.denoiser, plan.edits)
    artifacts.save(pipeline, surgery.prune(pipeline.denoiser, plan, fitted=fitted), plan, folder)
    return Stacked(family=family, pipe=pipe, plan=plan, fitted=fitted, folder=folder)


def plan_of(denoiser: nn.Module, operators: Operators, call: Any, chosen: dict[str, str]) -> Plan:
    edits = [Edit(operator=name, replacement=how, options=operators[name].candidate(how).options) for name, how in chosen.items()]
    edits = list(corrected(DeadCode(denoiser, call, operators).completed(edits), operators))
    assert {edit.replacement for edit in edits} >= {"identity", "zero", "shortcut", "pointwise"}
    return Plan(model=operators.model, denoiser=operators.denoiser, edits=tuple(edits), probe=PROBE)


def random_weights(denoiser: nn.Module, edits: tuple[Edit, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """A pair for each stand-in that holds weights, near to what would do nothing."""
    generator, fitted = torch.Generator().manual_seed(2), {}

    def near(values: Tensor, spread: float) -> Tensor:
        return values.detach() + spread * torch.randn(values.shape, generator=generator)

    for edit in edits:
        if edit.replacement == "pointwise":
            given, made = edit.options["channels"]
            fitted[edit.operator] = near(torch.eye(made, given), 0.3), near(torch.zeros(made), 0.1)
        elif edit.replacement == "shortcut" and "correction" in edit.options:
            child: Any = denoiser.get_submodule(f"{edit.operator}.{edit.options['child']}")
            fitted[surgery.correction_of(edit.operator)] = near(child.weight, 0.1), near(child.bias, 0.1)
        elif "correction" in edit.options:
            ones = torch.ones(edit.options["correction"])
            fitted[surgery.correction_of(edit.operator)] = near(ones, 0.2), near(0 * ones, 0.1)
    return fitted


def generated(pipe: Any, **more: Any) -> np.ndarray[Any, Any]:
    """A picture in two steps, the same every time."""
    asked = {"prompt": "a", "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    picture: np.ndarray[Any, Any] = torch.as_tensor(pipe(**asked | more).images).float().numpy()
    assert np.isfinite(picture).all()
    return picture


class Lora:
    """Low-rank additions to every linear map and convolution of a denoiser, as `unet.PATH.lora_A.weight` and `lora_B`."""

    def __init__(self, denoiser: nn.Module, *, rank: int = 2, only: Callable[[str], bool] = lambda name: True) -> None:
        self.rank, self.weights, self.added = rank, dict[str, Tensor](), dict[str, Tensor]()
        generator = torch.Generator().manual_seed(3)
        for name, module in denoiser.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d) or not only(name):
                continue
            into = 0.2 * torch.randn(rank, *module.weight.shape[1:], generator=generator)
            out = 0.2 * torch.randn(len(module.weight), rank, *(1,) * (module.weight.ndim - 2), generator=generator)
            self.weights |= {f"unet.{name}.lora_A.weight": into, f"unet.{name}.lora_B.weight": out}
            self.added[name] = torch.einsum("or,r...->o...", out.flatten(1), into)
        assert self.weights

    def merged(self, pruned: nn.Module, share: float = 1.0) -> nn.Module:
        """A copy of what a model was pruned to, with the additions made by hand where it has the layer."""
        changed, layers = copy.deepcopy(pruned), {f"{name}.weight": added for name, added in self.added.items()}
        for name, parameter in changed.named_parameters():
            parameter.data += share * layers.get(name, torch.zeros(()))
        return changed

    def lost(self, stacked: Stacked) -> list[str]:
        """The tensors whose layers are gone."""
        return sorted(key for key in self.weights if stacked.lost(key.removeprefix("unet.").rpartition(".lora_")[0]))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write it, and what loads it."""
        save_file(self.weights, folder / "lora.safetensors")
        return {"pretrained_model_name_or_path_or_dict": folder, "weight_name": "lora.safetensors"}

    def as_kohya(self, alpha: float) -> dict[str, Tensor]:
        """In the form of the scripts that most published LoRAs come from, in which `alpha / rank` scales what is added."""
        written = {}
        for key, tensor in self.weights.items():
            name, _, factor = key.removeprefix("unet.").removesuffix(".weight").rpartition(".")
            layer = f"lora_unet_{name.replace('.', '_')}"
            written[f"{layer}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = tensor
            written[f"{layer}.alpha"] = torch.tensor(alpha)
        return written


def image_prompt_weights(denoiser: Any) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter's file for the denoiser: keys and values for each cross-attention, by its number, and a projection."""
    width, generator = denoiser.config.cross_attention_dim, torch.Generator().manual_seed(4)
    names = [name for name in denoiser.attn_processors if "attn2" in name]
    assert names
    adapter = {}
    for number, name in enumerate(names):
        channels = denoiser.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for what in ("to_k_ip", "to_v_ip"):
            adapter[f"{2 * number + 1}.{what}.weight"] = 0.3 * torch.randn(channels, width, generator=generator)
    projection = {"proj.weight": torch.randn(4 * width, 12, generator=generator), "proj.bias": torch.zeros(4 * width)}
    return {"ip_adapter": adapter, "image_proj": projection | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}}


def controlnet(stacked: Stacked) -> Any:
    """A ControlNet that starts from the original and has learnt something: its outputs begin as zeros."""
    halving = {"sd": (16,), "sdxl": (16, 32)}[stacked.family]  # as often as the tiny autoencoders do, where real ones do thrice
    made = ControlNetModel.from_unet(stacked.pipe.unet, conditioning_embedding_out_channels=halving).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for gate in (*made.controlnet_down_blocks, made.controlnet_mid_block):
            gate.weight.copy_(0.5 * torch.randn(gate.weight.shape, generator=generator))
    return made


def is_stand_in(module: nn.Module) -> bool:
    """Whether it is one of ours, be it from the package or from the file in a saved folder."""
    return type(module).__name__ in {kind.__name__ for kind in STAND_INS.values()}
