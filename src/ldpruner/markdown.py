"""What cards are made of: a header in the Hub's terms, tables, and the line below which the text is the user's. No torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

MARKER = "<!-- Below this line the card is yours: ldpruner keeps what you write here when it writes the rest anew. -->"
NOT_EMA = (
    '"Pruned" here means that operators of the denoiser are gone. It does not mean that EMA weights were stripped from a '
    "checkpoint."
)
SHOWN = 12  # rows of a table that stands open; a longer one is folded away


def with_header(header: Mapping[str, Any], body: str) -> str:
    """A whole card: its header as YAML, then the text, then the marker."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(**header)
    return f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n\n{MARKER}\n"


def header_of(card: str) -> dict[str, Any]:
    """The header of a card, as far as it can be read."""
    from huggingface_hub import ModelCard

    try:
        data: Any = ModelCard(card, ignore_metadata_errors=True).data
        return dict(data.to_dict())
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError):  # of the YAML, or of a check of what it says
        return {}


def merged(new: str, there: str | None) -> str | None:
    """The new card with what a user wrote into the one that is there; None where that one is not ours to replace.

    That is all below the marker, and what the header says that ours does not; figures of an earlier evaluation go. A card is
    ours where it has the marker and describes the same kind of thing: a plan, or a pipeline.
    """
    if there is None or not there.strip():
        return new
    if MARKER not in there or _is_of_plan(new) != _is_of_plan(there):
        return None
    header, known = header_of(new), header_of(there)
    kept = {key: value for key, value in known.items() if key not in {*header, "model-index"}}
    tags = [*dict.fromkeys([*header["tags"], *known.get("tags", [])])]
    above = with_header({**header, **kept, "tags": tags}, _body_of(new)).partition(MARKER)[0]
    own = next((text for text in (there.partition(MARKER)[2], new.partition(MARKER)[2]) if text.strip()), "\n")
    return above + MARKER + own


def _body_of(card: str) -> str:
    return card.partition("\n---\n")[2].partition(MARKER)[0]


def _is_of_plan(card: str) -> bool:
    return PLAN_TAG in header_of(card).get("tags", [])


def wrapped(text: str) -> str:
    """A paragraph in lines that people can read unrendered."""
    return textwrap.fill(" ".join(text.split()), 132, break_long_words=False, break_on_hyphens=False)


def bullets(texts: Iterable[str]) -> str:
    """A list, each entry in lines that people can read unrendered."""
    return "\n".join(
        textwrap.fill(text, 132, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for text in texts
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars in cells are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def folded(title: str, text: str) -> str:
    """Text that shows when its title is clicked."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def removed(edits: Sequence[Mapping[str, Any]]) -> str:
    """What was replaced by what, counted in a sentence and listed in a table. `edits` are those of a plan's JSON."""
    if not edits:
        return "No operator was removed."
    counts = Counter(edit["replacement"] for edit in edits)
    dead = sum(edit["reason"] == "dead" for edit in edits)
    counted = ", ".join(f"{count} by `{name}`" for name, count in counts.most_common())
    unread = f" Of these, {dead} went because nothing reads their output any more." if dead else ""
    noun = "operator was" if len(edits) == 1 else "operators were"
    said = wrapped(f"{len(edits)} {noun} replaced: {counted}.{unread} {_meanings(counts)}")
    rows = [(f"`{edit['operator']}`", edit["replacement"], edit["reason"], _score(edit.get("score"))) for edit in edits]
    listed = table(("operator", "replaced by", "why", "score"), rows)
    return f"{said}\n\n{listed if len(rows) <= SHOWN else folded(f'All {len(rows)}', listed)}"


MEANINGS = {
    "identity": "`identity` returns its input",
    "zero": "`zero` adds nothing",
    "shortcut": "`shortcut` keeps a block's skip path alone",
    "pointwise": "`pointwise` is one linear map over channels",
    "narrow": "`narrow` keeps the first channels of its input",
}


def _meanings(names: Iterable[str]) -> str:
    known = [MEANINGS[name] for name in names if name in MEANINGS]
    return "; ".join(known) + "." if known else ""


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


PLAN_TAG = "pruning-plan"


def plan_card(
    name: str,
    plan: Mapping[str, Any],
    *,
    base_model: str | None = None,
    budgets: Sequence[str] = (),
    predicted: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> str:
    """The card of a plan alone: which model it fits, what it removes, how to apply it. `plan` is its JSON."""
    base = base_model or "BASE"
    header = {
        "library_name": "ldpruner",
        "base_model": base_model,
        "tags": ["ldpruner", "pruning", PLAN_TAG],
    }
    fits = f"`{base_model}`" if base_model else "the base model that it was made for (`BASE` below)"
    asked = f" It was made for {' and '.join(budgets)}" + (
        f", with {', '.join(predicted)} predicted to be left" if predicted else ""
    )
    said = [
        f"What [ldpruner](https://pypi.org/project/ldpruner) replaces in {fits}: a plan of a few kilobytes, no weights. It fits "
        f"every `{plan['denoiser']}` of the same architecture (fingerprint {plan['model'][:12]}), and is refused for any other."
        + (f"{asked}." if budgets else ""),
        *remarks,
        NOT_EMA,
    ]
    use = (
        f"```sh\npip install ldpruner\nldpruner prune {base} --plan {name} --out pruned\n```\n\n"
        f'```python\nimport ldpruner\n\npruned = ldpruner.prune("{base}", plan="{name}")\n```'
    )
    fitted = wrapped(
        "`pointwise` stand-ins are fitted anew, on generations of the base model; nothing else is. What a plan does to quality "
        "and speed is measured when it is applied."
    )
    title = f"# {name.rpartition('/')[2]}"
    parts = [title, *map(wrapped, said), "## How to apply it", use, fitted, "## What it removes", removed(plan["edits"])]
    return with_header({key: value for key, value in header.items() if value}, "\n\n".join(parts))
