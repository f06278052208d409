"""The commands `card` and `push`."""

from __future__ import annotations

from pathlib import Path

import click

from ldpruner.errors import DataError
from ldpruner.options import FOLDER, as_json
from ldpruner.printing import print_json


@click.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--evaluation", type=FOLDER, metavar="FILE", help="Figures to show: what `ldpruner evaluate DIR --json` printed.")
@click.option("--license", metavar="NAME", help="The licence, as the Hub calls it; the base model's own by default.")
@click.option("--base-model", metavar="ID", help="The hub id of the base model, where it was loaded from a folder.")
@as_json
def card(folder: Path, evaluation: Path | None, license: str | None, base_model: str | None, as_json: bool) -> None:
    """Write the model card of DIR, a saved pipeline, anew; what you wrote below its last line stays."""
    from ldpruner import cards
    from ldpruner.card_text import Saved
    from ldpruner.sharing import CARD

    Saved.open(folder)
    if evaluation is not None:
        cards.keep_evaluation(folder, evaluation)
    header = cards.write(folder, license=license, base_model=base_model)
    told = {name: header.get(name) for name in ("license", "base_model", "pipeline_tag")}
    if as_json:
        print_json({"card": str(folder / CARD), **told, "figures": len(list(Saved.open(folder).figures()))})
        return
    missing = "" if told["license"] else " No licence could be read: name it with --license."
    print(f"Written to {folder / CARD}.{missing}")


@click.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--plan-only", is_flag=True, help="Push the plan, a few kilobytes, without weights; DIR may be a plan's file.")
@click.option("--private/--public", default=None, help="For a repository that is not there yet; as your account has it by default.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, which is made where it is missing.")
@click.option("--commit-message", help="What the commit is called.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@as_json
def push(
    folder: Path,
    repo_id: str,
    plan_only: bool,
    private: bool | None,
    revision: str | None,
    commit_message: str | None,
    create_pr: bool,
    as_json: bool,
) -> None:
    """Put DIR, a saved pipeline, or its plan alone into REPO_ID of the Hub; log in with `hf auth login` or HF_TOKEN."""
    from ldpruner import cards, forms, sharing
    from ldpruner.card_text import Saved
    from ldpruner.plans import PLAN, Plan

    if folder.is_file() and not plan_only:
        raise DataError(f"{folder}: is a file. A plan's file goes with --plan-only.")
    sharing.check_id(repo_id)
    message = {} if commit_message is None else {"commit_message": commit_message}
    if plan_only:
        plan = Plan.from_pretrained(folder)
        base = cards.base_header(str(folder), folder).get("base_model") if folder.is_dir() else None
        url = plan.push_to_hub(repo_id, base_model=base, private=private, revision=revision, create_pr=create_pr, **message)
        lines, files = f"ldpruner prune {base or 'MODEL'} --plan {repo_id} --out DIR", [PLAN, sharing.CARD]
    else:
        saved = Saved.open(folder)
        shared = cards.shareable(folder, repo_id)
        url = sharing.push(shared, repo_id, private=private, revision=revision, create_pr=create_pr, **message)
        lines, files = forms.loading_lines(repo_id, saved.form), sorted(shared)
    if as_json:
        print_json({"repo": repo_id, "url": url, "files": files})
        return
    print(f"Pushed: {url}\n\n{lines}")
