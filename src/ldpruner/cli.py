"""The command line: arguments to one stage, results to files, errors as one line with exit code 2.

Torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from ldpruner.commands_recipe import run
from ldpruner.commands_recovery import distil
from ldpruner.commands_scores import inspect, plan, score
from ldpruner.commands_sharing import card, push
from ldpruner.errors import BudgetError, LDPrunerError
from ldpruner.options import (
    FOLDER,
    STYLE,
    as_json,
    budget_of,
    choices_of,
    choosing,
    generating,
    loading,
    model,
    names_of,
    pipeline_of,
    probe_of,
    probing,
    refuse_settled,
    replacing,
)
from ldpruner.printing import print_json, progress, watch


@click.group(context_settings=STYLE)
@click.version_option(package_name="ldpruner")
def app() -> None:
    """Make latent diffusion models smaller and faster. MODEL is a diffusers folder, a hub id, a checkpoint in one
    .safetensors file, or zoo:NAME."""


@app.command()
@model
@click.option("--out", type=FOLDER, required=True, help="Where to write the pruned pipeline.")
@choosing
@click.option("--plan", "plan_file", metavar="PLAN", help="Prune by this plan, a file, folder or hub id, instead of scoring.")
@click.option("--run", type=FOLDER, help="Keep scores in this folder, and reuse them from there.")
@click.option("--form", default="portable", show_default=True, help="How to save: portable, plugin or dense.")
@probing
@replacing
@as_json
@loading
def prune(
    model: str,
    out: Path,
    budgets: tuple[str, ...],
    plan_file: str | None,
    run: Path | None,
    form: str,
    method: str | None,
    batch_size: int | None,
    replacements: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score, plan, prune and save in one go, or prune by a plan that exists."""
    from ldpruner import artifacts, reporting, workflow
    from ldpruner.files import check_writable
    from ldpruner.plans import Plan

    artifacts.check_form(form)
    if bool(budgets) == bool(plan_file):
        raise BudgetError("give either --budget, such as --budget latency=65%, or --plan FILE.")
    if plan_file:
        refuse_settled(click.get_current_context())
    given = Plan.from_pretrained(plan_file) if plan_file else None
    budget = budget_of(budgets) if budgets else None
    check_writable(out)
    pruned = workflow.prune(
        pipeline_of(model, settings),
        budget,
        plan=given,
        probe=probe_of(settings),
        run=run,
        method=method,
        replacements=names_of(replacements),
        batch_size=batch_size,
        progress=progress,
        **choices_of(settings),
    )
    pruned.save_pretrained(out, form=form)
    if as_json:
        print_json({**pruned.summary(), "out": str(out)})
        return
    print(reporting.printed(reporting.comparison_table(pruned.record())))
    before = pruned.latent_shift_before_repair
    repaired = "" if before is None else f" ({before:.4g} before repair)"
    print(f"{len(pruned.plan.edits)} operators replaced, latent shift {pruned.latent_shift:.4g}{repaired}.", end=" ")
    print(f"Written to {out}; load it with\n")
    print(artifacts.loading_lines(str(out), form))


@app.command()
@model
@click.option("--out", type=FOLDER, required=True, help="The folder for the pictures.")
@click.option("-n", "--samples", default=16, show_default=True, type=click.IntRange(1), help="How many.")
@generating
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Samples in one denoiser call.")
@as_json
@loading
def sample(model: str, out: Path, batch_size: int, as_json: bool, **settings: Any) -> None:
    """Generate pictures, videos or sounds: one file for each seed, and a sheet of all pictures."""
    from ldpruner import reporting
    from ldpruner.files import check_writable

    probe = probe_of(settings)
    check_writable(out)
    pipeline = pipeline_of(model, settings)
    names, kind = reporting.save_samples(pipeline, probe, out, batch_size=batch_size)
    if as_json:
        print_json({"out": str(out), "files": names})
        return
    sheet = out / "sheet.png"
    print(f"{len(names)} {kind} in {out}" + (f", and all pictures in {sheet}." if sheet.exists() else "."))


