"""Write docs/families.md from the lines of `families/run.py`: `python families/table.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from run import HERE, kept_lines
from specimens import Specimen, specimens

PAGE = HERE.parent / "docs" / "families.md"
KINDS = ("identity", "zero", "shortcut", "pointwise")
TOP = """# Denoisers

Every denoiser class of diffusers, built tiny and random (`families/specimens/`), on the whole way (`families/walk.py`):

1. its operators are discovered from one call, which is stated, so that it reaches what an optional argument brings; for most
   classes `ldpruner.example_call` learns one that runs as well, without a pipeline at hand;
2. every replacement of every operator is tried in the whole denoiser: the same shapes, finite, restored bit for bit;
3. a plan drawn by chance, to about 70 % of the MACs, is pruned;
4. it is saved in the three forms, portable, plugin and dense, and loaded in another process: bit-equal outputs, once tensors begin
   at multiples of 64 bytes there too (a file's need not, and on AMD EPYC matrix products then differ in last bits);
5. a backward pass reaches every parameter that is left.

`python families/run.py && python families/table.py` writes this page; `make test-all` has a test for each row. A tiny random
denoiser says that the tool works on a class, not how much can be removed from a trained one.
"""
NOTES = """
*call*: whether one can be learned from the class, its configuration and its errors. *dense*: whether the random plan itself has a
dense form (plan), or only one of up to three edits that leave a branch out (branches), as a normalisation cannot be made to do
nothing by any weights. *idle*: parameters, by name, that the random plan leaves without a use and that lie in nothing that can be
taken away, such as a table of a block's own, or a module that is called twice; in brackets those that the original's own call does
not reach either.
"""


def page(lines: Sequence[Mapping[str, Any]], known: Mapping[str, Specimen]) -> str:
    """The page as text."""
    made_with = sorted({f"diffusers {line['diffusers']}, torch {line['torch']}, {line['date']}" for line in lines})
    through = [line for line in lines if not line["failed"]]
    learned = sum(not known[str(line["name"])].why for line in lines)
    head = f"\n{len(through)} of {len(lines)} classes go the whole way; the calls of {learned} can be learned.\n"
    head += f"Made with {'; '.join(made_with)}.\n"
    table = ["| class | call | operators | " + " | ".join(KINDS) + " | MACs left | edits | dense | idle |", "|---" * 11 + "|"]
    table += [_row(line, known[str(line["name"])]) for line in sorted(through, key=lambda line: str(line["name"]))]
    failed = [f"- `{line['name']}`: {_cause(line, known)}" for line in lines if line["failed"]]
    stated = [f"- `{name}`: {known[name].why}" for name in sorted(known) if known[name].why]
    parts = [TOP, head, "\n".join(["", *table, ""]), NOTES]
    parts += ["\n## What does not get to the end, and why\n\n" + "\n".join(failed) + "\n"] if failed else []
    parts += ["\n## Calls that cannot be learned, and why\n\n" + "\n".join(stated) + "\n"]
    return "".join(parts)


def _row(line: Mapping[str, Any], specimen: Specimen) -> str:
    fits = [str(line["candidates"].get(kind, "")) for kind in KINDS]
    unreached = f" ({line['unreached']})" if line["unreached"] else ""
    cells = [
        f"`{line['name']}`",
        "" if specimen.why else "learned",
        str(line["operators"]),
        *fits,
        f"{line['macs_left'] * 100:.0f} %",
        str(line["edits"]),
        "branches" if line["dense"] else "plan",
        f"{line['idle']}{unreached}",
    ]
    return "| " + " | ".join(cells) + " |"


def _cause(line: Mapping[str, Any], known: Mapping[str, Specimen]) -> str:
    specimen = known[str(line["name"])]
    return f"{specimen.cause or line['failed']} (`{line['failed'][:120]}`)"


if __name__ == "__main__":
    PAGE.write_text(page(kept_lines(HERE / "results.jsonl"), specimens()), encoding="utf-8")
