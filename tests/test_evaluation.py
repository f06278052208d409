"""Evaluation: the metrics are the published formulas, what nets see is kept, and nothing asked for is left out in silence."""

from __future__ import annotations

import functools
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import linalg
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    RobertaTokenizer,
)

from conftest import letter_tokenizer, tiny_audio, tiny_ldm
from ldpruner import Probe
from ldpruner.evaluation import METRICS, FeatureNet, captions, coverage, evaluate, kernel, labels, paired
from ldpruner.evaluation.base import Stream, rows
from ldpruner.evaluation.frechet import frechet_distance
from ldpruner.evaluation.judges import CaptionJudge, PictureClassifier, load_judge, save_judge, save_reference
from ldpruner.pipelines import Pipeline
from ldpruner.scoring.latent import latent_shift

RANDOM = np.random.default_rng(0)


def stream(tensor: Tensor | np.ndarray[Any, Any], size: int = 37) -> Stream:
    """A tensor in uneven parts."""
    whole = torch.as_tensor(tensor)
    return lambda: iter(torch.split(whole, size))


def features(count: int, width: int = 6, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(RANDOM.normal(shift, scale, (count, width)))


class Means(nn.Module):
    """A feature net: every channel's mean and spread, and those of two halves."""

    num_features = 6

    def forward(self, pictures: Tensor) -> Tensor:
        values = pictures.double()
        half = values.shape[2] // 2
        parts = (values, values[:, :, :half], values[:, :, half:])
        return torch.cat([torch.stack([part.mean((1, 2, 3)), part.std((1, 2, 3))], 1) for part in parts], 1)


def test_frechet_distance_is_the_formula() -> None:
    a, b = features(400), features(300, shift=0.5, scale=1.5)
    covariances = [np.cov(each.numpy(), rowvar=False) for each in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    by_hand = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(stream(a), stream(b)) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_frechet_and_kernel_distance_agree_with_torchmetrics_around_the_same_net() -> None:
    real, fake = (torch.from_numpy(RANDOM.integers(low, 255, (60, 3, 8, 8))).to(torch.uint8) for low in (0, 60))
    net = Means().eval()
    frechet = FrechetInceptionDistance(feature=net, normalize=False, input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    distance = KernelInceptionDistance(feature=net, subsets=1, subset_size=60, normalize=False)
    for metric in (frechet, distance):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    ours = frechet_distance(stream(net(real)), stream(net(fake)))
    assert ours == pytest.approx(float(frechet.compute()), rel=1e-9)
    whole = kernel.unbiased_mmd2(net(real), net(fake))
    assert whole == pytest.approx(float(distance.compute()[0]), rel=1e-5)


def test_kernel_distance_is_unbiased_and_its_error_is_that_of_the_mean() -> None:
    same = [kernel.kernel_distance(stream(features(200)), stream(features(200)), blocks=10) for _ in range(40)]
    values = np.array([estimate.value for estimate in same])
    errors = np.array([estimate.error for estimate in same])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values)), "equal distributions: zero on average, not above it"
    assert values.min() < 0 < values.max()
    assert errors.mean() == pytest.approx(values.std(), rel=0.3), "what it says it errs by is what it errs by"
    assert kernel.kernel_distance(stream(features(200)), stream(features(200, shift=1.0)), blocks=10).value > 10 * errors.mean()


def test_cmmd_is_the_formula() -> None:
    a, b = (nn.functional.normalize(features(count), dim=1) for count in (30, 50))

    def mean(x: Tensor, y: Tensor) -> float:
        return float(np.exp(-cdist(x, y, "sqeuclidean") / 200).mean())

    assert kernel.cmmd(stream(a), stream(b, 7)) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-9)


def test_precision_and_recall_are_the_formula() -> None:
    real, fake = features(80, 3), features(70, 3, shift=0.8, scale=0.5)

    def within(manifold: Tensor, asked: Tensor) -> float:
        radii = np.sort(cdist(manifold, manifold), axis=1)[:, 3]
        return float((cdist(asked, manifold) <= radii).any(axis=1).mean())

    assert coverage.share_within(stream(real, 9), stream(fake, 11)) == pytest.approx(within(real, fake))
    assert coverage.share_within(stream(fake, 11), stream(real, 9)) == pytest.approx(within(fake, real))
    assert within(fake, real) < 0.7 < within(real, fake), "what is drawn from a part is precise and misses the rest"


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std\\(\\)")
def test_inception_score_is_that_of_torchmetrics() -> None:
    logits = features(400, 10, scale=2.0).float()
    theirs = InceptionScore(feature=_Given(10), splits=1)
    theirs.update(logits)
    ours = labels.inception_score(stream(logits.softmax(1)), splits=1)
    assert ours.value == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
    assert ours.error is None
    assert labels.inception_score(stream(logits.softmax(1)), splits=4).error > 0  # type: ignore[operator]


