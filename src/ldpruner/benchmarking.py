"""Measured time: two things alternate in one run, and what is reported is their ratio, with its spread."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldpruner.operators.timing import device_of, seconds
from ldpruner.operators.tracing import Call, count_macs
from ldpruner.pipelines import Pipeline
from ldpruner.probes import Probe
from ldpruner.record import Measurement

Switch = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two medians from one run, and the median of the ratios of neighbours in time (second to first)."""

    first: Measurement
    second: Measurement
    ratio: Measurement


def alternate(first: Switch, second: Switch, device: torch.device, *, rounds: int, how: str) -> Comparison:
    """Time `first` and `second` in turn, `rounds` times after a warm-up; which of them goes first changes every round."""
    for run in (first, second):
        seconds(run, device)
    taken: list[tuple[float, float]] = []
    for index in range(rounds):
        if index % 2:
            later, earlier = seconds(second, device), seconds(first, device)
            taken.append((earlier, later))
        else:
            taken.append((seconds(first, device), seconds(second, device)))
    return Comparison(
        first=Measurement.of([a * 1e3 for a, _ in taken], unit="ms", how=how),
        second=Measurement.of([b * 1e3 for _, b in taken], unit="ms", how=how),
        ratio=Measurement.of([b / a for a, b in taken], unit="", how=f"second / first, paired, {how}"),
    )


def compare_calls(first: nn.Module, second: nn.Module, call: Call, *, rounds: int = 31) -> Comparison:
    """How long one denoiser call takes in each of two denoisers on the device of the first."""

    how = f"one denoiser call, batch {call.batch}"
    return alternate(_caller(first, call), _caller(second, call), device_of(first), rounds=rounds, how=how)


def benchmark(first: Pipeline, second: Pipeline | None = None, *, probe: Probe, rounds: int) -> dict[str, Any]:
    """Size and speed of one pipeline, or of two that take turns in one run, as JSON.

    Gives parameters, MACs of one denoiser call for one sample, bytes of the denoiser's weights, and the time of one
    denoiser call and of a whole generation of the probe's samples from noise to pictures; a ratio is second to first.
    """
    pipelines = [first, second] if second else [first]
    calls = [pipeline.call(probe, samples=probe.samples) for pipeline in pipelines]
    one, other = pipelines[0], pipelines[-1]
    call = alternate(
        _caller(one.denoiser, calls[0]),
        _caller(other.denoiser, calls[-1]),
        device_of(one.denoiser),
        rounds=rounds,
        how=f"batch {calls[0].batch}",
    )
    whole = alternate(
        lambda: one.generate(probe),
        lambda: other.generate(probe),
        device_of(one.denoiser),
        rounds=max(2, rounds // 4),
        how=f"{probe.samples} x {probe.num_inference_steps} steps, decoded",
    )
    return {
        "models": [pipeline.source for pipeline in pipelines],
        "params": [sum(p.numel() for p in pipeline.denoiser.parameters()) for pipeline in pipelines],
        "macs": [count_macs(pipeline.denoiser, taken) for pipeline, taken in zip(pipelines, calls, strict=True)],
        "weights_bytes": [sum(p.nbytes for p in pipeline.denoiser.parameters()) for pipeline in pipelines],
        "denoiser_call": _as_json(call, len(pipelines)),
        "generation": _as_json(whole, len(pipelines)),
        "environment": environment(one.denoiser),
    }


def _caller(denoiser: nn.Module, call: Call) -> Switch:
    def run() -> Any:
        with torch.inference_mode():
            return call.run(denoiser)

    return run


def _as_json(comparison: Comparison, models: int) -> dict[str, Any]:
    readings = [asdict(comparison.first), asdict(comparison.second)][:models]
    return {"models": readings} | ({"ratio": asdict(comparison.ratio)} if models > 1 else {})


def environment(denoiser: nn.Module) -> dict[str, Any]:
    """Where and with what a time was taken."""
    device = device_of(denoiser)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(next(denoiser.parameters()).dtype).removeprefix("torch."),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "diffusers", "ldpruner")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    except OSError:
        names = set()
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()
