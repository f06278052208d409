"""Metrics of samples and their captions in a space that both share: CLIP score and caption retrieval."""

from __future__ import annotations

import torch

from ldpruner.evaluation.base import Estimate, Evidence, Metric, Stream, length, pairs, register


def clip_score(embeddings: Stream, captions: Stream) -> float:
    """100 x the mean of max(cosine, 0) between samples `(n, e)` and their captions `(n, e)`, unit vectors.

    Of Hessel et al. (arXiv 2104.08718), without their factor of 2.5, as papers on diffusion print it; some leave out the 100.
    """
    total = sum(float((one * other).sum(1).clamp(min=0).double().sum()) for one, other in pairs(embeddings, captions))
    return 100 * total / length(embeddings)


def retrieval(embeddings: Stream, own: Stream, candidates: Stream, *, among: int) -> float:
    """Recall at `among`: the share of samples `(n, e)` whose own caption is among the nearest of all different captions.

    `candidates` `(captions, e)` are unit vectors, `own` `(n,)` says which of them a sample was asked for by. Captions that
    read the same to the network do not stand in each other's way.
    """
    every = torch.cat(list(candidates()))
    found = 0
    for sample, place in pairs(embeddings, own):
        similar = sample @ every.T
        ahead = (similar > similar.gather(1, place[:, None]) + 1e-6).sum(1)
        found += int((ahead < among).sum())
    return found / length(embeddings)


def _at(among: int) -> Metric:
    def measure(evidence: Evidence) -> Estimate:
        seen = evidence.samples
        value = retrieval(seen["embeddings"], seen["own"], seen["candidates"], among=among)
        return Estimate(value=value, note=f"among {length(seen['candidates'])} captions")

    return Metric(
        name=f"retrieval-{among}",
        title=f"Caption retrieval R@{among}",
        source=f"share of samples whose caption is among the {among} nearest of all captions in the run",
        better="higher",
        needs=("embeddings", "captions"),
        measure=measure,
        captions=among + 1,
    )


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
for _among in (1, 5):
    register(_at(_among))
