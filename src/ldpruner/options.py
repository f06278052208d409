"""What the commands' options are called, and how what was typed becomes a pipeline, a probe, a budget, a list of names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldpruner.errors import BudgetError, DataError, PipelineError, UnknownNameError
from ldpruner.probes import Probe

if TYPE_CHECKING:
    from ldpruner.pipelines import Pipeline

Command = Callable[..., Any]
Settings = dict[str, Any]

FOLDER = click.Path(path_type=Path)
STYLE = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda token: token.replace("_", "-")}


def stacked(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several decorators as one, the first outermost."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; the rest goes to stderr.")
model = click.argument("model", metavar="MODEL")
loading = stacked(
    click.option("--dtype", default="float32", type=click.Choice(["float32", "float16", "bfloat16"]), show_default=True),
    click.option("--device", help="Where to run, such as cpu or cuda:0; a GPU is used where there is one."),
    click.option("--revision", help="Branch, tag or commit of a hub model."),
    click.option("--variant", help="Weights variant, such as fp16."),
    click.option("--component", help="The part to prune, where several denoise, such as transformer_2."),
    click.option("--config", metavar="DIR_OR_ID", help="For a checkpoint in one file: a pipeline whose configuration it has."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that a model brings along; pruned models need none of it."),
)
prompting = stacked(
    click.option("--prompt", "prompts", multiple=True, help="A text prompt; give several, and samples take them in turn."),
    click.option(
        "--prompts-file", type=FOLDER, help="Prompts from a file, one a line, or the texts of a metadata.jsonl; a list ships."
    ),
    click.option("--guidance-scale", type=float, help="The pipeline's own by default."),
    click.option("--call", "call", multiple=True, metavar="NAME=VALUE", help="More for the pipeline's call, such as height=512."),
)
generating = stacked(
    click.option("--num-inference-steps", "--steps", default=20, show_default=True, help="Denoising steps of a generation."),
    click.option("--seed", default=0, show_default=True, help="Sample i starts from noise seeded with SEED + i."),
    prompting,
)
probing = stacked(
    click.option("--samples", default=16, show_default=True, help="Latents generated for each candidate."),
    click.option("--num-inference-steps", "--steps", default=10, show_default=True, help="Denoising steps of a generation."),
    click.option("--seed", default=0, show_default=True, help="Sample i starts from noise seeded with SEED + i."),
    prompting,
    click.option("--batch-size", type=click.IntRange(1), help="Samples in one denoiser call; all of them by default."),
    click.option("--method", help="How operators are scored; by default as in the run folder, or paper."),
    click.option("--solver", help="Score by a solver that needs fewer steps than the pipeline's own: ddim, dpm++, unipc."),
)
replacing = click.option("--replacements", help="Only these, with commas: identity, zero, shortcut, pointwise.")
choosing = stacked(
    click.option("--budget", "budgets", multiple=True, help="latency=65%, macs=2e9, params=70%; several all hold."),
    click.option(
        "--selection",
        default="sweep",
        show_default=True,
        help="By what operators are chosen: order (lowest score first), ratio (lowest score per saving first), exact (the least "
        "sum of scores that meets the budget), exact-2, exact-3 (of their squares, cubes); the same after error- (by the output's "
        "error) or both- (by the mean of the two); or sweep: a plan by each order and exact sum, of which the one that shifts "
        "latents least is taken; or improved: that plan changed step by step, each step measured on all edits together.",
    ),
    click.option("--protect-ends", default=0, show_default=True, help="Blocks at each end of every stage that stay whole."),
    click.option("--stage-cap", default=1.0, show_default=True, help="The most that may go of a stage, as a share of its cost."),
    click.option("--apart", default=0, show_default=True, help="Blocks of a stage that lie between two replaced ones, at least."),
    click.option(
        "--repair",
        default="none",
        show_default=True,
        type=click.Choice(["none", "closed-form"]),
        help="Fit the stand-ins to each other once all are chosen.",
    ),
)


def draw_downloads_alone() -> None:
    """Of what other libraries draw while a pipeline is loaded, keep the bars of downloads."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    enable_progress_bars()  # transformers' switch turned off those of downloads too


