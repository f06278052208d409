"""The whole job, in the order in which a person would do it."""

from __future__ import annotations

import copy
import functools
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ldpruner import artifacts, cards, sharing, surgery
from ldpruner.benchmarking import Comparison, compare_calls
from ldpruner.environment import environment
from ldpruner.errors import PlanError
from ldpruner.fitting import fit_pointwise, pointwise_wanted
from ldpruner.operators.tracing import architecture, count_macs
from ldpruner.pipelines import Model, Pipeline, as_pipeline
from ldpruner.planning import plan as make_plan
from ldpruner.plans import Plan, Repairing, parse_budgets
from ldpruner.probes import Probe
from ldpruner.recovery.closed_form import repair as fit_together
from ldpruner.scoring import score
from ldpruner.scoring.engine import Progress
from ldpruner.scoring.latent import latent_shift
from ldpruner.selection import SWEEP, Priors, selections_of
from ldpruner.selection.choice import FREE

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A pruned denoiser beside the pipeline that it came from, with what was removed and what that did."""

    pipeline: Pipeline  # the original, untouched
    view: nn.Module  # the pruned denoiser, holding the very weights of the original that it keeps: no second copy of a large model
    plan: Plan
    fitted: surgery.Fitted
    latency: Comparison  # one denoiser call, original first
    params: tuple[int, int]  # original, pruned
    macs: tuple[int, int]  # of one denoiser call for one sample
    latent_shift: float  # of all edits together, by the paper's formula on the plan's probe
    latent_shift_before_repair: float | None = None

    @functools.cached_property
    def denoiser(self) -> nn.Module:
        """The pruned denoiser with weights of its own, to be moved, cast and trained; made when it is first asked for."""
        return copy.deepcopy(self.view)

    @property
    def pipe(self) -> DiffusionPipeline:
        """The pruned pipeline, around the original's other parts."""
        return self.pipeline.around(self.denoiser).pipe

    def summary(self) -> dict[str, Any]:
        """The figures as plain numbers: ratios are pruned / original."""
        return {
            "latency_ratio": self.latency.ratio.value,
            "params_ratio": self.params[1] / self.params[0],
            "macs_ratio": self.macs[1] / self.macs[0],
            "latent_shift": self.latent_shift,
            "latent_shift_before_repair": self.latent_shift_before_repair,
            "edits": len(self.plan.edits),
        }

    def record(self) -> dict[str, Any]:
        """All that was measured, with units, counts, spreads and the environment."""
        latency = {name: asdict(getattr(self.latency, name)) for name in ("first", "second", "ratio")}
        return {
            **self.summary(),
            "latency": {"original": latency["first"], "pruned": latency["second"], "ratio": latency["ratio"]},
            "params": {"original": self.params[0], "pruned": self.params[1]},
            "macs": {"original": self.macs[0], "pruned": self.macs[1]},
            "probe": self.plan.probe.to_json() if self.plan.probe else None,
            "environment": environment(self.view),
        }

    def save_pretrained(self, out: str | os.PathLike[str], *, form: str = "portable") -> None:
        """Write a folder that plain diffusers loads; `form` is portable, plugin or dense."""
        artifacts.save(self.pipeline, self.view, self.plan, Path(out), form=form, record=self.record(), fitted=self.fitted)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        form: str = "portable",
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a pipeline pruned by ldpruner",
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Put the pipeline into a repository of the Hub, made where it is missing; the address of the commit.

        Plain diffusers loads it from there as from a folder. Raises `HubError`.
        """
        artifacts.check_form(form)
        sharing.check_id(repo_id)
        with tempfile.TemporaryDirectory(prefix="ldpruner-") as scratch:
            folder = Path(scratch) / repo_id.partition("/")[2]
            self.save_pretrained(folder, form=form)
            files = cards.shareable(folder, repo_id)
            return sharing.push(
                files,
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )


def prune(
    model: Model,
    budget: Mapping[str, str | float] | None = None,
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    probe: Probe | None = None,
    run: str | os.PathLike[str] | None = None,
    method: str | None = None,
    selection: str = SWEEP,
    replacements: Sequence[str] | None = None,
    priors: Priors = FREE,
    repair: Repairing = "none",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Score, plan and prune a pipeline; the model that was given stays as it was.

    Give a `budget` such as `{"latency": "65%"}`, or a `plan` made before: itself, its file, its folder, or a hub id. `run` names a
    folder that keeps the scores: they are resumed and reused from there, by default as they were scored (`method`, else `paper`).
    `priors` limit where operators may go; `repair="closed-form"` fits the stand-ins to each other, see `recovery.repair`. Raises
    `LDPrunerError` with what to do.
    """
    if (budget is None) == (plan is None):
        raise PlanError("give either a budget or a plan.")
    if plan is not None and run is not None:
        raise PlanError("a run folder goes with a budget; a plan needs no scores.")
    pipeline = as_pipeline(model)
    if plan is not None:
        return apply(pipeline, plan if isinstance(plan, Plan) else Plan.from_pretrained(plan), batch_size=batch_size)
    assert budget is not None
    parse_budgets(budget)  # what is misspelt raises now, not after hours of scoring
    selections_of(selection)
    scored = score(
        pipeline,
        probe or Probe(),
        method=method,
        replacements=replacements,
        budget=budget,
        out=Path(run) if run else None,
        batch_size=batch_size,
        progress=progress,
    )
    planned = make_plan(
        pipeline,
        scored,
        budget,
        selection=selection,
        replacements=replacements,
        priors=priors,
        repair=repair,
        batch_size=batch_size,
    )
    return _measured(pipeline, planned.plan, scored.fitted, planned.measured, batch_size)


def apply(pipeline: Pipeline, plan: Plan, *, batch_size: int | None = None) -> Pruned:
    """Prune by a plan; stand-ins are fitted anew, on the plan's probe. Raises `PlanError` for another model's."""
    plan.check_model(architecture(pipeline.denoiser), type(pipeline.denoiser).__name__)
    surgery.check_edits(pipeline.denoiser, plan.edits, pipeline.call(plan.probe or Probe()))
    fitted = fit_pointwise(pipeline, pointwise_wanted(plan.edits), plan.probe or Probe(), batch_size=batch_size)
    return _measured(pipeline, plan, fitted, None, batch_size)


def _measured(pipeline: Pipeline, plan: Plan, fitted: surgery.Fitted, latency: Comparison | None, batch_size: int | None) -> Pruned:
    probe = plan.probe or Probe()
    original = pipeline.denoiser
    reference = pipeline.latents(probe, batch_size=batch_size)

    def shift_of(denoiser: nn.Module) -> float:
        with pipeline.with_denoiser(denoiser):
            return latent_shift(reference, pipeline.latents(probe, batch_size=batch_size))

    before = None
    if plan.repair == "closed-form":
        before = shift_of(surgery.pruned_view(original, plan.edits, fitted))
        fitted = fit_together(pipeline, plan.edits, probe, fitted=fitted, batch_size=batch_size)
    view = surgery.pruned_view(original, plan.edits, fitted, signed=plan)
    call = pipeline.call(probe)
    return Pruned(
        pipeline=pipeline,
        view=view,
        plan=plan,
        fitted=fitted,
        latency=latency or compare_calls(original, view, call),
        params=(_params(original), _params(view)),
        macs=(count_macs(original, call), count_macs(view, call)),
        latent_shift=shift_of(view),
        latent_shift_before_repair=before,
    )


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
