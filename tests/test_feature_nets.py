"""Who looks: the judges, Inception, CLIP, CLAP and any module, from a file or folder, and what each is shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import linalg
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    RobertaTokenizer,
)

from conftest import Means, letter_tokenizer, real_pictures, tiny_audio
from ldpruner import Probe
from ldpruner.evaluation import FeatureNet, evaluate, judges
from ldpruner.evaluation.judges import CaptionJudge, PictureClassifier, load_judge, manner, save_judge, save_reference
from ldpruner.pipelines import Pipeline

PROBE = Probe(samples=8, num_inference_steps=2)


def test_a_judge_ships_what_it_saw_of_real_data(ldm: Pipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = PictureClassifier(classes=("a", "b", "c")).eval()
    folder = tmp_path / "model" / "judge"
    save_judge(judge, folder)
    save_reference(judge.observe(torch.rand(20, 1, 4, 4) * 2 - 1), folder)
    ldm.source = str(tmp_path / "model")
    result = evaluate(ldm, probe=PROBE)
    seen = {figure.metric: figure for figure in result.figures[0]}
    assert set(seen) == {"frechet", "kernel", "precision", "recall", "inception-score", "class-balance", "confidence"}
    assert seen["frechet"].features == "judge of model"
    assert seen["frechet"].reference == 20
    assert 1 / 3 <= seen["confidence"].value <= 1


def test_a_pruned_folder_is_judged_by_the_judge_of_its_base(ldm: Pipeline, tmp_path: Path) -> None:
    from ldpruner.evaluation.engine import judge_of

    (tmp_path / "record.json").write_text(json.dumps({"base": "zoo:fashion"}))
    found = judge_of(str(tmp_path))
    assert found is not None
    assert found[1] == "judge of zoo:fashion"
    assert judge_of("org/model") is None


def test_a_caption_judge_reads_what_it_has_learnt_and_is_the_same_when_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = CaptionJudge(classes=("google", "twitter"), words=("red", "apple", "google", "style")).eval().half().float()
    save_judge(judge, tmp_path)
    loaded = load_judge(tmp_path)
    assert isinstance(loaded, CaptionJudge)
    asked = ["red apple, google style", "Red  Apple Google style!", "blue moon"]
    told = loaded.describe(asked)
    assert torch.equal(told, judge.describe(asked))
    assert torch.allclose(told[0], told[1])
    assert told.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert [loaded.label(caption) for caption in asked] == [0, None, None]
    seen = loaded.observe(torch.zeros(2, 3, 64, 64))
    assert seen["features"].shape == (2, 128)
    assert seen["embeddings"].shape == (2, 96)


def test_manner_is_how_a_picture_is_drawn() -> None:
    white, black = torch.ones(1, 3, 64, 64), -torch.ones(1, 3, 64, 64)
    half, levels = torch.cat([white[..., :32], black[..., :32]], 3), judges.LEVELS**3
    told = manner(torch.cat([white, black, half]))
    assert told.shape == (3, judges.MANNER)
    assert (told >= 0).all()
    assert (told <= 1).all()
    palettes, margins = told[:, :levels], told[:, -2 * judges.MARGINS :]
    assert palettes[0].nonzero().flatten().tolist() == [levels - 1]
    assert palettes[1].nonzero().flatten().tolist() == [0]
    assert palettes[2, [0, -1]].tolist() == pytest.approx([0.5**0.5] * 2)
    assert margins.mean(1).tolist() == [0, 1, 0.5]
    assert margins[2].view(2, -1).sum(1).tolist() == [32, 32]
    assert torch.equal(manner(half.flip(3))[:, :-128], told[2:, :-128]), "a mirrored picture is drawn alike"
    assert manner(torch.rand(2, 3, 48, 40)).shape == (2, judges.MANNER)


def scripted(folder: Path) -> Path:
    """A TorchScript file that is called as FID's Inception is."""
    source = folder / "stand_in.py"
    source.write_text(
        "import torch\n"
        "class StandIn(torch.nn.Module):\n"
        "    def forward(self, images, return_features: bool = False, no_output_bias: bool = False):\n"
        "        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) / 255\n"
        "        if return_features:\n"
        "            return pooled\n"
        "        return pooled.softmax(1)\n"
    )
    import importlib.util

    spec = importlib.util.spec_from_file_location("stand_in", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = folder / "inception.pt"
    torch.jit.script(module.StandIn()).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_fid_and_kid_go_through_inception_from_a_file(ldm: Pipeline, tmp_path: Path) -> None:
    data = real_pictures(tmp_path / "real", 12)
    path = scripted(tmp_path)
    result = evaluate(ldm, probe=PROBE, features=[f"inception={path}"], metrics=["fid", "kid", "is"], reference=data)
    assert [figure.metric for figure in result.figures[0]] == ["frechet", "kernel", "inception-score"]
    assert {figure.features for figure in result.figures[0]} == {"inception-2015-12-05"}


def tiny_clip(folder: Path) -> Path:
    tokenizer = letter_tokenizer(length=16)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {
        **size,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=8)
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_score_cmmd_and_retrieval_go_through_clip_from_a_folder(text_to_image: Pipeline, tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    data = real_pictures(tmp_path / "real", 6, size=8)
    probe = Probe(samples=7, num_inference_steps=1, prompts=("a b", "c d", "e f", "g h", "i j", "k l"))
    names = ["clip-score", "cmmd", "retrieval-1", "retrieval-5", "frechet"]
    result = evaluate(text_to_image, probe=probe, features=[f"clip={folder}"], metrics=names, reference=data)
    assert {figure.metric for figure in result.figures[0]} == set(names)
    assert {figure.features for figure in result.figures[0]} == {f"clip {folder}"}
    notes = {figure.metric: figure.note for figure in result.figures[0]}
    assert notes["retrieval-1"] == "among 6 captions"
    assert notes["frechet"] == "fewer samples than the 8 features: compare at equal counts only"


def tiny_clap(folder: Path) -> Path:
    text = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
            "max_position_embeddings": 40, "projection_dim": 8}  # fmt: skip
    sound = {"hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2], "num_mel_bins": 16,
             "spec_size": 64, "window_size": 4, "num_classes": 4, "projection_dim": 8, "enable_fusion": False}  # fmt: skip
    torch.manual_seed(0)
    ClapModel(ClapConfig(text_config=text, audio_config=sound, projection_dim=8)).save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16000,
        frequency_max=8000,
        fft_window_size=1024,
        max_length_s=1,
        nb_max_samples=16000,
        truncation="rand_trunc",
    ).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    RobertaTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)
    return folder


