"""Silence for C code that prints where results go. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def printing_nothing() -> Iterator[None]:
    """Nothing that is printed to the process's standard output meanwhile arrives, from Python or from C.

    HiGHS, in some versions, prints lines of its own whatever it is told; `--json` must stay JSON. Where there is no standard
    output to close, nothing is done.
    """
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    buffered = ctypes.CDLL(None if os.name == "posix" else "ucrtbase")
    sys.stdout.flush()
    buffered.fflush(None)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        buffered.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
