"""The command `run`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ldpruner.options import FOLDER, as_json, draw_downloads_alone
from ldpruner.printing import print_json, progress, watch


@click.command()
@click.argument("file", metavar="RECIPE", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="The folder of the run; one that was stopped there goes on.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Say otherwise, such as score.samples=8; in YAML.")
@click.option("--reduced", is_flag=True, help="The recipe's section `reduced` over the rest: tries all stages in little time.")
@click.option("--model", metavar="MODEL", help="Another pipeline than the recipe's, such as a small one of the same class.")
@as_json
def run(file: Path, out: Path, changes: tuple[str, ...], reduced: bool, model: str | None, as_json: bool) -> None:
    """Run a whole experiment: score, plan, prune, distil, evaluate and benchmark, as the YAML file RECIPE says."""
    from ldpruner.recipe_settings import Recipe

    chosen = Recipe.load(file, reduced=reduced, model=model, changes=changes)
    chosen.check_files()  # torch takes seconds to import
    from ldpruner import recipe

    draw_downloads_alone()
    summary = recipe.run(chosen, out, tell=partial(click.echo, err=True), progress=progress, watch=watch)
    if as_json:
        print_json({"out": str(out), **summary})
        return
    for line in _lines(summary):
        print(line)
    print(f"Written to {out}; the whole summary is in {out / recipe.SUMMARY}.")


def _lines(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    params, macs = summary["params"], summary["macs"]
    shares = f"parameters {params['pruned'] / params['original']:.1%}, MACs {macs['pruned'] / macs['original']:.1%}"
    times = ", ".join(f"{name.replace('_', ' ')} {ratio:.1%}" for name, ratio in summary["benchmark"].items())
    return [
        f"{summary['recipe']} on {summary['model']}: {summary['edits']} operators replaced.",
        f"Left of the original: {shares}; of its time: {times}.",
        *map(_figure_line, summary["evaluation"]),
        *(f"Published, {name}: {value}" for name, value in summary["published"].items()),
    ]


def _figure_line(figure: dict[str, Any]) -> str:
    net = f", {figure['features']}" if figure["features"] else ""
    original = "" if figure["original"] is None else f"{figure['original']:10.4g} ->"
    return f"  {figure['title'] + net:<60} {original:>13} {figure['pruned']:10.4g}  ({figure['better']} is better)"
