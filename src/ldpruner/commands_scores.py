"""The commands `inspect`, `score` and `plan`: what can be replaced, what that does, and what to replace."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldpruner.errors import BudgetError, RunError
from ldpruner.options import (
    FOLDER,
    as_json,
    budget_of,
    choices_of,
    choosing,
    loading,
    model,
    names_of,
    own_device,
    pipeline_of,
    probe_of,
    probing,
    replacing,
    typed,
)
from ldpruner.plans import QUANTITIES, Quantity
from ldpruner.printing import print_json, progress
from ldpruner.probes import Probe

if TYPE_CHECKING:
    from ldpruner.runs import Scored
    from ldpruner.selection import Row

log = logging.getLogger(__name__)

READ_BY_TABLE = {"run", "table", "quantity", "selection", "protect_ends", "stage_cap", "apart", "replacements", "as_json"}


@click.command()
@model
@click.option(
    "--scores", "run", type=FOLDER, metavar="RUN", help="Show the scores of this run folder, and what budgets would cost."
)
@as_json
@loading
def inspect(model: str, run: Path | None, as_json: bool, **settings: Any) -> None:
    """List every operator that can be replaced, with shapes, costs and measured times; with --scores, as they were then."""
    from ldpruner import reporting
    from ldpruner.operators import discover
    from ldpruner.operators.tracing import weights_digest
    from ldpruner.runs import read_scored

    scored = read_scored(run) if run else None
    pipeline = pipeline_of(model, settings)
    if scored:
        scored.check_weights(weights_digest(pipeline.denoiser), pipeline.source)
    operators = scored.operators if scored else discover(pipeline.denoiser, pipeline.call(Probe()))
    if as_json:
        removable = [operator for operator in operators.operators if operator.candidates]
        counts = {"removable": len(removable), "pairs": len(operators.pairs())}
        print_json(operators.to_json() | counts | (_scores_json(scored) if scored else {}))
        return
    scores = scored.scores if scored else ()
    print(reporting.printed(reporting.operator_table(operators, scores=scores), width=180 if scored else 160))
    print(reporting.operators_line(operators))
    if scored:
        rows, missing = _prices(scored)
        print(missing or _prices_text(scored, "latency", rows))


@click.command()
@model
@click.option("--out", type=FOLDER, required=True, help="The run folder; an interrupted run there goes on where it stopped.")
@probing
@click.option("--budget", "budgets", multiple=True, help="What the scores are for, such as latency=65%: fast looks closest there.")
@replacing
@as_json
@loading
def score(
    model: str,
    out: Path,
    method: str | None,
    batch_size: int | None,
    budgets: tuple[str, ...],
    replacements: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score every operator by what replacing it does to the latents; under torchrun or accelerate on several processes."""
    from ldpruner import scoring
    from ldpruner.processes import Crew

    probe = probe_of(settings)
    settings["device"] = settings["device"] or own_device()
    pipeline = pipeline_of(model, settings)
    crew = Crew.joined(cpu=next(pipeline.denoiser.parameters()).device.type == "cpu")
    run = scoring.score(
        pipeline,
        probe,
        method=method,
        replacements=names_of(replacements),
        budget=budget_of(budgets) if budgets else None,
        out=out,
        batch_size=batch_size,
        crew=crew,
        progress=progress if crew.leads else None,
        tell=partial(click.echo, err=True) if crew.leads else log.debug,
    )
    crew.leave()
    if not crew.leads:
        return
    agreement = scoring.rank_agreement(pipeline, run) if probe.solver else None
    ranked = sorted(run.scores, key=lambda entry: entry.score)
    if as_json:
        counts = {"operators": len({s.operator for s in ranked}), "scores": len(ranked)}
        print_json({"out": str(out), **counts, **({"rank_agreement": agreement} if probe.solver else {})})
        return
    print(f"{len(ranked)} scores of {len({entry.operator for entry in ranked})} operators in {out}. The ten that matter least:")
    for entry in ranked[:10]:
        print(f"  {entry.score:10.3g}  {entry.replacement:<10} {entry.operator}")
    if agreement is not None:
        print(f"Rank agreement (Spearman) with the pipeline's own scheduler in 20 steps, of 16 of them: {agreement:.3f}.")


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, help="Where to write the plan; required, but for --table.")
@choosing
@click.option("--table", is_flag=True, help="Plan nothing, but show what budgets from 95 to 40 % would cost; loads no model.")
@click.option(
    "--quantity",
    default="latency",
    show_default=True,
    type=click.Choice(QUANTITIES),
    help="What the budgets of --table limit.",
)
@replacing
@as_json
@loading
def plan(
    run: Path,
    out: Path | None,
    budgets: tuple[str, ...],
    table: bool,
    quantity: Quantity,
    replacements: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Choose what to remove under a budget, from the scores in RUN; latency is measured until it holds."""
    if table:
        _refuse_unread()
        _print_table(run, quantity, names_of(replacements), settings, as_json)
        return
    if out is None:
        raise click.MissingParameter(param_hint="'--out'", param_type="option")
    if typed("quantity"):
        raise BudgetError("--quantity goes with --table. Leave it out.")
    from ldpruner import planning, reporting, scoring

    budget = budget_of(budgets)
    scored = scoring.Run.load(run)
    pipeline = pipeline_of(scored.source, settings)
    made = planning.plan(pipeline, scored, budget, replacements=names_of(replacements), **choices_of(settings))
    made.plan.save(out)
    measured = made.measured.ratio.value if made.measured else None
    if as_json:
        predicted = {f"predicted_{quantity}_ratio": value for quantity, value in made.plan.predicted.items()}
        print_json({"out": str(out), "edits": len(made.plan.edits), "latency_ratio": measured, **predicted})
        return
    print(reporting.printed(reporting.plan_table(made.plan)))
    shares = ", ".join(f"{quantity} {reporting.percent(value)}" for quantity, value in made.plan.predicted.items())
    print(f"Predicted to be left: {shares}." + (f" Measured latency: {reporting.percent(measured)}." if measured else ""))
    print(f"Written to {out}.")


def _refuse_unread() -> None:
    """Raise where an option was typed that a table does not read: nothing asked for is skipped silently."""
    for parameter in click.get_current_context().command.params:
        if parameter.name not in READ_BY_TABLE and typed(parameter.name or ""):
            raise BudgetError(f"{parameter.opts[0]} is for making a plan, and --table makes none. Leave it out.")


def _print_table(run: Path, quantity: Quantity, replacements: list[str] | None, settings: dict[str, Any], as_json: bool) -> None:
    from ldpruner.runs import read_scored
    from ldpruner.selection import priced
    from ldpruner.selection.tables import SELECTION

    scored, selection = read_scored(run), settings["selection"] if typed("selection") else SELECTION
    priors = choices_of(settings)["priors"]
    rows = priced(scored, replacements=replacements, quantity=quantity, selection=selection, priors=priors)
    if as_json:
        about = {"source": scored.source, "method": scored.method, "quantity": quantity, "selection": selection}
        print_json({**about, "scores": len(scored.scores), "pairs": len(scored.operators.pairs()), "rows": list(map(asdict, rows))})
        return
    print(_prices_text(scored, quantity, rows))


def _prices(scored: Scored) -> tuple[list[Row], str | None]:
    """What budgets would cost; or why the scores do not tell."""
    from ldpruner.selection import priced

    try:
        return priced(scored), None
    except RunError as error:
        return [], f"No table of budgets: {error}"


def _prices_text(scored: Scored, quantity: Quantity, rows: list[Row]) -> str:
    from ldpruner import reporting

    return "\n".join([reporting.printed(reporting.prices_table(rows, quantity)), *reporting.prices_lines(scored)])


def _scores_json(scored: Scored) -> dict[str, Any]:
    rows, missing = _prices(scored)
    prices = {"prices": list(map(asdict, rows)), "no_prices": missing}
    return {"method": scored.method, "scores": [asdict(entry) for entry in scored.scores], **prices}
