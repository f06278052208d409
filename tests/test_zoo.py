"""The zoo: what ships is whole and small, and the command that made it runs, stops and goes on."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import math
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from scipy.io import wavfile
from torch import nn
from transformers import CLIPTokenizer

from ldpruner import Probe, discover, load
from ldpruner.evaluation import evaluate
from ldpruner.opening import locate
from ldpruner.plans import Operators
from ldpruner.sound import read_wav, write_wav
from ldpruner.zoo import autoencoders, commands, digits_recipe, emoji_recipe, measuring
from ldpruner.zoo.data import load_pictures
from ldpruner.zoo.folders import load_captioned, load_recordings
from ldpruner.zoo.training import Training, train


def write_idx(folder: Path, prefix: str, count: int) -> None:
    """Pictures of bright bars, one place per class, in the files that Fashion-MNIST comes in."""
    generator = np.random.default_rng(count)
    labels = (np.arange(count) % 10).astype(np.uint8)
    images = generator.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label : 2 * label + 4] = 250
    for name, array in ((f"{prefix}-images-idx3-ubyte.gz", images), (f"{prefix}-labels-idx1-ubyte.gz", labels)):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / name).write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder, "train", 400)
    write_idx(folder, "t10k", 300)
    return folder


def test_idx_files_and_image_folders_give_the_same_pictures(data: Path, tmp_path: Path) -> None:
    pictures = load_pictures(data, "test")
    assert pictures.images.shape == (300, 1, 32, 32)
    assert pictures.images[:, :, :2].eq(0).all(), "28x28 pictures get a border"
    assert pictures.images.dtype == torch.uint8
    for number in range(20):
        folder = tmp_path / "test" / str(int(pictures.labels[number]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures.images[number, 0].numpy()).save(folder / f"{number:02d}.png")
    from_folder = load_pictures(tmp_path, "test")
    order = pictures.labels[:20].argsort(stable=True)
    assert torch.equal(from_folder.images, pictures.images[:20][order])
    assert torch.equal(from_folder.labels, pictures.labels[:20][order])


def test_data_that_is_missing_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no train pictures\. Give a folder with train-images-idx3-ubyte\.gz and its labels, or"):
        load_pictures(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b but no more")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        load_pictures(tmp_path, "train")


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 1)


def line_loss(module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
    inputs = torch.randn(8, 3, generator=generator)
    loss: torch.Tensor = (module.map(inputs).squeeze(1) - inputs.sum(1)).square().mean()
    return loss


def new_line() -> Line:
    torch.manual_seed(0)
    return Line()


def test_training_that_stops_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    plan = Training(steps=120, checkpoint_every=20, warmup_steps=5, ema_decay=0.9, learning_rate=0.05)
    unbroken = train(new_line(), line_loss, plan, tmp_path / "unbroken")

    def stops(module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        if step == 70:
            raise KeyboardInterrupt
        return line_loss(module, generator, step)

    with pytest.raises(KeyboardInterrupt):
        train(new_line(), stops, plan, tmp_path / "broken")
    resumed = train(new_line(), line_loss, plan, tmp_path / "broken")
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("unbroken", "broken")]
    losses = [[(json.loads(line)["step"], json.loads(line)["loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [50, 100, 120]
    assert losses[0][-1][1] < losses[0][0][1]


def test_the_rate_rises_stays_and_falls_and_the_start_does_not_depend_on_the_length(tmp_path: Path) -> None:
    short = train(new_line(), line_loss, Training(steps=100, checkpoint_every=50), tmp_path / "short")
    half = load_file(tmp_path / "short" / "checkpoint.safetensors")
    assert not math.isnan(float(half["module.map.weight"].sum()))
    long_plan = Training(steps=1000, checkpoint_every=1000)
    assert [round(fashion_rate(step, long_plan), 3) for step in (0, 99, 199, 500, 700, 850, 999)] == [
        0.005,
        0.5,
        1,
        1,
        1,
        0.5,
        0.003,
    ]
    assert short.training is False


def fashion_rate(step: int, training: Training) -> float:
    from ldpruner.zoo.training import _schedule

    return _schedule(step, training)


@pytest.fixture(scope="module")
def emoji_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of an image folder: six things in three styles, one thing in each style held out."""
    path = tmp_path_factory.mktemp("emoji") / "emoji.zip"
    entries = []
    with ZipFile(path, "w") as archive:
        for thing in range(6):
            for number, style in enumerate(("flat", "round", "thick")):
                picture = Image.new("RGB", (64, 64), "white")
                picture.paste((40 * thing, 90 * number, 120), (8, 8, 20 + 6 * thing, 40 + 6 * number))
                name = f"{style}/{thing}.png"
                held = io.BytesIO()
                picture.save(held, "PNG")
                archive.writestr(name, held.getvalue())
                split = "test" if thing == number else "train"
                entries.append({"file_name": name, "text": f"thing {'abcdef'[thing]}", "style": style, "split": split})
        archive.writestr("metadata.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture(scope="module")
def digits_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recordings: a tone for each digit, nine takes each."""
    folder = tmp_path_factory.mktemp("digits") / "recordings"
    folder.mkdir()
    for digit in range(3):
        for take in range(9):
            time = np.arange(2000 + 300 * take) / 8000
            wave = np.sin(2 * np.pi * (300 + 400 * digit) * time).astype(np.float32)
            write_wav(folder / f"{digit}_someone_{take}.wav", wave, 8000)
    return folder.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", [commands.NAMES[0], *(pytest.param(n, marks=pytest.mark.exhaustive) for n in commands.NAMES[1:])])
def test_a_reduced_training_run_makes_a_whole_pipeline(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Operators] = []  # once for both runs, whose denoisers are the same

    def discovered(*given: Any, **settings: Any) -> Operators:
        if not counted:
            counted.append(discover(*given, **settings))
        return counted[0]

    monkeypatch.setattr(measuring, "discover", discovered)
    data = request.getfixturevalue("data" if name == "fashion" else f"{name}_data")
    figures = commands.train(name, data=data, out=tmp_path / "out", work=tmp_path / "work", reduced=True)
    made = load(tmp_path / "out").images(Probe(samples=1, num_inference_steps=1))[0]
    assert made.size == ((32, 32) if name == "fashion" else (64, 64))
    assert {"samples", "their reconstructions"} <= set(figures["figures"])
    assert all(math.isfinite(found["value"]) for column in figures["figures"].values() for found in column.values())
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == json.loads(json.dumps(figures))
    parts = [file for file in (tmp_path / "out").rglob("*.safetensors") if file.name != "reference.safetensors"]
    assert len(parts) == {"fashion": 3, "emoji": 4, "digits": 3}[name]
    weights = [tensor for file in parts for tensor in load_file(file).values()]
    assert all(not tensor.is_floating_point() or tensor.dtype == torch.float16 for tensor in weights)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Fréchet distance, lower is better | {figures['figures']['samples']['frechet']['value']:.4g} |" in card
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("checkpoint.safetensors")}
    assert len(stamps) == 3
    again = commands.train(name, data=data, out=tmp_path / "again", work=tmp_path / "work", reduced=True)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps, "what was trained is not trained again"
    assert again["figures"] == figures["figures"]


def test_captions_are_read_from_metadata_and_splits_are_kept_apart(emoji_data: Path) -> None:
    pictures = load_captioned(emoji_data)
    assert pictures.captions[0] == "thing a, flat style"
    assert len(pictures.of("train").texts) == 15
    assert set(pictures.of("test").captions) == {"thing a, flat style", "thing b, round style", "thing c, thick style"}
    assert pictures.images.shape == (18, 3, 64, 64)


def test_recordings_are_read_with_their_digits_and_takes(digits_data: Path) -> None:
    recordings = load_recordings(digits_data, 8000)
    assert recordings.digits.bincount().tolist() == [9, 9, 9]
    assert sorted(set(recordings.takes.tolist())) == list(range(9))
    assert max(abs(wave).max() for wave in recordings.waves) == pytest.approx(1, abs=1e-2)
    mel = digits_recipe.new_mel()
    picture = digits_recipe.spectrograms(recordings, mel)[9]
    assert picture.shape == (1, 64, 64)
    loudest = picture[0, :, 5].float().argmax() / 64
    assert 0.2 < loudest < 0.45, "700 Hz lies in the lower bands"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, r"metadata\.jsonl lacks file_name"),
        (
            lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "a.png"}\n'),
            r"metadata\.jsonl names a\.png, which is not there",
        ),
        (lambda folder: (folder / "metadata.jsonl").write_text("{"), r"metadata\.jsonl cannot be read"),
    ],
)
def test_captioned_data_that_is_damaged_says_where(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_captioned(tmp_path)


def test_data_that_is_no_data_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recordings\. Expected files named \{digit\}_\{speaker\}_\{take\}\.wav"):
        load_recordings(tmp_path, 8000)
    (tmp_path / "0_someone_0.wav").write_bytes(b"RIFF, but no more")
    with pytest.raises(ValueError, match=r"0_someone_0\.wav: is no WAV file that can be read"):
        load_recordings(tmp_path, 8000)
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"broken\.zip: is neither a folder nor a zip file"):
        load_captioned(tmp_path / "broken.zip")


def test_a_zip_of_a_folder_is_read_as_the_folder_is(emoji_data: Path, tmp_path: Path) -> None:
    with ZipFile(emoji_data) as flat, ZipFile(tmp_path / "nested.zip", "w") as nested:
        for name in flat.namelist():
            nested.writestr(f"emoji/{name}", flat.read(name))
        flat.extractall(tmp_path / "folder")
    whole = load_captioned(emoji_data)
    for path in (tmp_path / "nested.zip", tmp_path / "folder"):
        again = load_captioned(path)
        assert torch.equal(again.images, whole.images)
        assert again.captions == whole.captions


def test_a_damaged_member_of_a_zip_is_named(emoji_data: Path, tmp_path: Path) -> None:
    raw = bytearray(emoji_data.read_bytes())
    raw[60:90] = bytes(30)
    (tmp_path / "damaged.zip").write_bytes(raw)
    with pytest.raises(ValueError, match=r"damaged\.zip: flat/0\.png (cannot be read|is no picture)"):
        load_captioned(tmp_path / "damaged.zip")


def test_wav_files_of_every_format_are_silent_where_they_are_silent(tmp_path: Path) -> None:
    for dtype, silence in ((np.uint8, 128), (np.int16, 0), (np.int32, 0), (np.float32, 0)):
        file = tmp_path / "silence.wav"
        wavfile.write(file, 8000, np.full(100, silence, dtype))
        wave, rate = read_wav(file.read_bytes(), "silence.wav")
        assert rate == 8000
        assert not wave.any()
    wavfile.write(file, 8000, np.stack([np.full(9, 16384, np.int16), np.zeros(9, np.int16)], 1))
    assert read_wav(file.read_bytes(), "")[0].tolist() == [0.25] * 9


def test_latents_belong_to_the_autoencoder_that_made_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = (autoencoders.new_autoencoder(1).eval() for _ in range(2))
    images = torch.randint(0, 255, (3, 1, 64, 64), dtype=torch.uint8)
    made = [autoencoders.kept_latents(each, images, tmp_path / "latents.safetensors") for each in (first, first, second)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert len(autoencoders.kept_latents(second, images[:2], tmp_path / "latents.safetensors")) == 2


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    train(new_line(), line_loss, Training(steps=2, checkpoint_every=1), tmp_path)
    wider = Line()
    wider.map = nn.Linear(5, 1)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: is the checkpoint of another network\. Name another folder"):
        train(wider, line_loss, Training(steps=4), tmp_path)


def test_the_tokenizer_is_the_same_in_the_files_of_transformers_4_and_5(tmp_path: Path) -> None:
    captions = ["red apple, google style", "blue moon, twitter style"]
    tokenizer = emoji_recipe.new_tokenizer(captions, 120)
    emoji_recipe.write_slow_tokenizer(tokenizer, tmp_path)
    again = CLIPTokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"), model_max_length=20)
    assert torch.equal(emoji_recipe.tokenized(tokenizer, captions), emoji_recipe.tokenized(again, captions))
    assert emoji_recipe.tokenized(tokenizer, [""]).shape == (1, 20)


def test_an_unknown_zoo_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"zoo pipeline 'fashoin' is unknown: did you mean fashion\?"):
        commands.train("fashoin", data=tmp_path, out=tmp_path / "out", work=tmp_path / "work")


@pytest.mark.parametrize("name", commands.NAMES)
class TestShipped:
    """What ships, for each pipeline of the zoo."""

    def test_it_loads_in_plain_diffusers_and_makes_something(self, name: str) -> None:
        pipe = DiffusionPipeline.from_pretrained(folder_of(name))
        pipe.set_progress_bar_config(disable=True)
        asked: dict[str, Any] = {"num_inference_steps": 4}
        if name == "emoji":
            asked |= {"prompt": ["red apple, google style"] * 2}
        elif name == "digits":
            asked = {"steps": 4, "batch_size": 2}
        else:
            asked |= {"batch_size": 2}
        pictures = pipe(**asked, generator=torch.Generator().manual_seed(0)).images
        assert len(pictures) == 2
        assert all(np.asarray(picture).std() > 10 for picture in pictures), "something is to be seen"

    def test_it_is_small_half_precision_safetensors(self, name: str) -> None:
        files = [path for path in folder_of(name).rglob("*") if path.is_file()]
        assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
        sizes = {path: path.stat().st_size for path in files if path.suffix == ".safetensors"}
        of_judge = {path.stem: size for path, size in sizes.items() if "judge" in path.parts}
        assert sum(sizes.values()) - sum(of_judge.values()) <= 16_000_000
        assert of_judge["judge"] <= 2_000_000
        assert of_judge["reference"] <= 1_000_000, "what the judge saw of real data"
        for path in sizes:
            assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}

    def test_its_card_states_what_was_measured(self, name: str) -> None:
        figures = json.loads((folder_of(name) / "figures.json").read_text())
        module = importlib.import_module(f"ldpruner.zoo.{name}_recipe")
        card = (folder_of(name) / "README.md").read_text()
        assert module.card_of(figures) == card
        assert f"ldpruner zoo train {name} --data" in card
        assert figures["counts"]["samples"] >= 2000
        assert figures["operators"] >= {"fashion": 60, "emoji": 100, "digits": 60}[name]
        assert recipe_of(module, name) == figures["recipe"], "the recipe's defaults made the weights that ship"

    def test_its_card_does_not_flatter(self, name: str) -> None:
        """The samples are worse than real data by every distance, and good enough to measure against."""
        figures = json.loads((folder_of(name) / "figures.json").read_text())["figures"]
        floor = figures[next(column for column in figures if column not in ("samples", "as many samples", "their reconstructions"))]
        for metric in ("frechet", "kernel"):
            assert floor[metric]["value"] < figures["samples"][metric]["value"]


def folder_of(name: str) -> Path:
    return Path(locate(f"zoo:{name}"))


def recipe_of(module: Any, name: str) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(json.dumps(asdict(getattr(module, f"{name.capitalize()}Recipe")())))
    return recipe


def figures_of(name: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder_of(name) / "figures.json").read_text())
    return figures


def test_the_judges_of_the_zoo_are_good_enough_to_judge() -> None:
    assert figures_of("fashion")["judge"]["accuracy"] >= 0.91
    assert figures_of("digits")["judge"]["accuracy"] >= 0.97
    assert figures_of("emoji")["figures"]["real pictures of these"]["class-accuracy"]["value"] >= 0.97


def test_the_digits_that_are_generated_are_digits() -> None:
    figures = figures_of("digits")["figures"]
    assert figures["samples"]["confidence"]["value"] > 0.8
    assert figures["samples"]["class-balance"]["value"] > 0.9


@pytest.mark.slow
def test_the_shipped_judges_know_what_the_shipped_pipelines_make() -> None:
    probe = Probe(samples=24, num_inference_steps=10)
    garments = evaluate(load("zoo:fashion"), probe=probe, metrics=["confidence", "class-balance"])
    assert garments["confidence"] > 0.7
    assert garments["class-balance"] > 0.6
    emoji = evaluate(load("zoo:emoji"), probe=probe, metrics=["class-accuracy", "retrieval-5"])
    assert emoji["class-accuracy"] > 0.8
    assert emoji["retrieval-5"] > 0.6, "five of 24 by chance would be 0.2"
