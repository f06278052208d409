"""Walk through classes and write one line for each: `python families/run.py [CLASS...] [--out FILE]`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
from loading import LIBRARY, Loader
from specimens import Specimen, specimens
from walk import Walk, walk

HERE = Path(__file__).parent


def walked(specimen: Specimen, loaders: dict[str, Loader]) -> Walk:
    """The walk of one class, with what ended it early where something did."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diffusers' classes warn of is not ours to mend
        try:
            return walk(specimen, specimen.stated_call(), Path(scratch), loaders)
        except Exception as error:  # whatever it is, it is a line of the table
            return Walk(specimen.name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Walk through classes of denoisers and write one line for each.")
    parser.add_argument("classes", nargs="*", help="By default all of them.")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known, loaders = specimens(), {form: Loader(form) for form in LIBRARY}
    lines = {line["name"]: line for line in kept_lines(given.out)}
    for name in given.classes or sorted(known):
        began = time.perf_counter()
        found = walked(known[name], loaders)
        lines[name] = asdict(found) | made_with() | {"seconds": round(time.perf_counter() - began, 1)}
        print(f"{name}: {found.failed or 'ok'}", flush=True)
        text = "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines))
        given.out.write_text(text, encoding="utf-8")
    for loader in loaders.values():
        loader.close()


def made_with() -> dict[str, str]:
    """When, and by which versions."""
    return {"date": date.today().isoformat(), "diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]}


def kept_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


if __name__ == "__main__":
    main()
