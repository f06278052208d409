"""Where plans of one denoiser are measured on one device, and their latency is predicted from all that was read there."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from ldpruner.benchmarking import compare_calls
from ldpruner.environment import environment
from ldpruner.fitting import blank
from ldpruner.latencies import Reading, Readings, Times, learned, random_plans
from ldpruner.operators.discovery import DeadCode
from ldpruner.operators.layouts import layouts, relaid
from ldpruner.operators.tracing import Call
from ldpruner.operators.watching import tensors_in
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Operators, Repairing, corrected
from ldpruner.record import Measurement
from ldpruner.selection.exact import Keys
from ldpruner.surgery import pruned_view

log = logging.getLogger(__name__)

CALIBRATING = 16  # readings below which random plans are measured before any is chosen
ROUNDS = 15  # pairs of calls of each of these
PATIENCE_S = 180.0  # after which the rest of them wait for the next plan: a large model's calls take long


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A denoiser, the call that is timed, and the readings until now."""

    pipeline: Pipeline
    call: Call
    operators: Operators
    dead_code: DeadCode
    readings: Readings
    laid: dict[str, bool]  # see `operators.layouts`, of the original
    repair: Repairing = "none"
    seen: dict[Keys, dict[str, bool]] = field(default_factory=dict)  # what edits lay otherwise: each is seen in a call

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        call: Call,
        operators: Operators,
        dead_code: DeadCode,
        *,
        readings: Readings,
        repair: Repairing = "none",
    ) -> Bench:
        laid = layouts(pipeline.denoiser, call)
        return cls(
            pipeline=pipeline,
            call=call,
            operators=operators,
            dead_code=dead_code,
            readings=readings,
            laid=laid,
            repair=repair,
        )

    def calibrate(self, *, count: int | None = None, rounds: int | None = None) -> None:
        """Measure random plans until there are `count` readings, `CALIBRATING` by default, or `PATIENCE_S` seconds have gone."""
        held, wanted = len(self.readings.held), CALIBRATING if count is None else count
        if held >= wanted:
            return
        log.info("%d random plans are measured: of %d readings that correct times, this device has %d", wanted - held, wanted, held)
        began = time.perf_counter()
        for drawn in list(random_plans(self.operators, wanted))[held:]:
            edits = fillable(self.dead_code.completed(drawn), self.operators, self.repair)
            try:
                self.add(edits, self.measure(edits, rounds=rounds or ROUNDS))
            except (RuntimeError, ValueError, TypeError) as error:  # the denoiser's own code, of stand-ins that fit one by one
                log.info("a random plan does not run, and tells nothing: %s", error)
            if time.perf_counter() - began > PATIENCE_S:
                log.info("%d readings have to do for now: calls take long", len(self.readings.held))
                return

    def measure(self, edits: Sequence[Edit], *, rounds: int) -> Measurement:
        """The latency of edits, pruned / original. Their maps hold zeros: what they hold changes no time."""
        pruned = self._pruned(edits)
        ratio = compare_calls(self.pipeline.denoiser, pruned, self.call, rounds=rounds).ratio
        self._look(edits, pruned)
        return ratio

    def add(self, edits: Sequence[Edit], measured: Measurement) -> None:
        """Hold, and keep, one reading more."""
        self.readings.add(Reading.of(edits, measured, self.relaid(edits)))

    def times(self) -> Times:
        """The times that all readings until now explain best."""
        return learned(self.operators, self.readings.held)

    def relaid(self, edits: Sequence[Edit]) -> dict[str, bool]:
        """The modules that stay and get tensors that lie otherwise in memory; from one call of the pruned denoiser."""
        if _keys(edits) not in self.seen:
            self._look(edits, self._pruned(edits))
        return self.seen[_keys(edits)]

    def _pruned(self, edits: Sequence[Edit]) -> nn.Module:
        return pruned_view(self.pipeline.denoiser, edits, blank(edits))

    def _look(self, edits: Sequence[Edit], pruned: nn.Module) -> None:
        self.seen[_keys(edits)] = relaid(self.laid, layouts(pruned, self.call))


def _keys(edits: Sequence[Edit]) -> Keys:
    """What tells sets of edits of one denoiser apart."""
    return frozenset((edit.operator, edit.replacement) for edit in edits)


def calibrated(pipeline: Pipeline, call: Call, operators: Operators, dead_code: DeadCode, repair: Repairing) -> Bench:
    """A bench on this device, with the readings that the cache holds of it, and random plans measured where these are few."""
    readings = readings_on(pipeline, call, operators, repair)
    bench = Bench.of(pipeline, call, operators, dead_code, readings=readings, repair=repair)
    bench.calibrate()
    return bench


def readings_on(pipeline: Pipeline, call: Call, operators: Operators, repair: Repairing = "none") -> Readings:
    """The readings of this denoiser, called like this on this device. What repair lets stand-ins hold takes time: apart."""
    where = environment(pipeline.denoiser)
    shapes = [list(tensor.shape) for tensor in tensors_in((call.args, call.kwargs))]
    same = {key: where[key] for key in ("device", "threads", "dtype", "torch", "diffusers")}
    return Readings.kept({"architecture": operators.model, **same, "inputs": shapes, "repair": repair})


def fillable(edits: tuple[Edit, ...], operators: Operators, repair: Repairing) -> tuple[Edit, ...]:
    """The edits with room for what `repair` lets stand-ins hold."""
    return corrected(edits, operators) if repair == "closed-form" else edits
