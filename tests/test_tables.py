"""The table of budgets: what each would leave and do, from scores alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Command
from invented import operator, operators, scored
from ldpruner.errors import BudgetError, OperatorError, RunError, UnknownNameError
from ldpruner.plans import Operators, Score
from ldpruner.probes import Probe
from ldpruner.runs import Scored, read_scored
from ldpruner.selection import Priors, price_table, priced
from ldpruner.selection.tables import LIKELY, SHARES
from refusing import Refused, copied

PLAIN = operators(operator("a", 10, "identity"), operator("b", 30, "identity"), operator("c", 20, "identity"))
SCORES = scored(("a", "identity", 3.0), ("b", "identity", 4.0), ("c", "identity", 12.0))


def run_of(model: Operators, scores: list[Score], method: str = "paper") -> Scored:
    return Scored(source="m", method=method, probe=Probe(), operators=model, scores=tuple(scores), weights="w")


def test_a_row_tells_what_the_least_harmful_plan_leaves_and_how_far_it_moves_the_latents() -> None:
    rows = price_table(PLAIN, SCORES, shares=(0.9, 0.6, 0.5, 0.4, 0.35))
    assert [row.target for row in rows] == [0.9, 0.6, 0.5, 0.4, 0.35]
    assert [row.edits for row in rows] == [1, 2, 2, 3, 3]
    assert [row.joint_shift**2 for row in rows] == pytest.approx([9, 9 + 16, 16 + 144, 9 + 16 + 144, 9 + 16 + 144])
    assert [row.predicted["latency"] for row in rows] == pytest.approx([0.9, 0.6, 0.5, 0.4, 0.4])
    assert [row.exhausted for row in rows] == [False, False, False, False, True]
    assert rows[1].likely == (5 * LIKELY[0], 5 * LIKELY[1])
    assert rows[1].predicted == pytest.approx({"latency": 0.6, "macs": 0.6, "params": 0.6})


def test_shares_are_of_the_quantity_that_is_named() -> None:
    heavy = replace(PLAIN.operators[2], cost=replace(PLAIN.operators[2].cost, params=60))
    model = replace(PLAIN, operators=(*PLAIN.operators[:2], heavy))
    [by_params], [by_time] = (price_table(model, SCORES, quantity=name, shares=(0.45,)) for name in ("params", "latency"))
    assert (by_params.joint_shift, by_params.predicted["latency"]) == (12.0, pytest.approx(0.8))
    assert by_time.joint_shift == 13.0


def test_what_dies_with_an_edit_is_counted_and_moves_nothing_more() -> None:
    model = operators(operator("a", 10, "zero", dead=("b",)), operator("b", 30, "identity"))
    [row] = price_table(model, scored(("a", "zero", 3.0), ("b", "identity", 1.0)), shares=(0.6,))
    assert (row.edits, row.joint_shift) == (2, 3.0)


def test_an_untouched_model_costs_nothing() -> None:
    [row] = price_table(PLAIN, SCORES, shares=(1.0,))
    assert (row.edits, row.joint_shift, row.likely, row.exhausted) == (0, 0.0, (0.0, 0.0), False)


def test_selection_and_priors_decide_as_they_do_for_a_plan() -> None:
    values = scored(("a", "identity", 1.0), ("b", "identity", 2.0), ("c", "identity", 1.9))
    by_order, by_sum = (price_table(PLAIN, values, selection=name, shares=(0.75,))[0] for name in ("order", "exact-2"))
    assert (by_order.edits, by_sum.edits) == (2, 1), "1 and 1.9 against 2"
    placed = replace(PLAIN, operators=tuple(replace(each, stage="s", block=each.name) for each in PLAIN.operators))
    [row] = price_table(placed, SCORES, shares=(0.9,), priors=Priors(protect_ends=1))
    assert row.joint_shift == 4.0, "only b, which lies between, may go"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"selection": "sweep"}, UnknownNameError, "selection 'sweep' generates with each plan, and a table needs no model"),
        ({"selection": "exakt"}, UnknownNameError, "selection 'exakt' is unknown: did you mean exact"),
        ({"shares": (0.0,)}, BudgetError, "a budget of 0 of the latency: give a share above 0 and at most 1."),
        ({"shares": (65,)}, BudgetError, "a budget of 65 of the latency: give a share above 0 and at most 1."),
        ({"selection": "error-order"}, RunError, "these scores hold no output error"),
    ],
)
def test_what_no_table_can_be_made_of(changed: Mapping[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        price_table(PLAIN, SCORES, **changed)


def test_a_run_is_priced_by_all_of_its_scores_or_by_those_of_some_replacements() -> None:
    model = operators(operator("a", 10, "identity", "pointwise"), operator("b", 30, "identity"))
    scores = scored(("a", "pointwise", 1.0), ("a", "identity", 3.0), ("b", "identity", 4.0))
    assert priced(run_of(model, scores)) == price_table(model, scores, shares=SHARES)
    [row] = priced(run_of(model, scores), replacements=["identity"], shares=(0.6,))
    assert row.joint_shift == 5.0
    with pytest.raises(OperatorError, match="replacement 'identiy' fits no operator of m: did you mean identity"):
        priced(run_of(model, scores), replacements=["identiy"])
    with pytest.raises(RunError, match="holds no scores yet"):
        priced(run_of(model, []))


def test_scores_of_another_scale_have_no_price() -> None:
    assert priced(run_of(PLAIN, SCORES, "fast")) == priced(run_of(PLAIN, SCORES, "paper"))
    with pytest.raises(RunError, match="scores by magnitude are no latent shifts, so they do not tell what a budget would cost"):
        priced(run_of(PLAIN, SCORES, "magnitude"))


def told(command: Command, *arguments: Any) -> dict[str, Any]:
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def as_told(rows: list[Any]) -> Any:
    return json.loads(json.dumps([asdict(row) for row in rows]))


def judged(folder: Path, **fields: Any) -> Path:
    """A copy of the run with more said of each score."""
    run = copied("run", folder)
    lines = [json.loads(line) | fields for line in (run / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    (run / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


def by_method(folder: Path, method: str) -> Path:
    """A copy of the run that says that another method made it."""
    run = copied("run", folder)
    header = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(header | {"method": method}), encoding="utf-8")
    return run


@pytest.mark.usefixtures("in_place")
def test_the_command_prints_the_table_of_its_run(command: Command) -> None:
    run = read_scored(Path("run"))
    answer = told(command, "plan", "run", "--table")
    assert answer.pop("rows") == as_told(priced(run))
    assert answer == {
        "source": run.source,
        "method": "paper",
        "quantity": "latency",
        "selection": "exact-2",
        "scores": len(run.scores),
        "pairs": len(run.operators.pairs()),
    }
    chosen = ("--quantity", "macs", "--selection", "order", "--protect-ends", "1", "--replacements", "identity,zero")
    answer = told(command, "plan", "run", "--table", *chosen)
    priors, names = Priors(protect_ends=1), ["identity", "zero"]
    assert answer["rows"] == as_told(priced(run, quantity="macs", selection="order", priors=priors, replacements=names))
    code, out, _ = command("plan", "run", "--table", "--quantity", "params")
    assert code == 0
    for words in ("params=95%", "params=40%", "joint latent shift", "mostly", "nothing was measured"):
        assert words in out, words


@pytest.mark.usefixtures("in_place")
def test_a_table_needs_neither_torch_nor_diffusers_nor_the_model(tmp_path: Path) -> None:
    run = copied("run", tmp_path)
    (run / "pointwise.safetensors").unlink()
    (run / "run.json").write_text((run / "run.json").read_text(encoding="utf-8").replace("ldm", "gone"), encoding="utf-8")
    code = (
        f"import sys; sys.argv = ['ldpruner', 'plan', {str(run)!r}, '--table']\n"
        "from ldpruner import cli\n"
        "cli.main()\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "latency=95%" in done.stdout


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "plan.json"), "--out is for making a plan, and --table makes none. Leave it out."),
        (("--budget", "latency=65%"), "--budget is for making a plan, and --table makes none. Leave it out."),
        (("--repair", "none"), "--repair is for making a plan, and --table makes none. Leave it out."),
        (("--device", "cpu"), "--device is for making a plan, and --table makes none. Leave it out."),
        (("--quantity", "speed"), "Invalid value for '--quantity': 'speed' is not one of 'latency', 'macs', 'params'."),
        (("--selection", "ordr"), "selection 'ordr' is unknown: did you mean order?"),
        (
            ("--selection", "sweep"),
            "selection 'sweep' generates with each plan, and a table needs no model: name one, say exact-2.",
        ),
        (("--protect-ends", "-1"), "priors: protect_ends and apart are 0 or more, stage_cap is above 0 and at most 1."),
        (("--replacements", ","), "--replacements ',': names none. Leave it out to allow all."),
    ],
)
def test_what_does_not_go_with_a_table(arguments: tuple[str, ...], message: str, refused: Refused) -> None:
    assert refused("plan", "run", "--table", *arguments) == message


@pytest.mark.usefixtures("in_place")
def test_a_run_without_latent_shifts_or_none_at_all_gives_no_table(refused: Refused, tmp_path: Path) -> None:
    message = "empty: is no run folder (no run.json). Make one with `ldpruner score MODEL --out empty`."
    assert refused("plan", "empty", "--table") == refused("inspect", "ldm", "--scores", "empty") == message
    message = "scores by magnitude are no latent shifts, so they do not tell what a budget would cost: "
    assert refused("plan", by_method(tmp_path, "magnitude"), "--table").startswith(message)


@pytest.mark.usefixtures("in_place")
def test_a_plan_needs_its_file_and_no_quantity(refused: Refused) -> None:
    assert refused("plan", "run", "--budget", "macs=75%") == refused("plan", "run") == "Missing option '--out'."
    message = "--quantity goes with --table. Leave it out."
    assert refused("plan", "run", "--budget", "macs=75%", "--out", "out", "--quantity", "macs") == message


@pytest.mark.usefixtures("in_place")
def test_inspect_shows_every_score_beside_its_operator_and_the_table_below(command: Command) -> None:
    run = read_scored(Path("run"))
    answer = told(command, "inspect", "ldm", "--scores", "run")
    assert answer["scores"] == [asdict(entry) for entry in run.scores]
    assert answer["prices"] == as_told(priced(run))
    assert (answer["method"], answer["no_prices"], answer["total"]) == ("paper", None, asdict(run.operators.total))
    code, out, _ = command("inspect", "ldm", "--scores", "run")
    assert code == 0
    best = min((entry for entry in run.scores if entry.operator == "conv_norm_out"), key=lambda entry: entry.score)
    [line] = [line for line in out.splitlines() if " conv_norm_out " in line]
    assert line.rstrip("│ ").endswith(f"{best.score:.3g}")
    assert best.replacement in line
    for words in (" best ", " score ", "operators can be replaced", "latency=40%"):
        assert words in out, words
    for words in ("judged by", "doubt"):
        assert words not in out, words


@pytest.mark.usefixtures("in_place")
def test_inspect_tells_how_scores_were_judged_and_how_surely_where_that_is_known(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("inspect", "ldm", "--scores", judged(tmp_path, judged="latents of 16", doubt=0.125))
    assert code == 0
    for words in (
        "judged by",
        "latents of 16",
        " doubt ",
        "0.12",
        "Doubt is the standard deviation of a score's natural logarithm",
    ):
        assert words in out, words


@pytest.mark.usefixtures("in_place")
def test_inspect_shows_scores_without_a_table_where_they_are_no_shifts(command: Command, tmp_path: Path) -> None:
    run = by_method(tmp_path, "magnitude")
    code, out, _ = command("inspect", "ldm", "--scores", run)
    assert code == 0
    assert "latency=95%" not in out
    assert out.splitlines()[-1].startswith("No table of budgets: scores by magnitude are no latent shifts")
    answer = told(command, "inspect", "ldm", "--scores", run)
    assert answer["prices"] == []
    assert answer["no_prices"].startswith("No table of budgets: scores by magnitude")


@pytest.mark.usefixtures("in_place")
def test_scores_of_another_model_are_refused(refused: Refused, tmp_path: Path) -> None:
    message = f"its weights are not those that were scored as {read_scored(Path('run')).source}. Score it anew."
    assert refused("inspect", "sd", "--scores", "run") == f"sd: {message}"
    taught = copied("ldm", tmp_path)
    file = taught / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: weight + torch.ones(()) for name, weight in weights.items()}, file, metadata={"format": "pt"})
    assert refused("inspect", taught, "--scores", "run") == f"{taught}: {message}"
