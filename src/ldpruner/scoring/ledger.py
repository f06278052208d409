"""What was measured of edits, kept line by line, so that a run that stopped goes on, with any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ldpruner.errors import RunError
from ldpruner.files import append_json_line, read_json_lines
from ldpruner.plans import Edit
from ldpruner.processes import Crew

Key = tuple[str, str]  # operator and replacement, as `Score.key`
Measure = Callable[[Sequence[Edit]], Sequence[list[float]]]  # some edits, to the numbers of each
Watch = Callable[[Iterable[Edit], int, int], Iterable[Edit]]  # edits to come, done before, in all


def key_of(edit: Edit) -> Key:
    return edit.operator, edit.replacement


class Ledger:
    """Numbers by kind of measurement and edit. Each process appends to a file of its own in `folder`, and reads all of them."""

    def __init__(self, folder: Path | None = None, crew: Crew = Crew(), watch: Watch | None = None) -> None:  # noqa: B008  frozen
        self.crew = crew
        self.watch = watch
        self.path = folder / f"measured-{crew.rank}.jsonl" if folder else None
        self._known: dict[tuple[str, Key], list[float]] = {}
        for file in sorted(folder.glob("measured-*.jsonl")) if folder else ():
            self._read(file)

    def measured(self, kind: str, edits: Sequence[Edit], measure: Measure, *, at_once: int = 1) -> dict[Key, list[float]]:
        """The numbers of every edit: those that are not known yet are measured, shared out among the processes."""
        missing = [edit for edit in edits if (kind, key_of(edit)) not in self._known]
        mine, found = self.crew.share(missing, done=len(self._known)), dict[tuple[str, Key], list[float]]()

        def done() -> Iterator[Edit]:
            for start in range(0, len(mine), at_once):
                group = mine[start : start + at_once]
                found.update(((kind, key_of(edit)), values) for edit, values in zip(group, measure(group), strict=True))
                yield from group

        for edit in self.watch(done(), len(edits) - len(missing), len(edits)) if self.watch and missing else done():
            if self.path:
                line = {
                    "kind": kind,
                    "operator": edit.operator,
                    "replacement": edit.replacement,
                    "values": found[kind, key_of(edit)],
                }
                append_json_line(self.path, line)
        self._known |= self.crew.gathered(found)
        return {key_of(edit): self._known[kind, key_of(edit)] for edit in edits}

    def _read(self, file: Path) -> None:
        try:
            for line in read_json_lines(file):
                self._known[line["kind"], (line["operator"], line["replacement"])] = [float(value) for value in line["values"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file}: cannot be read ({type(error).__name__}: {error}). Score again into a new folder.") from error
