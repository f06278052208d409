"""Metrics against the original's samples for the same seeds: no reference data, and for latents no decoder either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ldpruner.errors import DataError
from ldpruner.evaluation.base import Estimate, Evidence, Metric, Stream, pairs, register
from ldpruner.scoring.latent import Statistics, shifts

EQUAL_PICTURES = 100.0  # dB, in place of infinity


def streamed_shift(original: Stream, modified: Stream) -> float:
    """||mean(o) - mean(m)||_2 + ||std(o) - std(m)||_2 of latents `(n, ...)` over all samples (LD-Pruner, arXiv 2404.11936)."""
    return sum(shifts(_statistics(original), _statistics(modified)))


def _statistics(latents: Stream) -> Statistics:
    """Mean and unbiased standard deviation over the samples, merged part by part (Chan et al. 1979)."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for part in latents():
        values = part.double()
        size, middle = len(values), values.mean(0)
        total = count + size
        squares = squares + (values - middle).square().sum(0) + (middle - mean).square() * (count * size / total)
        mean = mean + (middle - mean) * (size / total)
        count = total
    return Statistics(mean=mean, std=(squares / (count - 1)).sqrt())


def same_seed_rmse(original: Stream, modified: Stream) -> float:
    """The root mean squared difference between latents `(n, ...)` of equal seeds, over all their numbers."""
    squares = numbers = 0.0
    for one, other in pairs(original, modified):
        squares += float((one.double() - other.double()).square().sum())
        numbers += one.numel()
    return float((squares / numbers) ** 0.5)


def structural_similarity(original: Stream, modified: Stream) -> float:
    """SSIM of uint8 pictures `(n, c, h, w)` of equal seeds, the mean over pictures (Wang et al. 2004), by torchmetrics.

    The Gaussian window's width is the usual 1.5 pixels, and less where pictures are smaller than the window.
    """
    metric = None
    for one, other in _unit_pairs(original, modified):
        reach = (min(one.shape[2:]) - 1.5) / 3.5  # torchmetrics pads by 3.5 widths, which must fit
        metric = metric or _image_metrics().StructuralSimilarityIndexMeasure(data_range=1.0, sigma=min(1.5, reach))
        metric.update(other, one)
    assert metric is not None
    return float(metric.compute())


def peak_signal_to_noise(original: Stream, modified: Stream) -> float:
    """PSNR in dB of uint8 pictures `(n, c, h, w)` of equal seeds, over all of them, by torchmetrics; 100 where none differs."""
    metric, differs = _image_metrics().PeakSignalNoiseRatio(data_range=1.0), False
    for one, other in _unit_pairs(original, modified):
        differs = differs or not torch.equal(one, other)
        metric.update(other, one)
    return float(metric.compute()) if differs else EQUAL_PICTURES


def _image_metrics() -> Any:
    try:
        import torchmetrics.image
    except ImportError as error:
        raise DataError("SSIM and PSNR need torchmetrics: pip install 'ldpruner[metrics]'.") from error
    return torchmetrics.image


def _unit_pairs(original: Stream, modified: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in pairs(original, modified):
        if one.shape != other.shape:
            raise DataError(f"pictures of the two models differ in shape: {tuple(one.shape[1:])} and {tuple(other.shape[1:])}.")
        yield one.float() / 255, other.float() / 255


def _on(name: str, measure: Callable[[Stream, Stream], float]) -> Callable[[Evidence], Estimate]:
    return lambda evidence: Estimate(value=measure(evidence.original[name], evidence.samples[name]))


register(
    Metric(
        name="latent-shift",
        title="Latent shift",
        source="LD-Pruner's score, arXiv 2404.11936, for all edits together",
        better="lower",
        needs=("latents", "original"),
        measure=_on("latents", streamed_shift),
    )
)
register(
    Metric(
        name="latent-rmse",
        title="Same-seed latent RMSE",
        source="root mean squared difference of latents of equal seeds",
        better="lower",
        needs=("latents", "original"),
        measure=_on("latents", same_seed_rmse),
        minimum=1,
    )
)
register(
    Metric(
        name="ssim",
        torchmetrics=True,
        title="SSIM to the original",
        source="Wang et al. 2004, by torchmetrics, on pictures of equal seeds",
        better="higher",
        needs=("pictures", "original"),
        measure=_on("pictures", structural_similarity),
        minimum=1,
    )
)
register(
    Metric(
        name="psnr",
        torchmetrics=True,
        title="PSNR to the original, dB",
        source="by torchmetrics, on pictures of equal seeds; 100 where they are equal to the bit",
        better="higher",
        needs=("pictures", "original"),
        measure=_on("pictures", peak_signal_to_noise),
        minimum=1,
    )
)