@app.command()
@model
@click.option("--against", metavar="MODEL", help="The original: measured too, and compared with seed by seed.")
@click.option(
    "--reference", metavar="DATA", help="Real data: a folder or zip of pictures or recordings; a zoo judge keeps its own."
)
@click.option("--metrics", help="Only these, with commas, such as fid,kid,latent-shift; all that the rest allows by default.")
@click.option("--features", multiple=True, help="Who looks: judge, judge=zoo:NAME, inception=FILE, clip=FOLDER, clap=FOLDER.")
@click.option("--resize", type=click.IntRange(1), help="Show feature nets pictures, real ones too, of this width and height.")
@click.option("-n", "--samples", default=500, show_default=True, type=click.IntRange(1), help="How many samples of each model.")
@generating
@click.option("--batch-size", default=50, show_default=True, type=click.IntRange(1), help="Samples in one denoiser call.")
@click.option("--cache", type=FOLDER, help="Where samples and features are kept; $LDPRUNER_CACHE, or ~/.cache/ldpruner.")
@as_json
@loading
def evaluate(
    model: str,
    against: str | None,
    reference: str | None,
    metrics: str | None,
    features: tuple[str, ...],
    resize: int | None,
    batch_size: int,
    cache: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure how good samples are, and with --against how far from the original's; an interrupted run goes on."""
    from ldpruner import evaluation, reporting

    probe = probe_of(settings)
    loaded = [pipeline_of(name, settings) for name in (model, against) if name]
    result = evaluation.evaluate(
        *loaded,
        probe=probe,
        metrics=names_of(metrics, "--metrics"),
        features=features or None,
        reference=reference,
        resize=resize,
        batch_size=batch_size,
        cache=cache,
        watch=watch,
    )
    if as_json:
        print_json(result.to_json())
        return
    print(reporting.printed(reporting.evaluation_table(result)))
    for line in reporting.evaluation_lines(result):
        print(line)


@app.command()
@model
@click.option("--against", metavar="MODEL", help="Another model, timed in the same run, taking turns.")
@click.option("--rounds", default=31, show_default=True, type=click.IntRange(2), help="Pairs of readings.")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(1), help="Samples of a generation.")
@generating
@click.option("--operators", default=0, show_default=True, help="List this many of the modules that take longest.")
@as_json
@loading
def benchmark(model: str, against: str | None, rounds: int, operators: int, as_json: bool, **settings: Any) -> None:
    """Time a denoiser call, a generation and its parts, and memory; with --against, two models in turn, and MODEL / AGAINST."""
    from ldpruner import benchmarking, reporting

    probe = probe_of(settings)
    loaded = [pipeline_of(name, settings) for name in (model, against) if name]
    result = benchmarking.benchmark(*loaded, probe=probe, rounds=rounds)
    if as_json:
        print_json(result)
        return
    print(reporting.printed(reporting.benchmark_table(result)))
    if operators:
        print(reporting.printed(reporting.times_table(result, operators)))
    for line in reporting.benchmark_lines(result):
        print(line)


for command in (inspect, score, plan, distil, card, push, run):
    app.add_command(command)


@app.group(no_args_is_help=False)
def zoo() -> None:
    """The small trained pipelines that ship with the package."""


@zoo.command("train")
@click.argument("name")
@click.option("--data", type=FOLDER, required=True, help="The folder of training data.")
@click.option("--out", type=FOLDER, required=True, help="Where to write the trained pipeline.")
@click.option("--work", type=FOLDER, help="Checkpoints and logs, OUT-training by default; a run that stopped goes on from there.")
@click.option("--reduced", is_flag=True, help="A few steps of everything: tries the command, trains nothing worth keeping.")
@as_json
def zoo_train(name: str, data: Path, out: Path, work: Path | None, reduced: bool, as_json: bool) -> None:
    """Train a pipeline of the zoo from nothing: its networks, its judge, its measurements and its card."""
    from ldpruner.files import check_writable
    from ldpruner.zoo import commands

    check_writable(out)
    place = work or out.with_name(out.name + ("-training-reduced" if reduced else "-training"))
    figures = commands.train(name, data=data, out=out, work=place, reduced=reduced)
    print(json.dumps(figures, indent=None if as_json else 2))


def main() -> None:
    """Run the command line; what the user can mend ends as one line on stderr and exit code 2."""
    _quieten()
    try:
        app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; what was written so far is kept.", 130)
    except LDPrunerError as error:
        _fail(str(error), error.exit_code)


def _fail(message: str, code: int) -> NoReturn:
    print(f"ldpruner: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _quieten() -> None:
    """Keep other libraries' notices out of the way of ours; LDPRUNER_LOG=INFO shows what is chosen and why."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=os.environ.get("LDPRUNER_LOG", "WARNING"))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # it logs, and then raises, what we tell
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of every try to reach the Hub, of which there are six
    for name in ("torchao", "torch.utils._pytree"):  # diffusers imports it where it is installed; it tells what it cannot do here
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