def pipeline_of(model: str, settings: Settings) -> Pipeline:
    """Load MODEL as `loading`'s options say, with the bars of downloads alone."""
    import torch

    from ldpruner.pipelines import load

    draw_downloads_alone()
    names = ("device", "revision", "variant", "trust_remote_code", "component")
    given = {name: settings[name] for name in names} | {"config": _config_for(model, settings["config"])}
    return load(model, dtype=getattr(torch, settings["dtype"]), **given)


def _config_for(model: str, config: str | None) -> str | None:
    """What --config says, for the models that it is about; raises `PipelineError` where the command has none."""
    given = click.get_current_context().params.values()
    files = [value for value in given if isinstance(value, str) and value.endswith(".safetensors")]
    if config is not None and not files:
        raise PipelineError("--config goes with a checkpoint in one .safetensors file. Leave it out.")
    return config if model in files else None


def probe_of(settings: Settings) -> Probe:
    """The probe that the options of `probing` or `generating` describe; raises `DataError` for prompts given twice."""
    from ldpruner.files import read_prompts

    names = [name for name in ("samples", "num_inference_steps", "seed", "guidance_scale", "solver") if name in settings]
    file = settings["prompts_file"]
    if file and settings["prompts"]:
        raise DataError("give --prompt or --prompts-file, not both.")
    prompts = read_prompts(file) if file else settings["prompts"]
    return Probe(prompts=prompts, call=call_of(settings["call"]), **{name: settings[name] for name in names})


def call_of(given: tuple[str, ...]) -> dict[str, Any]:
    """`NAME=VALUE` entries by name, values read as JSON where they are some; raises `DataError` where one does not read so."""
    call: dict[str, Any] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not name.strip():
            raise DataError(f"--call {entry!r}: say NAME=VALUE, such as height=512.")
        try:
            call[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            call[name.strip().replace("-", "_")] = value
    return call


def choices_of(settings: Settings) -> dict[str, Any]:
    """What the options of `choosing` say besides budgets, as `planning.plan` and `workflow.prune` take it."""
    from ldpruner.selection import Priors

    priors = Priors(**{name: settings[name] for name in ("protect_ends", "stage_cap", "apart")})
    return {"selection": settings["selection"], "repair": settings["repair"], "priors": priors}


def budget_of(given: tuple[str, ...]) -> dict[str, str | float]:
    """`QUANTITY=LIMIT` entries by quantity; raises `BudgetError` where one does not read so."""
    from ldpruner.plans import parse_budgets

    if not given:
        raise BudgetError("no budget was given: say --budget QUANTITY=LIMIT, such as --budget latency=65%.")
    budget: dict[str, str | float] = {}
    for entry in given:
        quantity, equals, limit = entry.partition("=")
        if not equals:
            raise BudgetError(f"budget {entry!r}: say QUANTITY=LIMIT, such as latency=65%.")
        budget[quantity.strip()] = limit
    parse_budgets(budget)
    return budget


SETTLED_BY_A_PLAN = {
    "run", "samples", "num_inference_steps", "seed", "prompts", "prompts_file", "guidance_scale", "method", "selection",
    "replacements", "protect_ends", "stage_cap", "apart", "repair", "call",
}  # fmt: skip


def refuse_settled(context: click.Context) -> None:
    """Raise where an option was typed that a plan has settled: nothing asked for is skipped silently."""
    for parameter in context.command.params:
        if parameter.name in SETTLED_BY_A_PLAN and typed(parameter.name):
            raise BudgetError(f"{parameter.opts[0]} goes with --budget: a plan has settled it. Leave it out.")


def typed(parameter: str) -> bool:
    """Whether the user typed this option of the command that runs."""
    return click.get_current_context().get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE


def names_of(given: str | None, option: str = "--replacements") -> list[str] | None:
    """Names that were given with commas between them; None allows all."""
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise UnknownNameError(f"{option} {given!r}: names none. Leave it out to allow all.")
    return names


def own_device() -> str | None:
    """The device of this process where several were started; else what `load` chooses."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return "cpu"
    import torch

    several = torch.cuda.is_available() and "LOCAL_RANK" in os.environ
    return f"cuda:{os.environ['LOCAL_RANK']}" if several else None
