"""Numbers, tables and pictures for people: the only place where a figure is rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from ldpruner.files import staged_folder
from ldpruner.plans import Operators, Plan, Quantity, Score
from ldpruner.record import Measurement
from ldpruner.runs import Scored
from ldpruner.selection import Row
from ldpruner.sound import Wave, levelled, write_wav

if TYPE_CHECKING:  # torch and diffusers come with these, and a table of scores needs neither
    from ldpruner.evaluation import Evaluation, Figure
    from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe


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


def interval(ratio: Measurement) -> str:
    """A ratio with the 95 % interval of its median: `64.8 % (62.1 to 66.0)`."""
    if ratio.low is None or ratio.high is None:
        return percent(ratio.value)
    return f"{percent(ratio.value)} ({ratio.low * 100:.1f} to {ratio.high * 100:.1f})"


def megabytes(size: float | None) -> str:
    """A number of bytes: `26.23 MB`."""
    return "" if size is None else f"{size / 1e6:.2f} MB"


SIZES = {
    "params": ("parameters, denoiser", count),
    "macs": ("MACs, one call, one sample", count),
    "weights_bytes": ("weights in memory, denoiser", megabytes),
    "file_bytes": ("weights on disk, pipeline", megabytes),
}
TIMES = {
    "denoiser_call": "denoiser call",
    "generation": "generation",
    "decoder": "decoder",
    "text_encoder": "text encoder",
    "vocoder": "spectrogram to sound",
}


def benchmark_table(result: dict[str, Any]) -> Table:
    """Every figure of a benchmark, one model or two side by side."""
    table = Table()
    table.add_column("", no_wrap=True)
    for model in result["models"]:
        table.add_column(model, justify="right", overflow="fold")
    compared = len(result["models"]) > 1
    if compared:
        table.add_column("first / second (95 %)", justify="right")
    for name, (title, shown) in SIZES.items():
        values = result[name]
        ratio = [percent(values[0] / values[1]) if all(values) else ""] if compared else []
        table.add_row(title, *map(shown, values), *ratio)
    for name, measured in result["times"].items():
        readings = [Measurement(**value) for value in measured["models"]]
        ratio = [interval(Measurement(**measured["ratio"]))] if compared else []
        table.add_row(f"{TIMES[name]}: {readings[0].how}", *map(milliseconds, readings), *ratio)
    for name, title in (("peak_bytes", "in a generation, at most"), ("added_bytes", "of it added by the generation")):
        sizes = [each[name] for each in result["memory"]]
        table.add_row(f"{result['memory'][0]['kind']} memory {title}", *map(megabytes, sizes), *[""] * compared)
    return table


def benchmark_lines(result: dict[str, Any]) -> list[str]:
    """What the table of a benchmark does not say: the modules' times, sizes and where it was measured."""
    lines = [times_line(name, times) for name, times in zip(result["models"], result["operators"], strict=True)]
    latents, decoded = ("x".join(map(str, result[name])) for name in ("latents", "resolution"))
    lines.append(f"{result['task']}, batch {result['batch']}, latents {latents}, decoded {decoded}")
    return [*lines, environment_line(result["environment"])]


def environment_line(environment: Mapping[str, Any]) -> str:
    """Where figures were taken, in one line."""
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def times_table(result: dict[str, Any], limit: int) -> Table:
    """The modules that take longest by themselves, of every model of a benchmark."""
    table = Table()
    for heading in ("model", "operator", "kind"):
        table.add_column(heading, overflow="fold")
    table.add_column("own ms", justify="right")
    table.add_column("of the sum", justify="right")
    for model, times in zip(result["models"], result["operators"], strict=True):
        for row in times["times"][:limit]:
            table.add_row(model, row["operator"], row["kind"], f"{row['own_ms']:.3f}", percent(row["own_ms"] / times["sum_ms"]))
    return table


def times_line(model: str, times: dict[str, Any]) -> str:
    """How far the operators' times are from the whole."""
    return (
        f"{model}: {len(times['times'])} modules add up to {times['sum_ms']:.2f} ms when watched, "
        f"{percent(times['sum_to_whole'])} of the {times['whole_ms']:.2f} ms that one call takes unwatched."
    )