class _Given(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, given: Tensor) -> Tensor:
        return given


def test_class_balance_is_one_where_classes_are_equally_often_and_zero_where_one_is_all() -> None:
    balanced = torch.eye(5).repeat(8, 1)
    assert labels.class_balance(stream(balanced)) == pytest.approx(1)
    assert labels.class_balance(stream(balanced[:1].repeat(9, 1))) == pytest.approx(0, abs=1e-9)
    halves = torch.eye(4)[torch.tensor([0, 1] * 10)]
    assert labels.class_balance(stream(halves)) == pytest.approx(0.5)


def test_class_accuracy_counts_only_captions_that_ask_for_a_class() -> None:
    probabilities = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    assert labels.class_accuracy(stream(probabilities, 3), stream(torch.tensor([0, 2, 2, -1]), 2)) == pytest.approx(2 / 3)


def test_retrieval_finds_the_own_caption_among_all_that_differ() -> None:
    told, own = nn.functional.normalize(features(6, 4), dim=1), torch.arange(6)
    assert captions.retrieval(stream(told, 4), stream(own, 5), stream(told, 4), among=1) == 1
    assert captions.retrieval(stream(-told, 4), stream(own, 5), stream(told, 4), among=1) == 0
    asked = torch.tensor([0, 0, 3, 5])
    assert captions.retrieval(stream(told[asked]), stream(asked), stream(told), among=1) == 1
    by_hand = np.mean([np.argsort(-(told.roll(1, 0) @ told.T).numpy())[row][:3].tolist().count(row) for row in range(6)])
    assert captions.retrieval(stream(told.roll(1, 0), 4), stream(own), stream(told, 4), among=3) == pytest.approx(by_hand)


def test_clip_score_is_a_hundred_where_directions_agree_and_never_negative() -> None:
    told = nn.functional.normalize(features(6, 4), dim=1)
    assert captions.clip_score(stream(told), stream(told)) == pytest.approx(100)
    assert captions.clip_score(stream(-told), stream(told)) == 0


def test_streamed_latent_metrics_are_those_of_the_whole() -> None:
    a, b = (torch.from_numpy(RANDOM.normal(size=(50, 2, 3, 3))) for _ in range(2))
    assert paired.streamed_shift(stream(a, 7), stream(b, 7)) == pytest.approx(latent_shift(a, b), rel=1e-9)
    assert paired.streamed_shift(stream(a, 7), stream(a, 7)) == 0
    assert paired.same_seed_rmse(stream(a, 7), stream(b, 7)) == pytest.approx(float((a - b).square().mean().sqrt()))


