"""Metrics of samples and their captions in a space that both share: CLIP score and caption retrieval."""

from __future__ import annotations

import torch

from ldpruner.evaluation.base import Estimate, Evidence, Metric, Stream, length, pairs, register


def clip_score(embeddings: Stream, captions: Stream) -> float:
    """100 x the mean of max(cosine, 0) between samples `(n, e)` and their captions `(n, e)` (Hessel et al., arXiv 2104.08718).

    Unit vectors are expected. As torchmetrics and the papers on diffusion scale it; some print it over 100.
    """
    total = sum(float((one * other).sum(1).clamp(min=0).double().sum()) for one, other in pairs(embeddings, captions))
    return 100 * total / length(embeddings)


def retrieval(embeddings: Stream, captions: Stream, *, among: int) -> float:
    """Recall at `among`: the share of samples whose own caption is among the nearest of all different captions.

    Captions that read the same count as one.
    """
    candidates = torch.unique(torch.cat(list(captions())), dim=0)
    found = 0.0
    for sample, caption in pairs(embeddings, captions):
        own = (sample * caption).sum(1, keepdim=True)
        similar = sample @ candidates.T
        same = torch.cdist(caption, candidates) < 1e-5
        ahead = ((similar > own + 1e-6) & ~same).sum(1)
        found += float((ahead < among).double().sum())
    return found / length(embeddings)


register(
    Metric(
        name="clip-score",
        title="CLIP score",
        source="arXiv 2104.08718; the published one with CLIP's embeddings",
        better="higher",
        needs=("embeddings", "captions"),
        measure=lambda evidence: Estimate(value=clip_score(evidence.samples["embeddings"], evidence.samples["captions"])),
        minimum=1,
    )
)


def _at(among: int) -> Metric:
    def measure(evidence: Evidence) -> Estimate:
        return Estimate(value=retrieval(evidence.samples["embeddings"], evidence.samples["captions"], among=among))

    return Metric(
        name=f"retrieval-{among}",
        title=f"Caption retrieval R@{among}",
        source=f"share of samples whose caption is among the {among} nearest of all captions in the run",
        better="higher",
        needs=("embeddings", "captions"),
        measure=measure,
    )


for _among in (1, 5):
    register(_at(_among))