def evaluation_table(evaluation: Evaluation) -> Table:
    """Every figure of an evaluation, one model or two side by side; an arrow shows which way is better."""
    table = Table()
    table.add_column("metric", overflow="fold")
    table.add_column("seen by", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for model in evaluation.models:
        table.add_column(model, justify="right", overflow="fold")
    cells: dict[tuple[str, str | None], list[Figure | None]] = {}  # by metric and net
    for place, figures in enumerate(evaluation.figures):
        for figure in figures:
            cells.setdefault((figure.metric, figure.digest), [None] * len(evaluation.models))[place] = figure
    for row in cells.values():
        known = next(figure for figure in row if figure)
        counted = f"{known.samples}" + (f" to {known.reference}" if known.reference else "")
        arrow = {"lower": "↓", "higher": "↑"}[known.better]
        table.add_row(f"{known.title} {arrow}", known.features or "", counted, *map(_figure, row))
    return table


def _figure(figure: Figure | None) -> str:
    return "" if figure is None else estimate(figure.value, figure.error)


def estimate(value: float, error: float | None) -> str:
    """A value with its standard error, where there is one: `0.0123 ± 0.0004`."""
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """What the table of an evaluation does not say: notes, cost, and where it was measured."""
    known = {figure.title: figure.note for figures in evaluation.figures for figure in figures if figure.note}
    spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in evaluation.seconds.items())
    memory = f"; {megabytes(evaluation.peak_bytes)} of memory at most" if evaluation.peak_bytes else ""
    return [
        *(f"{title}: {note}." for title, note in known.items()),
        f"{evaluation.task}; {spent} ({evaluation.generated} samples generated, the others from the cache){memory}.",
        environment_line(evaluation.environment),
    ]


def operator_table(operators: Operators, limit: int | None = None, *, scores: Sequence[Score] = ()) -> Table:
    """Every operator that can be replaced: shapes, costs, and what fits it; with scores, the replacement that scores lowest."""
    table, told = Table(), _told(scores)
    for heading in ("operator", "kind", "input", "output"):
        table.add_column(heading, overflow="fold")
    for heading in ("params", "MACs", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", overflow="fold")
    for heading in told:
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("score", "doubt") else "left")
    best = {entry.operator: entry for entry in sorted(scores, key=lambda entry: entry.score, reverse=True)}
    for operator in [operator for operator in operators.operators if operator.candidates][:limit]:
        shapes = ["x".join(map(str, shape)) for shape in (operator.input_shape, operator.output_shape)]
        cost = operator.cost
        fits = " ".join(candidate.replacement for candidate in operator.candidates)
        costs = count(cost.params), count(cost.macs), f"{cost.latency_ms:.3f}"
        scored = [tell(best[operator.name]) if operator.name in best else "" for tell in told.values()]
        table.add_row(operator.name, operator.kind, *shapes, *costs, fits, *scored)
    return table


def _told(scores: Sequence[Score]) -> dict[str, Callable[[Score], str]]:
    """The columns that tell of scores, by heading."""
    columns: dict[str, Callable[[Score], str]] = {}
    if scores:
        columns |= {"best": lambda entry: entry.replacement, "score": lambda entry: f"{entry.score:.3g}"}
    if any(entry.judged is not None for entry in scores):
        columns["judged by"] = lambda entry: entry.judged or ""
    if any(entry.doubt is not None for entry in scores):
        columns["doubt"] = lambda entry: "" if entry.doubt is None else f"{entry.doubt:.2f}"
    return columns


def operators_line(operators: Operators) -> str:
    """One sentence on what was found."""
    total, removable = operators.total, [operator for operator in operators.operators if operator.candidates]
    return (
        f"{operators.denoiser}: {len(removable)} operators can be replaced in {len(operators.pairs())} ways. "
        f"{count(total.params)} parameters, {count(total.macs)} MACs, {total.latency_ms:.2f} ms a call on {operators.device}."
    )


def prices_table(rows: Sequence[Row], quantity: Quantity) -> Table:
    """What each budget is predicted to leave, and how far it would move the latents."""
    table = Table()
    table.add_column("budget", no_wrap=True)
    left = list(rows[0].predicted) if rows else []
    for heading in (*left, "edits", "joint latent shift", "mostly"):
        table.add_column(heading, justify="right", no_wrap=True)
    if any(row.exhausted for row in rows):
        table.add_column("")
    for row in rows:
        shares = [percent(row.predicted[name]) for name in left]
        low, high = row.likely
        shifts = f"{row.joint_shift:.3g}", f"{low:.3g} to {high:.3g}"
        missed = ["out of reach"] if row.exhausted else []
        table.add_row(f"{quantity}={row.target * 100:.4g}%", *shares, f"{row.edits}", *shifts, *missed)
    return table


