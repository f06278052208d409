"""`docs/evidence.md` from the lines of `evidence/results/`: tables, plots, pictures; nothing that was not measured.

python evidence/page.py --readme README.md     # and the README's tables of the same
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from claims import claims
from lines import OF_CAPTIONS, UNSEEN, Group, Line, course, grouped, label, markdown_table, place_of
from plots import courses, quality_by_latency
from summary import NAMES, put_into, summary

from ldpruner.evaluation import METRICS
from ldpruner.files import read_json_lines, write_text
from ldpruner.reporting import environment_line, percent

TO_DATA = "latent-frechet-to-data"
SHARES = ("latency_predicted", "latency_ratio", "latency_alone", "params_ratio", "macs_ratio")
UNSEEN_CAPTIONS = tuple(UNSEEN + name for name in OF_CAPTIONS)
SECOND = (*OF_CAPTIONS, *UNSEEN_CAPTIONS, "class-balance", "precision", "recall", TO_DATA)  # beside the Fréchet distance
TITLES = {name: f"{METRICS[name].title} {'↓' if METRICS[name].better == 'lower' else '↑'}" for name in METRICS}
TITLES |= {UNSEEN + name: f"{TITLES[name]}, unseen captions" for name in OF_CAPTIONS}
TITLES[TO_DATA] = "Latent Fréchet distance to the data ↓"
HEAD = """# Evidence: every method side by side

Made by `python evidence/run.py --data DIR`, which adds a line to `evidence/results/` with every result, and by `python
evidence/page.py` from these lines. All methods take the same operators, budgets, repair, distillation, data and judge. Latency
is that of one denoiser call: `predicted` from the times of operators, `measured` in turn with the original's, repair included,
and `alone`, once more in one run of `python evidence/latency.py` with nothing beside it; plans are in
`evidence/results/plans/`. `pruned` is the plan as it is, `repaired` after `--repair closed-form`, `distilled` after that and so
many steps of distillation. Of several seeds the mean is shown, and after ± half of what lies between the lowest and the
highest. `original, taught` is the control: the original learns as the students do. Where these only imitate it (task weight 0,
no guide) it has nothing to learn, and there is no such line. How students learn was found by trying on those of `ld-pruner,
sweep`, seed 0, and is the same for all at a budget; what lies between students of one plan under several seeds is training's
own chance. Most prompts of zoo:emoji are captions of training pictures; what is said of `unseen captions` is measured on more
samples, one for each caption that no such picture has.
"""
TOGETHER = """## All pipelines

Fréchet distances after distillation, one figure a seed; lower is better. Last the geometric mean over the pipelines, each
figure divided by the original's: the mean over seeds that all have, and after ± half of what lies between them.
"""


def write_page(results: Path, page: Path) -> None:
    """Write the page, and its plots beside it."""
    lines = known_lines(results)
    parts = [HEAD, TOGETHER, summary(lines)]
    for name in sorted({line["pipeline"] for line in lines}, key=NAMES.index):
        mine = [line for line in lines if line["pipeline"] == name]
        for number, settings in enumerate({str(_shared(line)): _shared(line) for line in mine}.values()):
            some = _one_original(line for line in mine if _shared(line) == settings)
            parts.append(_section(name, settings, some, page, f"{name}-{number}" if number else name))
    write_text(page, "\n".join(parts))


def known_lines(results: Path) -> list[Line]:
    """All lines, each with what other scripts found of its plan."""
    lines = [line for file in sorted(results.glob("*.jsonl")) for line in read_json_lines(file)]
    for line in lines:
        alone = _of_plan(line, results / "latencies" / f"{line['pipeline']}.json", "ratios")
        line |= {"latency_alone": alone.get("value"), "latency_predicted": alone.get("predicted")}
        line["shifts"] = _of_plan(line, results / "shifts" / f"{line['pipeline']}.json").get("rows", [])
    return lines


def _shared(line: Line) -> dict[str, Any]:
    """The settings of a line that all of a section have: some budgets are followed by more steps of distillation than others."""
    return {name: value for name, value in line["settings"].items() if name != "distil_steps"}


def _one_original(lines: Iterable[Line]) -> list[Line]:
    """Lines without the original's second and later ones: it is measured again where more steps of distillation follow."""
    found = list(lines)
    first = next((line for line in found if line["stage"] == "original"), None)
    return [line for line in found if line["stage"] != "original" or line is first]


