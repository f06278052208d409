"""Metrics from class probabilities: Inception Score, class balance, confidence, and whether samples are what was asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ldpruner.evaluation.base import Estimate, Metric, Stream, length, pairs, register, rows

SPLITS = 10
TINY = 1e-12


def inception_score(probabilities: Stream, *, splits: int = SPLITS) -> Estimate:
    """exp(mean KL(p(y|x) || p(y))) of class probabilities `(n, classes)`, the mean over splits (Salimans et al., arXiv 1606.03498).

    The error is the standard error of that mean; samples must be in no particular order. With fewer than 20 samples a split
    there is one split, and no error.
    """
    count = length(probabilities)
    splits = splits if count >= 20 * splits else 1
    scores = torch.stack([_score(part) for part in rows(probabilities, -(-count // splits))])
    error = float(scores.std() / len(scores) ** 0.5) if len(scores) > 1 else None
    return Estimate(value=float(scores.mean()), error=error)


def _score(part: Tensor) -> Tensor:
    probabilities = part.double().clamp(min=TINY)
    marginal = probabilities.mean(0)
    return (probabilities * (probabilities.log() - marginal.log())).sum(1).mean().exp()


def class_balance(probabilities: Stream) -> float:
    """Entropy of how often each class is the most likely one, over that of all classes equally often: 1 is balanced."""
    counts = sum(part.argmax(1).bincount(minlength=part.shape[1]) for part in probabilities())
    assert isinstance(counts, Tensor)
    shares = counts.double() / counts.sum()
    entropy = -(shares * shares.clamp(min=TINY).log()).sum()
    return float(entropy / torch.tensor(len(shares), dtype=torch.float64).log())


def confidence(probabilities: Stream) -> float:
    """The mean probability of the most likely class."""
    return sum(float(part.amax(1).double().sum()) for part in probabilities()) / length(probabilities)


def class_accuracy(probabilities: Stream, labels: Stream) -> float:
    """The share of samples, of those whose caption asks for a class, whose most likely class is that one."""
    right = asked = 0
    for part, wanted in pairs(probabilities, labels):
        named = wanted >= 0
        right += int((part.argmax(1) == wanted)[named].sum())
        asked += int(named.sum())
    return right / asked


register(
    Metric(
        name="inception-score",
        title="Inception Score",
        source="arXiv 1606.03498; the published one with Inception's classes",
        better="higher",
        needs=("probabilities",),
        measure=lambda evidence: inception_score(evidence.samples["probabilities"]),
    )
)
register(
    Metric(
        name="class-balance",
        title="Class balance",
        source="normalised entropy of the most likely classes; 1 is balanced",
        better="higher",
        needs=("probabilities",),
        measure=lambda evidence: Estimate(value=class_balance(evidence.samples["probabilities"])),
    )
)
register(
    Metric(
        name="confidence",
        title="Confidence",
        source="mean probability of the most likely class",
        better="higher",
        needs=("probabilities",),
        measure=lambda evidence: Estimate(value=confidence(evidence.samples["probabilities"])),
    )
)
register(
    Metric(
        name="class-accuracy",
        title="Class accuracy",
        source="share whose most likely class is the one that the prompt names",
        better="higher",
        needs=("probabilities", "labels"),
        measure=lambda evidence: Estimate(value=class_accuracy(evidence.samples["probabilities"], evidence.samples["labels"])),
    )
)
