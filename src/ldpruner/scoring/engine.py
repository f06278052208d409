"""Runs a scorer over every operator and keeps what it gives: a folder that can be resumed, and planned from again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldpruner.arrangements import Tell, channels_last_pays, fastest, sharing_pays
from ldpruner.errors import OperatorError, RunError
from ldpruner.fitting import Weights, fit_pointwise, pointwise_wanted
from ldpruner.memory import samples_at_once
from ldpruner.operators import discover
from ldpruner.operators.tracing import Call, weights_digest
from ldpruner.pipelines import Pipeline
from ldpruner.plans import SCHEMA, Edit, Operators, Quantity, Score, parse_budgets
from ldpruner.probes import Probe
from ldpruner.processes import Crew
from ldpruner.remembering import encoding_once
from ldpruner.replacements import REPLACEMENTS
from ldpruner.runs import Scored, read_header, read_scored
from ldpruner.scoring.base import CUTS, SCORERS, Asked, Scorer, Targets
from ldpruner.scoring.keeping import Store, read_fitted
from ldpruner.scoring.ledger import Key, Ledger, key_of

log = logging.getLogger(__name__)

USUAL = "paper"  # method, where neither the caller nor a folder says
Progress = Callable[[Iterable[Any], int, int], Iterable[Any]]  # scores or edits to come, done before, in all


@dataclass(frozen=True, kw_only=True)
class Run(Scored):
    """Everything that a plan needs: what was scored, and the weights of fitted stand-ins."""

    fitted: Weights
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Run:
        """Read a run folder. Raises `RunError` where it is none."""
        folder = Path(folder)
        scored = read_scored(folder)
        return cls(**vars(scored), fitted=read_fitted(folder / "pointwise.safetensors"), folder=folder)

    def edits(self) -> list[Edit]:
        """What was scored, in the order of the scores."""
        options = {(o.name, c.replacement): c.options for o, c in self.operators.pairs()}
        return [Edit(operator=e.operator, replacement=e.replacement, options=options[e.key]) for e in self.scores]


def score(
    pipeline: Pipeline,
    probe: Probe,
    *,
    method: str | None = None,
    replacements: Sequence[str] | None = None,
    operators: Operators | None = None,
    budget: Mapping[str, str | float] | None = None,
    out: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    crew: Crew = Crew(),  # noqa: B008  frozen
    progress: Progress | None = None,
    tell: Tell = log.info,
) -> Run:
    """Score every operator with every replacement that fits it, and return the run.

    With `out`, each score is appended there as it comes, and what an earlier run left there is kept. `method` is by default that
    of the scores in `out`, or `paper`. `replacements` limits what is tried. `budget` says what the scores are for, so that a method
    which can spends its time there; by default 80, 65 and 50 % of the latency. `batch_size` is by default as many samples as memory
    holds. The processes of a `crew` share the work, and each returns the same run. `tell` is told how the denoiser is run, see
    `arrangements`. Raises `RunError` where `out` holds scores of other weights, another probe or another method.
    """
    folder = Path(out) if out is not None else None
    method = method or (folder and (read_header(folder) or {}).get("method")) or USUAL
    scorer = SCORERS[method]()
    if probe.samples < 2:
        raise RunError(f"samples={probe.samples}: a standard deviation over samples needs 2 or more.")
    for name in replacements or ():
        REPLACEMENTS[name]
    probe = pipeline.completed(probe)
    header = _header(pipeline, probe, method, budget if scorer.budgeted else None)
    store = Store(folder, header, crew.rank) if folder else None
    ledger = Ledger(folder, crew, progress)  # before the first thing that processes wait for: all read the same
    work = _Work(
        pipeline=pipeline, probe=probe, replacements=replacements, crew=crew, store=store, batch_size=batch_size, tell=tell
    )
    operators = work.operators(operators)
    edits = work.edits(operators)
    asked = Asked(
        pipeline=pipeline,
        edits=edits,
        probe=probe,
        fitted=work.fitted(edits),
        batch_size=work.at_once(),
        operators=operators,
        targets=_targets(operators, budget),
        crew=crew,
        ledger=ledger,
    )
    return Run(
        source=pipeline.source,
        method=method,
        probe=probe,
        operators=operators,
        scores=work.scores(scorer, asked, progress),
        fitted=dict(asked.fitted),
        weights=header["weights"],
        folder=folder,
    )


def _header(pipeline: Pipeline, probe: Probe, method: str, budget: Mapping[str, str | float] | None) -> dict[str, Any]:
    """What scores belong to; a budget where they depend on one."""
    return {
        "schema": SCHEMA,
        "source": pipeline.source,
        "method": method,
        "probe": probe.to_json(),
        "weights": weights_digest(pipeline.denoiser),
        "targets": [{b.quantity: str(b) for b in parse_budgets(budget)}] if budget else [],
    }


def _targets(operators: Operators, budget: Mapping[str, str | float] | None) -> tuple[Targets, ...]:
    """The budget as shares, or those that plans are usually made for: of the latency, where it was timed."""
    if budget:
        return ({b.quantity: b.share(operators.total) for b in parse_budgets(budget)},)
    quantity: Quantity = "latency" if operators.total.latency_ms else "macs"
    return tuple({quantity: share} for share in CUTS)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The parts of a run, each taken from its folder where it is there, else made, by the first process where one is enough."""

    pipeline: Pipeline
    probe: Probe
    replacements: Sequence[str] | None
    crew: Crew
    store: Store | None
    batch_size: int | None
    tell: Tell

    def operators(self, given: Operators | None) -> Operators:
        """Discovered once: every process is to see the same times. None measures before all have read what the folder holds."""
        found = given or (self.store.operators() if self.store else None)
        if found is None and self.crew.leads:
            found = discover(self.pipeline.denoiser, self.pipeline.call(self.probe))
        return self.crew.leaders(found)

    def edits(self, operators: Operators) -> list[Edit]:
        pairs = operators.pairs(self.replacements)
        if not pairs:
            allowed = ", ".join(self.replacements or REPLACEMENTS)
            raise OperatorError(f"{self.pipeline.source}: none of {allowed} fits any operator.")
        return [Edit(operator=o.name, replacement=c.replacement, options=c.options) for o, c in pairs]

    def fitted(self, edits: Sequence[Edit]) -> Weights:
        wanted = pointwise_wanted(edits)
        found = self.store.fitted(wanted) if self.store else None
        if found is None and self.crew.leads:
            found = fit_pointwise(self.pipeline, wanted, self.probe, batch_size=self.batch_size)
        return self.crew.leaders(found)

    def at_once(self) -> int:
        return self.batch_size or self.crew.leaders(samples_at_once(self.pipeline, self.probe) if self.crew.leads else None)

    def scores(self, scorer: Scorer, asked: Asked, progress: Progress | None) -> tuple[Score, ...]:
        """Of every edit, in order: what is known, and what this process and the others find."""
        wanted = {key_of(edit) for edit in asked.edits}
        known = {entry.key: entry for entry in (self.store.scores() if self.store else []) if entry.key in wanted}
        to_do = [edit for edit in asked.edits if key_of(edit) not in known]
        shared = self._edits_at_once(scorer.few_samples(self.probe), asked.batch_size, to_do)
        asked = replace(asked, edits_at_once=shared)
        coming, found = scorer.scores(replace(asked, edits=to_do)) if to_do else iter(()), dict[Key, Score]()
        call = self.pipeline.call(self.probe, samples=min(self.probe.samples, asked.batch_size or self.probe.samples))
        calls = scorer.cost(len(to_do), self.probe) / (asked.batch_size or self.probe.samples) / self.crew.size
        laid = self._channels_last(call, calls)
        if self.store and self.crew.leads and asked.operators:
            self.store.begin(asked.operators, dict(asked.fitted), channels_last=laid, edits_at_once=shared)
        arranged = fastest(self.pipeline.denoiser, call, self.crew, self.tell, channels_last=laid, calls=calls)
        with encoding_once(self.pipeline), arranged:
            for entry in progress(coming, len(known), len(asked.edits)) if progress else coming:
                found[entry.key] = entry
                if self.store:
                    self.store.append(entry)
        known |= self.crew.gathered(found)
        return tuple(known[key_of(edit)] for edit in asked.edits)

    def _channels_last(self, call: Call, calls: float) -> bool:
        """How weights lie: as the run began, so that it goes on to the same bits, or as the first process measures to be faster.

        Where there are too few calls to prepare for, nothing is measured: that would cost more than it saves.
        """
        found = self.store.channels_last if self.store else None
        if found is None and self.crew.leads:
            found = calls > 0 and channels_last_pays(self.pipeline.denoiser, call, self.tell)
        return self.crew.leaders(found)

    def _edits_at_once(self, few: int, samples: int | None, to_do: Sequence[Edit]) -> int:
        """How many edits share a call of so many samples, few for each: as the run began, or as the first process measures."""
        found, most = self.store.edits_at_once if self.store else None, (samples or self.probe.samples) // few if few else 1
        if found is None and self.crew.leads:
            found = most
            if found > 1 and to_do:
                small, large = (self.pipeline.call(self.probe, samples=count) for count in (few, few * found))
                found = found if sharing_pays(self.pipeline.denoiser, small, large, self.tell) else 1
        return max(1, min(self.crew.leaders(found), most))  # a run may go on with smaller calls