def recordings(folder: Path, count: int) -> Path:
    from ldpruner.sound import write_wav

    folder.mkdir()
    for number in range(count):
        time = np.arange(1500 + 200 * number) / 8000
        write_wav(
            folder / f"{number % 10}_someone_{number}.wav", np.sin(2 * np.pi * (200 + 90 * number) * time).astype(np.float32), 8000
        )
    return folder


def test_fad_listens_to_what_the_pipeline_sounds_like(audio: Pipeline, tmp_path: Path, own_cache: Path) -> None:
    data = recordings(tmp_path / "real", 6)
    folder = tiny_clap(tmp_path / "clap")
    result = evaluate(
        audio, probe=Probe(samples=4, num_inference_steps=1), features=[f"clap={folder}"], metrics=["fad"], reference=data
    )
    figure = result.figures[0][0]
    assert (figure.metric, figure.features, figure.reference) == ("frechet", f"clap {folder}", 6)
    sound = next((own_cache / "sound").rglob("*.safetensors"))
    waves = load_file(sound)["waves"]
    assert waves.shape[0] == 4
    assert waves.shape[1] == 2 * audio.mel.slice_size  # type: ignore[union-attr]
    assert waves.abs().amax(1).tolist() == pytest.approx([0.9] * 4, rel=0.05), "spectrograms carry no loudness"
    parts = [load_file(file)["features"] for file in (own_cache / "features").rglob("*.safetensors")]
    held = {len(part): part for part in parts}
    a, b = held[6].double().numpy(), held[4].double().numpy()
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    by_hand = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)
    assert figure.value == pytest.approx(by_hand, rel=1e-3)


def test_real_recordings_are_seen_as_the_pipeline_pictures_sound(audio: Pipeline, tmp_path: Path) -> None:
    data = recordings(tmp_path / "real", 7)
    result = evaluate(audio, probe=PROBE, features=[Means().eval()], reference=data, metrics=["frechet"])
    assert result.figures[0][0].reference == 7
    assert result.task == "unconditional audio"


def test_features_of_any_kind_come_through_a_feature_net(ldm: Pipeline) -> None:
    net = FeatureNet(
        name="halves",
        digest="1",
        observe=lambda pictures: {"probabilities": torch.full((len(pictures), 2), 0.5)},
        gives=("probabilities",),
    )
    result = evaluate(ldm, probe=PROBE, features=[net])
    assert result["inception-score"] == pytest.approx(1)
    assert result["confidence"] == pytest.approx(0.5)


def test_an_audio_pipeline_sounds_the_same_every_time(audio: Pipeline) -> None:
    picture = audio.images(Probe(samples=1, num_inference_steps=1))[0]
    first, rate = audio.sound(picture)
    again, _ = Pipeline(tiny_audio(), source="again").sound(picture)
    assert rate == 8000
    assert np.array_equal(first, again)
    assert np.abs(first).max() > 0
