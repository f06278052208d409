"""What a metric is, what it may look at, and the table of metrics.

A metric says what it `needs`; the engine computes every metric whose needs are met by what the user gave. What it looks
at comes as streams of parts, so that memory does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ldpruner.errors import DataError
from ldpruner.registry import Registry

Stream: TypeAlias = Callable[[], Iterator[Tensor]]  # parts `(n, ...)` of one whole, from the start at every call
Need: TypeAlias = Literal[
    "features", "probabilities", "embeddings", "captions", "labels", "reference", "latents", "pictures", "original"
]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric's value, with its standard error where the metric has one, and what should be known about it."""

    value: float
    error: float | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What there is to look at: streams by what they hold, and of the reference or the original beside the samples'.

    `samples` may hold `features` `(n, d)`, `probabilities` `(n, classes)`, `embeddings` `(n, e)` of length 1, `captions`
    `(n, e)` of length 1, `candidates` `(different captions, e)` and which of them is `own` `(n,)`, `labels` `(n,)` of the
    classes that captions ask for (-1: none), `latents` `(n, c, ...)`, `pictures` `(n, c, h, w)`, uint8. `reference` holds
    real data in no particular order, `original` the other model's samples for the same seeds.
    """

    samples: dict[str, Stream]
    reference: dict[str, Stream]
    original: dict[str, Stream]

    def has(self, needs: tuple[Need, ...]) -> bool:
        """Whether everything is here that `needs` names, in `reference` or `original` too where these are among it."""
        streams = [need for need in needs if need not in ("reference", "original")]
        compared = [need for need in streams if need not in ("captions", "labels")]
        others = [held for name, held in (("reference", self.reference), ("original", self.original)) if name in needs]
        return all(need in self.samples for need in streams) and all(need in held for need in compared for held in others)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure about samples: how it is computed, where it is from, and which way is better."""

    name: str
    title: str
    source: str
    better: Literal["lower", "higher"]
    needs: tuple[Need, ...]
    measure: Callable[[Evidence], Estimate]
    minimum: int = 2  # samples, and real data where that is compared with
    captions: int = 1  # different prompts, where captions are needed
    torchmetrics: bool = False  # whether it is computed by that package, which is optional

    @property
    def by_nets(self) -> bool:
        """Whether a feature net has to look."""
        return bool({"features", "probabilities", "embeddings"} & set(self.needs))


METRICS: Registry[Metric] = Registry("metric")

# The field's names for a metric with one feature net: (metric, the net it is computed with).
ALIASES = {
    "fid": ("frechet", "inception"),
    "kid": ("kernel", "inception"),
    "is": ("inception-score", "inception"),
    "fad": ("frechet", "clap"),
}


def register(metric: Metric) -> Metric:
    """File a metric under its name."""
    return METRICS.register(metric.name)(metric)


def pairs(first: Stream, second: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """Two streams side by side, cut alike. Raises `DataError` where one is longer."""
    left, right = rows(first), rows(second)
    while True:
        one, other = next(left, None), next(right, None)
        if one is None and other is None:
            return
        if one is None or other is None or len(one) != len(other):
            raise DataError("two streams of samples differ in length.")
        yield one, other


def rows(stream: Stream, size: int = 500) -> Iterator[Tensor]:
    """A stream in parts of `size` rows, the last one shorter."""
    held: list[Tensor] = []
    count = 0
    for part in stream():
        held.append(part)
        count += len(part)
        while count >= size:
            whole = held[0] if len(held) == 1 else torch.cat(held)
            yield whole[:size]
            held, count = ([whole[size:]] if count > size else []), count - size
    if count:
        yield held[0] if len(held) == 1 else torch.cat(held)


def length(stream: Stream) -> int:
    """How many rows a stream has."""
    return sum(len(part) for part in stream())
