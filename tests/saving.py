"""Two tiny pruned pipelines, the folders that they are saved to, and the processes that load these."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import PROBE, tiny_ldm, tiny_stable_diffusion
from ldpruner import Edit, Plan, discover, workflow
from ldpruner.opening import _DTYPE
from ldpruner.operators.discovery import DeadCode
from ldpruner.pipelines import Pipeline
from ldpruner.workflow import Pruned

Chosen = dict[str, str]  # operator -> replacement

CHOSEN: dict[str, Chosen] = {
    "unconditional": {
        "down_blocks.0.downsamplers.0": "pointwise",
        "down_blocks.0.resnets.0.conv1": "pointwise",
        "down_blocks.1.resnets.0": "shortcut",
        "mid_block.attentions.0": "identity",
        "up_blocks.0.attentions.0.to_out.0": "zero",
    },
    "text-to-image": {
        "down_blocks.0.attentions.0": "identity",
        "down_blocks.1.resnets.0": "shortcut",
        "mid_block.attentions.0.transformer_blocks.0.attn2": "zero",
        "up_blocks.0.resnets.0.conv2": "pointwise",
        "up_blocks.0.upsamplers.0": "pointwise",
    },
}
RESAMPLING = {"down_blocks.0.downsamplers.0", "up_blocks.0.upsamplers.0"}  # no weights of a 3x3 convolution average a grid
INPUTS = {
    "unconditional": {"sample": (2, 4, 4, 4)},
    "text-to-image": {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 8, 16)},
}
FAMILIES = list(CHOSEN)

# What a user's process does; the lines before it say what it has imported by then, and what it cannot import.
CHILD = """
import json, sys, torch, diffusers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
work, jobs = sys.argv[1], json.loads(sys.argv[2])
for name, job in jobs.items():
    if "dtype" in job["options"]:
        job["options"][job["dtype_keyword"]] = getattr(torch, job["options"].pop("dtype"))
    try:
        loaded = getattr(diffusers, job["class"]).from_pretrained(job["folder"], **job["options"])
    except Exception as error:
        report[name] = {"error": f"{type(error).__name__}: {error}"}
        continue
    denoiser = getattr(loaded, "unet", loaded)
    if job["resave"]:
        loaded.save_pretrained(job["resave"])
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        tensor.data = tensor.data.clone()  # tensors of a file begin anywhere, and on AMD EPYC products then differ in last bits
    inputs = {key: tensor.to(denoiser.dtype).clone() for key, tensor in load_file(job["inputs"]).items()}
    with torch.no_grad():
        save_file({"output": denoiser(timestep=7, **inputs).sample.contiguous()}, f"{work}/{name}.safetensors")
    report[name] = {"class": type(denoiser).__name__, "stock": type(denoiser) is getattr(diffusers, type(denoiser).__name__)}
print(json.dumps(report))
"""
WITHOUT_US = """
import sys
sys.modules["ldpruner"] = None
try:
    import ldpruner
except ImportError as error:
    report = {"import ldpruner": str(error)}
"""
LDPRUNER_FIRST = """
import sys, ldpruner
report = {"brought": sorted({"torch", "diffusers", "transformers"} & set(sys.modules))}
"""
DIFFUSERS_FIRST = """
from diffusers import DiffusionPipeline
import ldpruner
report = {}
"""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One family's pruned pipeline, and the folders that it was saved to."""

    pruned: Pruned
    dense: Pruned  # by the same plan without the edits that the dense form cannot hold
    folder: Path
    inputs: Path

    def output(self, denoiser: nn.Module) -> Tensor:
        return output_of(denoiser, load_file(self.inputs))


@dataclass(frozen=True, kw_only=True)
class Child:
    """What another process found."""

    report: dict[str, Any]
    work: Path

    def output(self, name: str) -> Tensor:
        assert "error" not in self.report[name], self.report[name]
        return load_file(self.work / f"{name}.safetensors")["output"]

    def error(self, name: str) -> str:
        assert "error" in self.report[name], f"{name} loaded"
        return str(self.report[name]["error"])


@torch.no_grad()
def pruned_family(family: str, folder: Path) -> Saved:
    """One family pruned, and saved whole in three forms."""
    pipe = tiny_ldm() if family == "unconditional" else tiny_stable_diffusion(folder)
    pipeline = Pipeline(pipe, source=f"tiny-{family}")
    plan = plan_for(pipeline, CHOSEN[family])
    pruned = workflow.prune(pipeline, plan=plan)
    dense = workflow.prune(pipeline, plan=without(plan, lambda edit: edit.operator in RESAMPLING))
    pruned.save_pretrained(folder / "portable")
    pruned.save_pretrained(folder / "plugin", form="plugin")
    dense.save_pretrained(folder / "dense", form="dense")
    generator = torch.Generator().manual_seed(1)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in INPUTS[family].items()}, folder / "inputs")
    return Saved(pruned=pruned, dense=dense, folder=folder, inputs=folder / "inputs")


def output_of(denoiser: Any, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = denoiser(timestep=7, **{name: tensor.to(denoiser.dtype).clone() for name, tensor in inputs.items()}).sample
    return output


def plan_for(pipeline: Pipeline, chosen: Chosen) -> Plan:
    """A plan with these replacements and what dies with them."""
    call = pipeline.call(PROBE)
    operators = discover(pipeline.denoiser, call, timing_repeats=0)
    edits = [Edit(operator=name, replacement=how, options=operators[name].candidate(how).options) for name, how in chosen.items()]
    edits = list(DeadCode(pipeline.denoiser, call, operators).completed(edits))
    return Plan(model=operators.model, denoiser=operators.denoiser, edits=tuple(edits), probe=PROBE)


def without(plan: Plan, unwanted: Callable[[Edit], bool]) -> Plan:
    return Plan(
        model=plan.model, denoiser=plan.denoiser, edits=tuple(edit for edit in plan.edits if not unwanted(edit)), probe=plan.probe
    )


def job(saved: Saved, form: str, *, via: str = "DiffusionPipeline", resave: Path | None = None, **options: Any) -> dict[str, Any]:
    paths = {"folder": str(saved.folder / form), "inputs": str(saved.inputs), "resave": str(resave) if resave else None}
    return {**paths, "class": via, "options": options, "dtype_keyword": _DTYPE}


def run_child(imports: str, jobs: dict[str, Any], work: Path) -> Child:
    """Do `jobs` in a new process, whose caches are its own."""
    environment = {**os.environ, "HF_HOME": str(work / "home"), "HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, "-c", imports + CHILD, str(work), json.dumps(jobs)]
    ended = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return Child(report=json.loads(ended.stdout.splitlines()[-1]), work=work)


def edit_config(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a saved folder whose denoiser's `quantization_config` was changed by hand."""
    for file in source.rglob("*.*"):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    path = target / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")
    return target