def _of_plan(line: Line, file: Path, part: str | None = None) -> dict[str, Any]:
    """What a file of another script says of a line's plan; nothing where it does not."""
    if "method" not in line or not file.exists():
        return {}
    whole: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    found: dict[str, Any] = (whole[part] if part else whole).get(place_of(line["method"], line["budget"], line["seed"]), {})
    return found


def _section(name: str, settings: dict[str, Any], lines: Sequence[Line], page: Path, plots: str) -> str:
    original = next((line for line in lines if line["stage"] == "original"), None)
    groups = grouped(lines)
    many, few = settings["samples"], settings["few_samples"]
    parts = [f"## zoo:{name}\n", _controls(lines, many, few)]
    folder = page.parent / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    done = [group for group in groups if group.stages.get("distilled")]
    if done and original:
        quality_by_latency(done, original, many, few, folder / f"{plots}-quality-by-latency.png", title=f"zoo:{name}")
        parts.append(f"![quality against latency](evidence/{plots}-quality-by-latency.png)\n")
    if done and original:
        rows = claims(groups, original, _measured([original], many), many, few)
        parts += ["### What it was to reach\n", markdown_table([["`ld-pruner, sweep` at latency 65 %", "holds", ""], *rows])]
    for budget, steps in dict.fromkeys((group.budget, group.steps) for group in groups):
        some = [group for group in groups if (group.budget, group.steps) == (budget, steps)]
        parts += [
            f"### Latency {budget}, {steps:,} steps of distillation\n",
            _before_and_after(some, many, few),
            _seconds(some, many, original),
        ]
    parts += [_repair(lines), _training_noise(lines, many)]
    taught = [line for line in lines if line.get("course")]
    if taught and original:
        courses(taught, original, few, folder / f"{plots}-courses.png", title=f"zoo:{name}")
        parts += ["### Convergence\n", _convergence(taught, original, few), f"![courses](evidence/{plots}-courses.png)\n"]
    parts += [_shown(lines), _how(settings, lines)]
    return "\n".join(part for part in parts if part)


def _controls(lines: Sequence[Line], many: int, few: int) -> str:
    """The original, and the original fine-tuned."""
    rows = [line for line in lines if line["stage"] in ("original", "fine-tuned")]
    metrics = ["frechet", "kernel", *_measured(rows, many)]
    table = [["", f"Fréchet, {few:,} samples ↓", *(f"{TITLES[metric]}" for metric in metrics)]]
    for line in rows:
        figures = line["figures"]
        less, more = figures[str(few)].get("frechet"), [figures[str(many)].get(metric) for metric in metrics]
        table.append([label(line), *map(_number, (less, *more))])
    return markdown_table(table)


def _before_and_after(groups: Sequence[Group], many: int, few: int) -> str:
    head = ["method", "seeds", "latency: predicted", "measured", "alone", "parameters", "MACs", "edits", "latent shift: pruned",
            "repaired", f"Fréchet ({few:,}): pruned", "repaired", f"Fréchet ({many:,}): distilled", "pruning, s",
            "distilling, s"]  # fmt: skip
    table = [head]
    for group in groups:
        stage = next(iter(reversed(group.stages)))
        found = [group.plain(stage, key) for key in SHARES]
        ratios = [percent(statistics.mean(values)) if values else "" for values in found]
        table.append([
            group.title,
            str(len(group.stages[stage])),
            *ratios,
            spread(group.plain(stage, "edits"), "{:.0f}"),
            spread(group.plain("repaired", "latent_shift_before_repair")),
            spread(group.plain("repaired", "latent_shift")),
            spread(group.values("pruned", "frechet", few)),
            spread(group.values("repaired", "frechet", few)),
            spread(group.values("distilled", "frechet", many)),
            spread(group.plain("pruned", "seconds_pruning"), "{:.0f}"),
            spread([line["distillation"]["seconds"] for line in group.stages.get("distilled", [])], "{:.0f}"),
        ])  # fmt: skip
    return markdown_table(table)


def _seconds(groups: Sequence[Group], many: int, original: Line | None) -> str:
    """Every second metric after distillation."""
    done = [group for group in groups if group.stages.get("distilled")]
    if not done or original is None:
        return ""
    metrics = _measured([original], many)
    own = original["figures"][str(many)]
    table = [["after distillation", "Fréchet, against the original", *(TITLES[metric] for metric in metrics)]]
    table.append(["original", "100 %", *(_number(own.get(metric)) for metric in metrics)])
    for group in done:
        ratio = statistics.mean(group.values("distilled", "frechet", many)) / own["frechet"]["value"]
        table.append([group.title, percent(ratio), *(spread(group.values("distilled", metric, many)) for metric in metrics)])
    return markdown_table(table)


