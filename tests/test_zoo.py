"""The zoo: what ships is whole and small, and the command that made it runs, stops and goes on."""

from __future__ import annotations

import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMPipeline
from PIL import Image
from safetensors.torch import load_file
from scipy import linalg
from torch import nn

from ldpruner import Probe, load
from ldpruner.evaluation.frechet import frechet_distance
from ldpruner.pipelines import locate
from ldpruner.zoo import commands, fashion_recipe
from ldpruner.zoo.data import load_pictures
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
    assert pictures.floats(slice(0, 1)).min() == -1.0
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


def test_frechet_distance_is_the_formula() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(400, 6)), generator.normal(0.5, 1.5, size=(300, 6))
    covariances = [np.cov(features, rowvar=False) for features in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    by_hand = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.slow
def test_a_reduced_training_run_makes_a_whole_pipeline_and_goes_on_from_its_checkpoints(data: Path, tmp_path: Path) -> None:
    figures = commands.train("fashion", data=data, out=tmp_path / "out", work=tmp_path / "work", reduced=True)
    pipe = LDMPipeline.from_pretrained(tmp_path / "out")
    assert pipe(batch_size=1, num_inference_steps=1).images[0].size == (32, 32)
    assert set(figures["frechet"]) == {"samples", "reconstructions", "training pictures"}
    assert all(math.isfinite(value) for value in figures["frechet"].values())
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == json.loads(json.dumps(figures))
    weights = [load_file(file) for file in (tmp_path / "out").rglob("*.safetensors")]
    assert len(weights) == 3
    assert all(not t.is_floating_point() or t.dtype == torch.float16 for tensors in weights for t in tensors.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{figures['frechet']['samples']:.3f}" in card
    again = fashion_recipe.train_denoiser(torch.zeros(4, 4, 8, 8), fashion_recipe.REDUCED.denoiser, tmp_path / "work" / "denoiser")
    stored = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again.state_dict()[name].half(), tensor) for name, tensor in stored.items())


def test_an_unknown_zoo_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"zoo pipeline 'fashoin' is unknown: did you mean fashion\?"):
        commands.train("fashoin", data=tmp_path, out=tmp_path / "out", work=tmp_path / "work")


SHIPPED = Path(locate("zoo:fashion"))


def test_the_shipped_pipeline_loads_in_plain_diffusers_and_makes_pictures() -> None:
    pipe = LDMPipeline.from_pretrained(SHIPPED)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(batch_size=4, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert pictures.shape == (4, 32, 32, 1)
    assert pictures.std() > 0.1, "something is to be seen"


def test_the_shipped_pipeline_is_small_half_precision_safetensors() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 16_000_000
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    unet = load_file(SHIPPED / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}
    assert (SHIPPED / "judge" / "judge.safetensors").stat().st_size <= 1_000_000


def test_the_shipped_card_states_what_was_measured() -> None:
    figures = json.loads((SHIPPED / "figures.json").read_text())
    assert figures["judge_accuracy"] >= 0.91
    assert figures["samples"] >= 2000
    assert figures["operators"] >= 60
    assert figures["frechet"]["training pictures"] < figures["frechet"]["samples"]
    assert fashion_recipe.card(figures) == (SHIPPED / "README.md").read_text()
    assert "ldpruner zoo train fashion --data DIR" in (SHIPPED / "README.md").read_text()


def test_the_shipped_judge_knows_what_the_shipped_pipeline_draws() -> None:
    from ldpruner.zoo.judges import load_judge

    judge = load_judge(SHIPPED / "judge" / "judge.safetensors")
    pictures = load("zoo:fashion").images(Probe(samples=24, num_inference_steps=10), batch_size=24)
    images = torch.from_numpy(np.stack([np.asarray(picture.convert("L")) for picture in pictures])).unsqueeze(1).float() / 127.5 - 1
    with torch.no_grad():
        confidence, classes = judge(images).softmax(1).max(1)
    assert len(set(classes.tolist())) >= 5
    assert confidence.mean() > 0.7
