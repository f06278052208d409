"""Names to strategies. An unknown name raises with the nearest known ones. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ldpruner.errors import UnknownNameError, suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """An ordered table of named entries of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that files its argument under `name`; a name is taken once."""

        def file(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name} is registered twice"
            self._entries[name] = entry
            return entry

        return file

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UnknownNameError(f"{self.kind} {name!r} is unknown: {suggest(name, self._entries)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
