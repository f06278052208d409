"""Which operations of a call reach its output, and which no longer do once a module's output comes from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class Dataflow:
    """The operations of one call in order, each with the ids of the tensors that it reads and makes."""

    reads: list[list[int]] = field(default_factory=list)
    makers: dict[int, list[int]] = field(default_factory=dict)  # tensor -> operations; several where it changes in place
    outputs: list[int] = field(default_factory=list)

    def add(self, reads: Iterable[int], makes: Iterable[int]) -> None:
        """Append one operation."""
        for tensor in makes:
            self.makers.setdefault(tensor, []).append(len(self.reads))
        self.reads.append(list(reads))

    def __len__(self) -> int:
        return len(self.reads)

    def reaching(self, instead: Mapping[int, Iterable[int]] | None = None) -> set[int]:
        """The operations that the outputs depend on; see `needed`."""
        return self.needed(instead)[0]

    def needed(self, instead: Mapping[int, Iterable[int]] | None = None) -> tuple[set[int], set[int]]:
        """The operations and the tensors that the outputs depend on.

        `instead` cuts: a tensor named there is no longer made by its operations, but from the tensors given.
        """
        instead = instead or {}
        found: set[int] = set()
        seen: set[int] = set()
        waiting = list(self.outputs)
        while waiting:
            tensor = waiting.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            if tensor in instead:
                waiting += instead[tensor]
                continue
            for operation in self.makers.get(tensor, []):
                found.add(operation)
                waiting += self.reads[operation]
        return found, seen
