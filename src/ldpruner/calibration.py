"""Random plans, measured where nothing is known yet of how long plans take on this device."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldpruner.benchmarking import compare_calls
from ldpruner.environment import environment
from ldpruner.fitting import blank
from ldpruner.latencies import Reading, Readings, random_plans
from ldpruner.operators.discovery import DeadCode
from ldpruner.operators.tracing import Call, tensors_in
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Operators, Repairing, corrected
from ldpruner.record import Measurement
from ldpruner.surgery import pruned_view

log = logging.getLogger(__name__)

CALIBRATING = 16  # readings below which random plans are measured before any is chosen
CALIBRATION_ROUNDS = 15  # pairs of calls of each of these


def readings_on(pipeline: Pipeline, call: Call, operators: Operators, repair: Repairing = "none") -> Readings:
    """The readings of this denoiser, called like this on this device. What repair lets stand-ins hold takes time: apart."""
    where = environment(pipeline.denoiser)
    shapes = [list(tensor.shape) for tensor in tensors_in((call.args, call.kwargs))]
    same = {key: where[key] for key in ("device", "threads", "dtype", "torch", "diffusers")}
    return Readings.kept({"architecture": operators.model, **same, "inputs": shapes, "repair": repair})


def calibrate(
    readings: Readings,
    pipeline: Pipeline,
    call: Call,
    operators: Operators,
    dead_code: DeadCode,
    *,
    repair: Repairing = "none",
    count: int | None = None,
    rounds: int | None = None,
) -> None:
    """Measure random plans until there are `count` readings, `CALIBRATING` by default."""
    held, wanted = len(readings.held), CALIBRATING if count is None else count
    if held >= wanted:
        return
    log.info("%d random plans are measured: this device has %d of the %d readings that correct times", wanted - held, held, wanted)
    for drawn in list(random_plans(operators, wanted))[held:]:
        edits = fillable(dead_code.completed(drawn), operators, repair)
        readings.add(Reading.of(edits, measure(pipeline, call, edits, rounds=rounds or CALIBRATION_ROUNDS)))


def measure(pipeline: Pipeline, call: Call, edits: Sequence[Edit], *, rounds: int) -> Measurement:
    """The latency of edits, pruned / original. Their maps hold zeros: what fits them takes longer than to measure them."""
    pruned = pruned_view(pipeline.denoiser, edits, blank(edits))
    return compare_calls(pipeline.denoiser, pruned, call, rounds=rounds).ratio


def fillable(edits: tuple[Edit, ...], operators: Operators, repair: Repairing) -> tuple[Edit, ...]:
    """The edits with room for what `repair` lets stand-ins hold."""
    return corrected(edits, operators) if repair == "closed-form" else edits