def _repair(lines: Sequence[Line]) -> str:
    """What repair leaves of the joint latent shift, by the number of samples that it is taken on."""
    table = [["plan", "samples", "pruned", "repaired", "left"]]
    for line in lines:
        for row in line["shifts"] if line["stage"] == "repaired" else ():
            values = [row["pruned"], row["repaired"]]
            seen = [f"{label(line)}, seed {line['seed']}", f"{row['samples']:,}", *(f"{value:.4g}" for value in values)]
            table.append([*seen, percent(values[1] / values[0])])
    said = (
        "The joint latent shift of other samples than those of the plan, from the same noise (`python evidence/shifts.py`). Of\n"
        "few samples a good part is chance, which repair cannot take away: how each sample differs, not how distributions do.\n\n"
    )
    return "### Repair\n\n" + said + markdown_table(table) if len(table) > 1 else ""


def _training_noise(lines: Sequence[Line], many: int) -> str:
    """One plan, taught under several seeds: what lies between its students is not the plan's doing."""
    again = [line for line in lines if line["stage"] == "taught again"]
    if not again:
        return ""
    first = [line for line in lines if line["stage"] == "distilled" and line["seed"] == 0 and label(line) == again[0]["network"]]
    table = [["seed of distillation", f"Fréchet, {many:,} samples ↓"]]
    table += [[str(line["seed"]), _number(line["figures"][str(many)]["frechet"])] for line in (*first, *again)]
    return (
        f"### One plan, taught again\n\nThe plan of {again[0]['network']}, seed 0, under other seeds of distillation.\n\n"
        + markdown_table(table)
    )


def _convergence(lines: Sequence[Line], original: Line, few: int) -> str:
    """Fréchet distances on the way, and the first of the steps at which the original's is reached."""
    steps = sorted({point["steps"] for line in lines for point in course(line, few)})
    goal = original["figures"][str(few)]["frechet"]["value"]
    table = [["seed 0", *(f"{step} steps" for step in steps), f"original's {goal:.4g} reached after"]]
    for line in lines:
        points = {point["steps"]: point["frechet"] for point in course(line, few)}
        reached = next((f"{step} steps" for step in sorted(points) if points[step] <= goal), "not reached")
        table.append([label(line), *(f"{points[step]:.4g}" if step in points else "" for step in steps), reached])
    return (
        f"Fréchet distance of {few:,} samples after so many steps of distillation; `0` is what distillation began with.\n\n"
        + markdown_table(table)
    )


def _shown(lines: Sequence[Line]) -> str:
    """The strips of the first seed, and the sounds."""
    rows = [line for line in lines if line.get("shown") and line.get("seed", 0) == 0]
    table = [["", "eight samples of the same seeds"]]
    for line in rows:
        files = line["shown"]
        sound = f"<br>[listen](evidence/{files['sound']})" if "sound" in files else ""
        table.append([label(line) + sound, f"![](evidence/{files['pictures']})"])
    return "### What they generate\n\n" + markdown_table(table) if rows else ""


def _how(settings: dict[str, Any], lines: Sequence[Line]) -> str:
    said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items())
    learning = (line["distillation"]["seconds"] if "distillation" in line else 0.0 for line in lines)  # resumed runs have it whole
    spent = sum(learning) + sum(line["seconds_measuring"] for line in lines)
    remarks = "".join(
        f" {remark[0].upper()}{remark[1:]}." for remark in dict.fromkeys(line["remark"] for line in lines if "remark" in line)
    )
    where = environment_line(lines[-1]["environment"])
    return f"Settings: {said}. {where}. Distilling and measuring took {spent / 3600:.1f} h.{remarks}\n"


def _measured(lines: Sequence[Line], count: int) -> list[str]:
    return [name for name in SECOND if any(name in line["figures"].get(str(count), {}) for line in lines)]


def spread(values: Sequence[float], form: str = "{:.4g}") -> str:
    """The mean, and half the range where there are several."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    error = "" if len(values) == 1 or not math.isfinite(half) else f" ± {half:.2g}"
    return form.format(statistics.mean(values)) + error


def _number(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:.4g}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    parser.add_argument("--readme", type=Path, help="a file whose tables, between their marks, are written too")
    given = parser.parse_args()
    write_page(given.results, given.page)
    if given.readme:
        write_text(given.readme, put_into(given.readme.read_text(encoding="utf-8"), summary(known_lines(given.results))))
