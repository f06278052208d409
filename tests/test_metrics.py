"""Metrics: each is the published formula, says where it is from, and holds a few parts of the samples at a time."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from conftest import Means, stream
from ldpruner.evaluation import METRICS, captions, coverage, kernel, labels, paired
from ldpruner.evaluation.base import Stream, rows
from ldpruner.evaluation.frechet import frechet_distance
from ldpruner.scoring.latent import latent_shift

RANDOM = np.random.default_rng(0)


def features(count: int, width: int = 6, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(RANDOM.normal(shift, scale, (count, width)))


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


def test_large_latents_are_averaged_down() -> None:
    from ldpruner.evaluation.frechet import LATENT_NUMBERS, _flat

    for shape in ((4, 64, 64), (1024, 64), (8, 5, 30, 30)):
        latents = torch.rand(3, *shape)
        flat = next(_flat(stream(latents))())
        assert flat.shape[1] <= LATENT_NUMBERS
        assert float(flat.mean()) == pytest.approx(float(latents.mean()), rel=0.02)


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
