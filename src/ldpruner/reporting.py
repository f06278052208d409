"""Numbers, tables and pictures for people: the only place where a figure is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from ldpruner.files import staged_folder
from ldpruner.plans import Operators, Plan
from ldpruner.record import Measurement


def count(value: float) -> str:
    """A number of parameters or MACs: `6.56 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def percent(ratio: float) -> str:
    """A share of the original: `64.8 %`."""
    return f"{ratio * 100:.1f} %"


def milliseconds(measured: Measurement) -> str:
    """A median with its spread: `17.3 ms (IQR 0.4, n 31)`."""
    return f"{measured.value:.2f} {measured.unit} (IQR {measured.spread:.2f}, n {measured.n})"


def comparison_table(record: dict[str, Any]) -> Table:
    """Parameters, MACs and latency, original beside pruned."""
    table = Table(title=None)
    for heading in ("", "original", "pruned", "pruned / original"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, unit in (("params", ""), ("macs", "")):
        pair = record[name]
        label = {"params": "parameters", "macs": "MACs, one call"}[name]
        table.add_row(
            label, count(pair["original"]) + unit, count(pair["pruned"]) + unit, percent(pair["pruned"] / pair["original"])
        )
    latency = {key: Measurement(**value) for key, value in record["latency"].items()}
    table.add_row(
        "latency, one call", milliseconds(latency["original"]), milliseconds(latency["pruned"]), percent(latency["ratio"].value)
    )
    return table


def benchmark_table(result: dict[str, Any]) -> Table:
    """Every figure of a benchmark, one model or two side by side."""
    table = Table()
    table.add_column("", no_wrap=True)
    for model in result["models"]:
        table.add_column(model, justify="right", overflow="fold")
    ratios = len(result["models"]) > 1
    if ratios:
        table.add_column("second / first", justify="right")
    for name in ("params", "macs", "weights_bytes"):
        values = result[name]
        table.add_row(name, *map(count, values), *([percent(values[1] / values[0])] if ratios else []))
    for name in ("denoiser_call", "generation"):
        readings = [Measurement(**value) for value in result[name]["models"]]
        ratio = [percent(result[name]["ratio"]["value"])] if ratios else []
        table.add_row(f"{name}: {readings[0].how}", *map(milliseconds, readings), *ratio)
    return table


def operator_table(operators: Operators, limit: int | None = None) -> Table:
    """Every operator that can be replaced: shapes, costs, and what fits it."""
    table = Table()
    for heading in ("operator", "kind", "input", "output"):
        table.add_column(heading, overflow="fold")
    for heading in ("params", "MACs", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", overflow="fold")
    for operator in [operator for operator in operators.operators if operator.candidates][:limit]:
        shapes = ["x".join(map(str, shape)) for shape in (operator.input_shape, operator.output_shape)]
        cost = operator.cost
        fits = " ".join(candidate.replacement for candidate in operator.candidates)
        table.add_row(operator.name, operator.kind, *shapes, count(cost.params), count(cost.macs), f"{cost.latency_ms:.3f}", fits)
    return table


def operators_line(operators: Operators) -> str:
    """One sentence on what was found."""
    total, removable = operators.total, [operator for operator in operators.operators if operator.candidates]
    return (
        f"{operators.denoiser}: {len(removable)} operators can be replaced in {len(operators.pairs())} ways. "
        f"{count(total.params)} parameters, {count(total.macs)} MACs, {total.latency_ms:.2f} ms a call on {operators.device}."
    )


def plan_table(plan: Plan) -> Table:
    """What a plan replaces by what, and why."""
    table = Table()
    table.add_column("operator", overflow="fold")
    table.add_column("replacement")
    table.add_column("reason")
    table.add_column("score", justify="right")
    for edit in plan.edits:
        table.add_row(edit.operator, edit.replacement, edit.reason, "" if edit.score is None else f"{edit.score:.4g}")
    return table


def printed(table: Table, width: int = 132) -> str:
    """A table as plain text, for files and pipes."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] = (), *, side: int = 64) -> Image.Image:
    """Pictures in rows, each scaled to `side` pixels without smoothing, with a label before each row."""
    margin = 90 if labels else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (margin + columns * (side + 4) + 4, len(rows) * (side + 4) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        top = 4 + y * (side + 4)
        if labels:
            pen.text((6, top + side // 2 - 6), labels[y], fill="black")
        for x, picture in enumerate(row):
            sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (margin + 4 + x * (side + 4), top))
    return sheet


def save_images(pictures: Sequence[Image.Image], out: Path, *, first_seed: int) -> list[str]:
    """Write one PNG per picture, named after its seed, and `sheet.png` with all, into the folder `out`; return the names."""
    names = [f"seed-{first_seed + index:05d}.png" for index in range(len(pictures))]
    with staged_folder(out) as scratch:
        for name, picture in zip(names, pictures, strict=True):
            picture.save(scratch / name)
        grid([pictures[first : first + 8] for first in range(0, len(pictures), 8)]).save(scratch / "sheet.png")
    return names