def prices_lines(scored: Scored) -> list[str]:
    """What the table of budgets rests on."""
    scores, pairs = len(scored.scores), len(scored.operators.pairs())
    doubted = any(entry.doubt is not None for entry in scored.scores)
    doubt = "Doubt is the standard deviation of a score's natural logarithm; the range holds none of it."
    return [
        f"{scored.source}: predicted from {scores} scores of {pairs} replacements by method {scored.method}; nothing was measured.",
        "Joint latent shift: the root of the sum of the edits' squared scores, before repair. Of the plans that we measured most "
        "shifted by as much as the range says; it promises nothing for others.",
        *([doubt] if doubted else []),
    ]


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


def save_samples(pipeline: Pipeline, probe: Probe, out: Path, *, batch_size: int | None = None) -> tuple[list[str], str]:
    """Generate what the pipeline makes into the folder `out`; the files' names, and what they are."""
    seed = probe.seed
    if pipeline.task.endswith("video"):
        return save_videos(pipeline.videos(probe, batch_size=batch_size), out, first_seed=seed), "videos"
    if pipeline.task.endswith("audio") and pipeline.mel is None:
        return save_waves(*pipeline.waves(probe, batch_size=batch_size), out, first_seed=seed), "sounds"
    pictures = pipeline.images(probe, batch_size=batch_size)
    if pipeline.mel is None:
        return save_images(pictures, out, first_seed=seed), "pictures"
    return save_sounds(pipeline, pictures, out, first_seed=seed), "sounds with their spectrograms"


def save_images(pictures: Sequence[Image.Image], out: Path, *, first_seed: int) -> list[str]:
    """Write one PNG per picture, named after its seed, and `sheet.png` with all, into the folder `out`; return the names."""
    names = [f"seed-{first_seed + index:05d}.png" for index in range(len(pictures))]
    with staged_folder(out) as scratch:
        for name, picture in zip(names, pictures, strict=True):
            picture.save(scratch / name)
        _sheet(pictures).save(scratch / "sheet.png")
    return names


def save_sounds(pipeline: Pipeline, spectrograms: Sequence[Image.Image], out: Path, *, first_seed: int) -> list[str]:
    """Write one WAV and one PNG per spectrogram, low pitch at the bottom, and `sheet.png`, into `out`; return the WAVs' names."""
    names = [f"seed-{first_seed + index:05d}" for index in range(len(spectrograms))]
    upright = [upright_spectrogram(picture) for picture in spectrograms]
    with staged_folder(out) as scratch:
        for name, picture, shown in zip(names, spectrograms, upright, strict=True):
            wave, rate = pipeline.sound(picture)
            write_wav(scratch / f"{name}.wav", levelled(wave), rate)
            shown.save(scratch / f"{name}.png")
        _sheet(upright).save(scratch / "sheet.png")
    return [f"{name}.wav" for name in names]


def save_waves(waves: Sequence[Wave], rate: int, out: Path, *, first_seed: int) -> list[str]:
    """Write one WAV per wave, named after its seed, into the folder `out`; return the names."""
    names = [f"seed-{first_seed + index:05d}.wav" for index in range(len(waves))]
    with staged_folder(out) as scratch:
        for name, wave in zip(names, waves, strict=True):
            write_wav(scratch / name, wave, rate)
    return names


def save_videos(videos: Sequence[Sequence[Image.Image]], out: Path, *, first_seed: int) -> list[str]:
    """Write one GIF per video, eight frames a second, and `sheet.png` with the middle frames; return the GIFs' names."""
    names = [f"seed-{first_seed + index:05d}.gif" for index in range(len(videos))]
    with staged_folder(out) as scratch:
        for name, (first, *rest) in zip(names, videos, strict=True):
            first.save(scratch / name, save_all=True, append_images=rest, duration=125, loop=0)
        _sheet([frames[len(frames) // 2] for frames in videos]).save(scratch / "sheet.png")
    return names


def upright_spectrogram(picture: Image.Image) -> Image.Image:
    """A spectrogram as people draw it: low pitch at the bottom, where pipelines keep it at the top."""
    return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    return grid([pictures[first : first + 8] for first in range(0, len(pictures), 8)])
