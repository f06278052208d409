"""How a command refuses: nothing is written, and one line says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Refused = Callable[..., str]
BUDGET = ("--budget", "macs=75%")


def everything_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def the_line(err: str) -> str:
    """The one line on stderr, without the name in front; what was measured first and a progress bar may stand before it."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith(("scoring:", "Measured:"))]
    assert len(lines) == 1, err
    assert lines[0].startswith("ldpruner: ")
    return lines[0].removeprefix("ldpruner: ")


def copied(name: str, folder: Path) -> Path:
    """A copy, for a test to damage."""
    return Path(shutil.copytree(name, folder / name))
