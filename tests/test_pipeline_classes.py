"""Pipeline classes of diffusers, tiny and random: scored, pruned, saved, loaded by plain diffusers, sampled.

Prompts, class labels, pictures or nothing, as each class's call asks. Most run by `make test-all` alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import ClapModel

import ldpruner
from ldpruner.calling import made_up_picture
from ldpruner.errors import PipelineError
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.reporting import save_samples
from ldpruner.sound import read_wav
from ldpruner.surgery import removed_operators

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

import pipelines_transformer  # noqa: F401  fills the table
import pipelines_unet  # noqa: F401
from tiny import TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # what diffusers' classes warn of is not ours to mend

FEW = ("DiTPipeline", "FluxPipeline", "PixArtSigmaPipeline", "StableAudioPipeline")
MADE = ("prompt", "prompt_embeds", "negative_prompt_embeds", "image", "class_labels")  # what a probe or a pipeline handle makes
TASKS = {
    "DiTPipeline": "class-conditional image",
    "LDMPipeline": "unconditional image",
    "StableAudioPipeline": "text-to-audio",
    "StableVideoDiffusionPipeline": "image-to-video",
    "WanPipeline": "text-to-video",
}


@pytest.fixture
def tensors_from_clap(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLAP's text features as transformers 4 gave them: what MusicLDMPipeline takes; it does not run with those of 5."""
    features = ClapModel.get_text_features

    def as_tensor(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = features(self, *args, **kwargs)
        return made if isinstance(made, torch.Tensor) else made.pooler_output

    monkeypatch.setattr(ClapModel, "get_text_features", as_tensor)


def tiny(name: str, component: str | None = None) -> tuple[Pipeline, Probe]:
    build, call = TINY[name]
    pipeline = Pipeline(build(), source=name, component=component)
    prompts = ("a cat", "two dogs") if pipeline.takes("prompt") else ()
    call = {argument: value for argument, value in call.items() if argument not in MADE}
    return pipeline, Probe(samples=2, num_inference_steps=2, prompts=prompts, call=call)


def lay_anew(pipe: DiffusionPipeline) -> None:
    """Let weights begin where those of PyTorch do: a file's may not, and on AMD EPYC products then differ in last bits."""
    for part in pipe.components.values():
        for tensor in (*part.parameters(), *part.buffers()) if isinstance(part, torch.nn.Module) else ():
            tensor.data = tensor.data.clone()


@pytest.mark.slow
@pytest.mark.usefixtures("tensors_from_clap")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else [pytest.mark.exhaustive]) for n in sorted(TINY)])
def test_a_pipeline_is_scored_pruned_saved_loaded_and_sampled(name: str, tmp_path: Path) -> None:
    pipeline, probe = tiny(name)
    assert name not in TASKS or pipeline.task == TASKS[name]
    run = ldpruner.score(pipeline, probe, method="paper", replacements=["zero"])
    assert any(score.score > 0 for score in run.scores)
    plan = ldpruner.plan(pipeline, run, {"macs": "90%"}, selection="order").plan
    pruned = ldpruner.prune(pipeline, plan=plan)
    pruned.save_pretrained(tmp_path / "out")
    again = ldpruner.load(tmp_path / "out")
    lay_anew(again.pipe)
    assert again.latents(probe).equal(Pipeline(pruned.pipe, source=name).latents(probe))
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    lay_anew(plain)
    assert type(plain) is type(pipeline.pipe)
    assert Pipeline(plain, source=name).latents(probe).equal(again.latents(probe))
    assert not again.latents(probe).equal(pipeline.latents(probe))


@pytest.mark.parametrize(
    ("name", "kind", "files"),
    [
        ("StableAudioPipeline", "sounds", {"seed-00000.wav", "seed-00001.wav"}),
        ("WanPipeline", "videos", {"seed-00000.gif", "seed-00001.gif", "sheet.png"}),
    ],
)
def test_sounds_and_videos_are_sampled_as_what_they_are(name: str, kind: str, files: set[str], tmp_path: Path) -> None:
    pipeline, probe = tiny(name)
    names, told = save_samples(pipeline, probe, tmp_path / "out")
    assert told == kind
    assert set(names) <= files == {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    if kind == "videos":
        assert Image.open(tmp_path / "out" / names[0]).n_frames == probe.call["num_frames"]
    else:
        wave, rate = read_wav((tmp_path / "out" / names[0]).read_bytes(), names[0])
        assert rate == pipeline.pipe.vae.config.sampling_rate
        assert len(wave) == len(pipeline.waves(probe)[0][0])


def test_two_denoisers_of_one_pipeline_are_told_apart_and_both_pruned(tmp_path: Path) -> None:
    first, probe = tiny("WanPipeline")
    assert first.component == "transformer"
    once = ldpruner.prune(first, {"macs": "90%"}, probe=probe, method="magnitude", replacements=["zero"], selection="order")
    once.save_pretrained(tmp_path / "once")
    second = ldpruner.load(tmp_path / "once", component="transformer_2")
    twice = ldpruner.prune(second, {"macs": "80%"}, probe=probe, method="magnitude", replacements=["zero"], selection="order")
    twice.save_pretrained(tmp_path / "twice")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "twice", trust_remote_code=True)
    assert removed_operators(plain.transformer) == removed_operators(once.denoiser)
    assert removed_operators(plain.transformer_2) == removed_operators(twice.denoiser)


def test_a_part_that_the_steps_do_not_reach_is_named() -> None:
    pipeline, probe = tiny("WanPipeline", component="transformer_2")
    with pytest.raises(PipelineError, match="transformer_2 is not called in 1 steps"):
        pipeline.call(Probe(samples=1, num_inference_steps=1, prompts=("a",), call=probe.call))


def test_a_part_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(PipelineError, match=r"has no part 'unet' to prune.*transformer"):
        tiny("DiTPipeline", component="unet")


def test_an_argument_that_the_call_does_not_take_is_refused() -> None:
    pipeline, _ = tiny("DiTPipeline")
    with pytest.raises(PipelineError, match="takes no hight"):
        pipeline.latents(Probe(samples=1, num_inference_steps=2, call={"hight": 8}))


def test_a_picture_to_start_from_is_the_same_for_a_seed_and_another_for_the_next() -> None:
    assert made_up_picture(3, (8, 12)).size == (12, 8)
    assert made_up_picture(3, (8, 12)).tobytes() == made_up_picture(3, (8, 12)).tobytes()
    assert made_up_picture(3, (8, 12)).tobytes() != made_up_picture(4, (8, 12)).tobytes()


def test_more_of_the_call_is_kept_with_a_probe_and_absent_where_there_is_none() -> None:
    probe = Probe(call={"height": 16})
    assert Probe.from_json(probe.to_json()) == probe
    assert "call" not in Probe().to_json()
