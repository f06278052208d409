"""Walk through classes and write one line for each: `python families/run.py [CLASS...] [--out FILE]`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
from loading import LIBRARY, Loader
from specimens import specimens
from walk import Walk, walk


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = specimens()
    loaders = {form: Loader(form) for form in LIBRARY}
    for name in given.classes or sorted(known):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = walk(known[name], known[name].stated_call(), Path(scratch), loaders)
            except Exception as error:
                if given.trace:
                    traceback.print_exc()
                found = Walk(name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        line = json.dumps(asdict(found) | {"seconds": round(time.perf_counter() - began, 1)})
        print(line, flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    for loader in loaders.values():
        loader.close()


if __name__ == "__main__":
    main()
