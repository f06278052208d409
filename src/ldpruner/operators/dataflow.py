"""Which operations of a call reach its output, and which no longer do once a module's output comes from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components


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


class Uses:
    """How often everything that the outputs depend on is used, so that a cut is followed no further than it reaches.

    A call has tens of thousands of operations, and what a cut leaves without a use is mostly what lies right before it.
    """

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self.operations, self.tensors = flow.needed()
        self._readers = Counter(tensor for each in self.operations for tensor in set(flow.reads[each]))
        self._readers.update(set(flow.outputs))
        self._made = Counter(maker for tensor in self.tensors for maker in set(flow.makers.get(tensor, [])))
        self._circular = self._in_circles()

    def lost(self, instead: Mapping[int, Iterable[int]]) -> tuple[set[int], set[int]]:
        """The operations and the tensors that the outputs no longer depend on after this cut; see `Dataflow.needed`.

        What a tensor is made from instead is what it depended on before, as an operator's input.
        """
        cuts = self.tensors.intersection(instead)
        if cuts & self._circular or not all(self.tensors.issuperset(instead[cut]) for cut in cuts):  # or something comes into use
            return self._lost_of_all(instead)
        readers = Counter(tensor for cut in cuts for tensor in set(instead[cut]))  # more, and less, than without the cut
        made, unmade = Counter[int](), [*cuts]
        operations, tensors = set[int](), set[int]()
        while unmade:
            for maker in set(self._flow.makers.get(unmade.pop(), [])):
                made[maker] -= 1
                if self._made[maker] + made[maker]:
                    continue
                operations.add(maker)
                unread = [*set(self._flow.reads[maker])]
                while unread:
                    tensor = unread.pop()
                    if tensor in self._circular:  # uses by what it is made of would be counted as others'
                        return self._lost_of_all(instead)
                    readers[tensor] -= 1
                    if self._readers[tensor] + readers[tensor]:
                        continue
                    tensors.add(tensor)
                    if tensor in cuts:
                        unread += set(instead[tensor])
                    else:
                        unmade.append(tensor)
        return operations, tensors

    def all_lost(self, ranges: Sequence[range], operations: set[int]) -> list[bool]:
        """Of ranges of operations: whether the outputs depended on any of them, and on none without these operations."""
        starts, stops = np.array([(each.start, each.stop) for each in ranges], dtype=int).reshape(-1, 2).T

        def inside(some: set[int]) -> NDArray[np.intp]:
            ordered = np.array(sorted(some), dtype=int)
            return np.searchsorted(ordered, stops) - np.searchsorted(ordered, starts)

        counts = inside(self.operations)
        return [bool(lost) for lost in (counts > 0) & (inside(operations) == counts)]

    def _lost_of_all(self, instead: Mapping[int, Iterable[int]]) -> tuple[set[int], set[int]]:
        operations, tensors = self._flow.needed(instead)
        return self.operations - operations, self.tensors - tensors

    def _in_circles(self) -> set[int]:
        """The tensors made by operations that depend on themselves, as those do that write in place."""
        reads, makers = self._flow.reads, self._flow.makers
        pairs = [(each, maker) for each in self.operations for tensor in reads[each] for maker in makers.get(tensor, [])]
        if not pairs:
            return set()
        rows, columns = np.array(pairs).T
        size = len(self._flow)
        graph = csr_array((np.ones(len(pairs), dtype=bool), (rows, columns)), shape=(size, size))
        _, labels = connected_components(graph, connection="strong")
        shared = np.bincount(labels)[labels] > 1
        circular = {int(each) for each in np.flatnonzero(shared)} | {each for each, maker in pairs if each == maker}
        return {tensor for tensor in self.tensors if not circular.isdisjoint(makers.get(tensor, []))}