def test_rows_cuts_a_stream_anew() -> None:
    assert [part.tolist() for part in rows(stream(torch.arange(10), 3), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_says_where_it_is_from_and_which_way_is_better(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name
    assert metric.title
    assert metric.source
    assert metric.better in ("lower", "higher")
    assert metric.needs


# The engine, on tiny pipelines.

PROBE = Probe(samples=8, num_inference_steps=2)


def test_a_model_against_itself_differs_in_nothing(ldm: Pipeline) -> None:
    result = evaluate(ldm, Pipeline(tiny_ldm(), source="the same"), probe=PROBE, batch_size=4)
    assert result["latent-shift"] == 0
    assert result["latent-rmse"] == 0
    assert result["latent-frechet"] == pytest.approx(0, abs=1e-3), "up to the rounding of a covariance of few samples"
    assert result["ssim"] == pytest.approx(1)
    assert result["psnr"] == 100
    assert result.models == ("tiny-ldm", "the same")
    assert {figure.features for figure in result.figures[0]} == {None}, "none of these needs a net"


def test_a_changed_model_is_worse_and_every_figure_says_how_it_came_about(ldm: Pipeline) -> None:
    changed = tiny_ldm()
    with torch.no_grad():
        changed.unet.conv_out.weight.mul_(0.5)
    result = evaluate(Pipeline(changed, source="changed"), ldm, probe=PROBE, batch_size=3, features=[Means().eval()])
    assert result["latent-shift"] > 0
    assert result["ssim"] < 1
    assert result["psnr"] < 100
    data = json.loads(json.dumps(result.to_json()))
    assert [each["model"] for each in data["models"]] == ["changed", "tiny-ldm"]
    figure = data["models"][0]["figures"][0]
    told = {"metric", "title", "value", "error", "better", "features", "digest", "samples", "reference", "note", "source"}
    assert set(figure) == told
    assert data["task"] == "unconditional image"
    assert set(data["seconds"]) == {"generating", "looking", "measuring"}
    assert data["peak_bytes"] > 1e6


def test_latent_shift_is_the_score_of_the_same_probe(ldm: Pipeline) -> None:
    changed = tiny_ldm()
    with torch.no_grad():
        changed.unet.conv_out.weight.mul_(0.5)
    other = Pipeline(changed, source="changed")
    result = evaluate(other, ldm, probe=PROBE, batch_size=8, metrics=["latent-shift"])
    assert result["latent-shift"] == pytest.approx(latent_shift(ldm.latents(PROBE), other.latents(PROBE)), rel=1e-5)


def real_pictures(folder: Path, count: int, size: int = 4) -> Path:
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        array = RANDOM.integers(0, 255, (size, size)).astype(np.uint8)
        Image.fromarray(array).save(folder / f"{number:02d}.png")
    return folder


def test_real_pictures_are_compared_with_through_any_module(ldm: Pipeline, tmp_path: Path) -> None:
    data = real_pictures(tmp_path / "real", 9, size=12)
    net = Means().eval()
    result = evaluate(ldm, probe=PROBE, features=[net], reference=data, metrics=["frechet", "kernel", "precision", "recall"])
    frechet = result.figures[0][0]
    assert (frechet.metric, frechet.features, frechet.samples, frechet.reference) == ("frechet", "Means", 8, 9)
    from ldpruner.datasets import Folder

    folder = Folder.open(data)
    real = torch.stack([folder.picture(name, channels=1, size=(4, 4)) for name in folder.names])
    fake = torch.cat([part.pictures for part in ldm.generations(PROBE)])
    seen = [net(pictures.float() / 127.5 - 1).float() for pictures in (real, fake)]
    assert frechet.value == pytest.approx(frechet_distance(stream(seen[0]), stream(seen[1])), rel=1e-4)


class Counting(nn.Module):
    """Means, which counts how many pictures it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, pictures: Tensor) -> Tensor:
        self.seen += len(pictures)
        return Means()(pictures)


def test_samples_and_features_are_made_once_and_a_longer_run_adds_to_them(ldm: Pipeline, tmp_path: Path) -> None:
    data = real_pictures(tmp_path / "real", 6)
    calls: list[int] = []
    original = ldm.pipe.unet.forward

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(sample))
        return original(sample, *args, **kwargs)

    ldm.pipe.unet.__dict__["forward"] = forward
    net = Counting().eval()
    first = evaluate(ldm, probe=PROBE, features=[net], reference=data, batch_size=4)
    assert sum(calls) == 8 * 2
    assert net.seen == 8 + 6
    calls.clear()
    again = evaluate(ldm, probe=PROBE, features=[net], reference=data, batch_size=4)
    assert (calls, net.seen) == ([], 8 + 6)
    assert [figure.value for figure in again.figures[0]] == [figure.value for figure in first.figures[0]]
    evaluate(ldm, probe=Probe(samples=12, num_inference_steps=2), features=[net], reference=data, batch_size=4)
    assert sum(calls) == 4 * 2
    assert net.seen == 12 + 6


def test_a_run_that_was_killed_goes_on(ldm: Pipeline, own_cache: Path) -> None:
    def stops(parts: Iterator[Any], total: int, what: str) -> Iterator[Any]:
        yield next(parts)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(ldm, ldm, probe=PROBE, batch_size=4, watch=stops)
    kept = sorted(own_cache.rglob("part-*.safetensors"))
    assert len(kept) == 1
    stamp = kept[0].stat().st_mtime_ns
    evaluate(ldm, ldm, probe=PROBE, batch_size=4)
    assert kept[0].stat().st_mtime_ns == stamp
    assert len(list(own_cache.rglob("part-*.safetensors"))) == 2


def test_a_damaged_part_is_made_again(ldm: Pipeline, own_cache: Path) -> None:
    before = evaluate(ldm, ldm, probe=PROBE, batch_size=4)
    part = next(own_cache.rglob("part-*.safetensors"))
    part.write_bytes(part.read_bytes()[:50])
    assert evaluate(ldm, ldm, probe=PROBE, batch_size=4)["latent-rmse"] == before["latent-rmse"]


def test_other_weights_another_scheduler_and_another_probe_are_other_samples(ldm: Pipeline, own_cache: Path) -> None:
    from diffusers import DDPMScheduler

    evaluate(ldm, ldm, probe=PROBE, batch_size=8)
    evaluate(ldm, ldm, probe=Probe(samples=8, num_inference_steps=3), batch_size=8)
    with torch.no_grad():
        ldm.pipe.unet.conv_out.weight[0, 0, 0, 0] += 1e-3
    evaluate(ldm, ldm, probe=PROBE, batch_size=8)
    ldm.pipe.scheduler = DDPMScheduler(clip_sample=False)
    evaluate(ldm, ldm, probe=PROBE, batch_size=8)
    assert len(list(own_cache.rglob("part-*.safetensors"))) == 4


# Who looks.


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


# What goes wrong.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metrics": ["latent-shift"]},
            r"latent-shift: cannot be measured on tiny-ldm, for want of an original \(--against MODEL\)",
        ),
        ({"metrics": ["frechet"]}, r"frechet: cannot be measured on tiny-ldm, for want of a feature net"),
        ({"metrics": ["frechet"], "features": [Means().eval()]}, r"for want of real data \(--reference DATA\)"),
        ({"metrics": ["clip-score"], "features": [Means().eval()]}, r"for want of a feature net that reads captions"),
        ({"metrics": ["frechett"]}, r"metric 'frechett' is unknown: did you mean frechet"),
        ({"features": ["inceptoin"]}, r"feature net 'inceptoin' is unknown: did you mean inception\?"),
        ({"features": ["judge"]}, r"judge: tiny-ldm has none\. Say --features judge=zoo:NAME"),
        ({}, r"tiny-ldm: nothing to measure"),
        ({"metrics": ["fid"]}, r"inception: .*cache/inception-2015-12-05\.pt is missing\. Fetch https://.* and put it there"),
        (
            {"features": ["clip"]},
            r"clip: openai/clip-vit-large-patch14-336 is neither a folder here nor to be had from the hub.*hf download",
        ),
        ({"features": ["clap=nowhere"]}, r"clap: nowhere is neither a folder here nor to be had from the hub"),
        ({"features": [Means().eval()], "reference": "nowhere"}, r"nowhere: is neither a folder nor a zip file"),
    ],
)
def test_what_cannot_be_measured_says_what_is_wanted(ldm: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        evaluate(ldm, probe=Probe(samples=2, num_inference_steps=1), **arguments)


def test_too_few_samples_for_a_metric_are_refused(ldm: Pipeline, tmp_path: Path) -> None:
    data, few = real_pictures(tmp_path / "real", 5), Probe(samples=2, num_inference_steps=1)
    with pytest.raises(ValueError, match=r"precision: cannot be measured on tiny-ldm, for want of 4 samples or more\."):
        evaluate(ldm, probe=few, features=[Means().eval()], reference=data, metrics=["precision"])


def test_what_nobody_asked_for_by_name_is_left_out_where_samples_are_too_few(ldm: Pipeline, tmp_path: Path) -> None:
    data = real_pictures(tmp_path / "real", 5)
    result = evaluate(ldm, probe=Probe(samples=2, num_inference_steps=1), features=[Means().eval()], reference=data)
    assert [figure.metric for figure in result.figures[0]] == ["frechet"]


def test_mistakes_are_told_before_anything_is_generated(ldm: Pipeline, own_cache: Path) -> None:
    for arguments in ({"metrics": ["latent-shift"]}, {"reference": "nowhere", "features": [Means().eval()]}, {"metrics": ["fid"]}):
        with pytest.raises(ValueError):
            evaluate(ldm, probe=PROBE, **arguments)  # type: ignore[arg-type]
    assert not own_cache.exists()


def test_a_name_and_an_alias_are_two_figures(ldm: Pipeline, tmp_path: Path) -> None:
    data = real_pictures(tmp_path / "real", 9)
    stand_in = FeatureNet(
        name="inception-2015-12-05", digest="2", observe=lambda pictures: {"features": pictures.flatten(1).float()}
    )
    result = evaluate(ldm, probe=PROBE, features=[Means().eval(), stand_in], metrics=["fid"], reference=data)
    assert [figure.features for figure in result.figures[0]] == ["inception-2015-12-05"]
    both = evaluate(ldm, probe=PROBE, features=[Means().eval(), stand_in], metrics=["frechet", "fid"], reference=data)
    assert [figure.features for figure in both.figures[0]] == ["Means", "inception-2015-12-05"]
    assert both["fid"] == result["fid"] != both["frechet"]


def test_a_net_in_training_mode_is_refused(ldm: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"Means: is in training mode, .* Call \.eval\(\) first"):
        evaluate(ldm, probe=PROBE, features=[Means()])


def test_nets_that_differ_in_structure_alone_do_not_share_what_they_saw(ldm: Pipeline, tmp_path: Path) -> None:
    data = real_pictures(tmp_path / "real", 9)
    pooled = [nn.Sequential(nn.AvgPool2d(size), nn.Flatten()).eval() for size in (2, 4)]
    first, second = (evaluate(ldm, probe=PROBE, features=[net], reference=data, metrics=["frechet"]) for net in pooled)
    assert first["frechet"] != second["frechet"]


def test_models_that_do_not_generate_alike_are_not_compared(ldm: Pipeline, audio: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"do not generate alike: latents of tiny-ldm \(4, 4, 4\) and tiny-audio \(2, 8, 8\)"):
        evaluate(ldm, audio, probe=PROBE)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_latents_that_are_not_finite_are_told(ldm: Pipeline) -> None:
    with torch.no_grad():
        ldm.pipe.unet.conv_out.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"tiny-ldm: generates latents that are not finite"):
        evaluate(ldm, ldm, probe=PROBE)


def test_real_data_is_taken_in_no_order(ldm: Pipeline, tmp_path: Path) -> None:
    from ldpruner.evaluation.streams import RealData

    real = RealData.open(real_pictures(tmp_path / "real", 30), ldm)
    assert sorted(real.names) != list(real.names)
    assert RealData.open(tmp_path / "real", ldm).names == real.names


def test_both_models_take_the_prompts_of_the_original(text_to_image: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a b\nc d\n", encoding="utf-8")
    original = Pipeline(text_to_image.pipe, source="original", folder=tmp_path)
    result = evaluate(text_to_image, original, probe=Probe(samples=3, num_inference_steps=1))
    assert result.probe.prompts == ("a b", "c d")
    assert result["latent-shift"] == 0


def test_large_latents_are_averaged_down() -> None:
    from ldpruner.evaluation.frechet import LATENT_NUMBERS, _flat

    for shape in ((4, 64, 64), (1024, 64), (8, 5, 30, 30)):
        latents = torch.rand(3, *shape)
        flat = next(_flat(stream(latents))())
        assert flat.shape[1] <= LATENT_NUMBERS
        assert float(flat.mean()) == pytest.approx(float(latents.mean()), rel=0.02)


def test_a_full_disk_keeps_what_is_there_and_says_so(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldpruner.evaluation import kept

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "save_file", full)
    with pytest.raises(OSError, match=r"the cache cannot be written \(.*No space left.*\)\. What is there is kept; free space"):
        evaluate(ldm, ldm, probe=PROBE)


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """Metrics hold a few parts at a time: ten times as many samples are never all alive."""
    alive: list[int] = []
    most = 0

    def counted(total: int) -> Callable[[], Iterator[Tensor]]:
        def parts() -> Iterator[Tensor]:
            for _ in range(total):
                part = torch.rand(100, 4, dtype=torch.float64)
                alive.append(1)
                weakref.finalize(part, alive.pop)
                yield part
                del part
                gc.collect(0)
                nonlocal most
                most = max(most, len(alive))

        return parts

    measures: list[Callable[[Stream, Stream], object]] = [
        frechet_distance,
        functools.partial(kernel.kernel_distance, blocks=10),
        coverage.share_within,
        kernel.cmmd,
        paired.streamed_shift,
    ]
    for measure in measures:
        most = 0
        measure(counted(60), counted(60))
        assert 0 < most <= 16


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
