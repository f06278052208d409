"""Evaluation: what is seen is kept, a run that stopped goes on, and nothing asked for is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Means, real_pictures, stream, tiny_ldm
from ldpruner import Probe
from ldpruner.evaluation import FeatureNet, evaluate
from ldpruner.evaluation.frechet import frechet_distance
from ldpruner.pipelines import Pipeline
from ldpruner.scoring.latent import latent_shift

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
    evaluate(ldm, ldm, probe=PROBE, metrics=["latent-rmse"], cache=str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").rglob("part-*.safetensors")), "a cache that is named is used"


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


def test_a_full_disk_keeps_what_is_there_and_says_so(ldm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldpruner import packing

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "save_file", full)
    with pytest.raises(OSError, match=r"the cache cannot be written \(.*No space left.*\)\. What is there is kept; free space"):
        evaluate(ldm, ldm, probe=PROBE)
