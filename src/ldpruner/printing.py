"""What commands print for programs, and the bars that they draw on stderr for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldpruner.plans import Score


def print_json(data: Any) -> None:
    """One line of JSON on stdout, without NaN or infinity."""
    print(json.dumps(data, allow_nan=False))


def progress(scores: Iterable[Score], done: int, total: int) -> Iterable[Score]:
    """A progress bar over scores as they come."""
    from tqdm.auto import tqdm

    bar: Iterable[Score] = tqdm(scores, initial=done, total=total, desc="scoring", unit="candidate", mininterval=1, file=sys.stderr)
    return bar


def watch(parts: Iterator[Any], total: int, what: str) -> Iterator[Any]:
    """A progress bar over parts of samples, by their sizes."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="sample", mininterval=1, file=sys.stderr) as bar:
        for part in parts:
            bar.update(len(next(iter(part.values()))))
            yield part
