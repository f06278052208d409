"""Measured time and memory: two things alternate in one run, and what is reported is their ratio, with its confidence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ldpruner.environment import environment, peak_since_reset, release_memory, reset_peak, resident_bytes
from ldpruner.operators.timing import device_of, seconds, time_alone
from ldpruner.operators.tracing import Call, count_macs
from ldpruner.pipelines import Model, Pipeline, as_pipeline
from ldpruner.probes import Probe
from ldpruner.record import Measurement

Switch = Callable[[], Any]
PROBE = Probe(samples=1, num_inference_steps=20)
WEIGHTS = (".safetensors", ".bin", ".msgpack", ".ckpt", ".pt", ".pth")
ENOUGH_S, FEWEST = 60.0, 5  # seconds of readings after which no further round begins, and rounds that there are at least


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two medians from one run, and the median of the ratios of neighbours in time (second to first)."""

    first: Measurement
    second: Measurement
    ratio: Measurement


def alternate(first: Switch, second: Switch, device: torch.device, *, rounds: int, how: str) -> Comparison:
    """Time `first` and `second` in turn, `rounds` times after a warm-up; which of them goes first changes every round.

    Of runs that take seconds there are fewer rounds, at least `FEWEST`: no more begin once `ENOUGH_S` are spent.
    """
    for run in (first, second):
        seconds(run, device)
    taken: list[tuple[float, float]] = []
    for index in range(rounds):
        if index >= FEWEST and sum(map(sum, taken)) > ENOUGH_S:
            break
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


def benchmark(model: Model, against: Model | None = None, *, probe: Probe = PROBE, rounds: int = 31) -> dict[str, Any]:
    """Size, speed and memory of one pipeline, or of two that take turns in one run, as JSON.

    `times` holds the denoiser's call, a whole generation of the probe's samples (decoded), and apart from it the decoder and
    the text encoders, where the pipeline has them; a ratio is `model` to `against`, with a 95 % interval of its median.
    `memory` is the most that the process held in a generation (with both models, where there are two), and how much of it
    the generation added. `operators` are the times of each module by itself in one denoiser call. MACs are those of one
    call for one sample, bytes are those of weights.
    """
    pipelines = [as_pipeline(each) for each in (model, against) if each is not None]
    device, complete = device_of(pipelines[0].denoiser), pipelines[-1].completed(probe)
    stages = [_stages(pipeline, complete) for pipeline in pipelines]
    return {
        "models": [pipeline.source for pipeline in pipelines],
        "task": pipelines[0].task,
        "batch": probe.samples,
        "latents": list(stages[0].latents),
        "resolution": list(stages[0].resolution),
        "params": [_params(pipeline.denoiser) for pipeline in pipelines],
        "macs": [count_macs(pipeline.denoiser, each.call) for pipeline, each in zip(pipelines, stages, strict=True)],
        "weights_bytes": [sum(p.nbytes for p in pipeline.denoiser.parameters()) for pipeline in pipelines],
        "file_bytes": [_file_bytes(pipeline) for pipeline in pipelines],
        "memory": [_memory(each.runs["generation"], device) for each in stages],
        "times": {name: _times(name, stages, device, rounds) for name in stages[0].runs if name in stages[-1].runs},
        "operators": [
            operator_times(pipeline.denoiser, each.call, repeats=max(3, rounds // 3))
            for pipeline, each in zip(pipelines, stages, strict=True)
        ],
        "environment": environment(pipelines[0].denoiser),
    }


def _times(name: str, stages: Sequence[_Stages], device: torch.device, rounds: int) -> dict[str, Any]:
    """Readings of one stage of each model, and their ratio where there are two; generations are fewer, for they take long."""
    rounds = max(2, rounds // 4) if name == "generation" else rounds
    how = stages[0].how[name]
    if len(stages) == 1:
        seconds(stages[0].runs[name], device)
        taken = [seconds(stages[0].runs[name], device) * 1e3 for _ in range(rounds)]
        return {"models": [asdict(Measurement.of(taken, unit="ms", how=how))]}
    measured = alternate(stages[1].runs[name], stages[0].runs[name], device, rounds=rounds, how=how)
    return {"models": [asdict(measured.second), asdict(measured.first)], "ratio": asdict(measured.ratio)}


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """What of a pipeline is timed, and what each was given."""

    call: Call  # of the denoiser
    runs: dict[str, Switch]
    how: dict[str, str]
    latents: tuple[int, ...]  # of one sample
    resolution: tuple[int, ...]  # of one decoded picture or spectrogram: channels, height, width


def _stages(pipeline: Pipeline, probe: Probe) -> _Stages:
    """Watch one generation, and take from it what each part is called with."""
    call = pipeline.call(probe, samples=probe.samples)
    with _recorded(pipeline) as recorded:
        made = next(pipeline.generations(probe))
    runs: dict[str, Switch] = {"denoiser_call": _caller(pipeline.denoiser, call), "generation": lambda: pipeline.generate(probe)}
    how = {
        "denoiser_call": f"batch {call.batch}",
        "generation": f"{probe.samples} x {probe.num_inference_steps} steps, decoded",
    }
    for name, switches in recorded.items():
        runs[name] = functools.partial(_all, switches)
        how[name] = f"batch {probe.samples}"
    if pipeline.mel is not None:
        runs["vocoder"] = lambda: [pipeline.sound(picture) for picture in made.pictures]
        how["vocoder"] = f"batch {probe.samples}"
    return _Stages(call=call, runs=runs, how=how, latents=tuple(made.latents.shape[1:]), resolution=tuple(made.pictures.shape[1:]))


@contextmanager
def _recorded(pipeline: Pipeline) -> Iterator[dict[str, list[Switch]]]:
    """Collect how decoders and text encoders are called while the block runs, so that the calls can be made again."""
    found: dict[str, list[Switch]] = {}
    with ExitStack() as stack:
        for name, part in pipeline.pipe.components.items():
            if not isinstance(part, nn.Module):
                continue
            if hasattr(part, "decode"):
                original: Any = part.decode
                part.__dict__["decode"] = functools.partial(_record, original, found.setdefault("decoder", []))
                stack.callback(part.__dict__.pop, "decode")
            elif name.startswith("text_encoder"):
                handle = part.register_forward_pre_hook(_hook(found.setdefault("text_encoder", [])), with_kwargs=True)
                stack.callback(handle.remove)
        yield found
    for name in [name for name, calls in found.items() if not calls]:
        del found[name]


def _record(function: Callable[..., Any], calls: list[Switch], *args: Any, **kwargs: Any) -> Any:
    calls.append(functools.partial(_quietly, function, *args, **kwargs))
    return function(*args, **kwargs)


def _hook(calls: list[Switch]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(functools.partial(_quietly, module.__call__, *args, **kwargs))

    return hook


def _quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.inference_mode():
        return function(*args, **kwargs)


def _all(switches: Sequence[Switch]) -> None:
    for switch in switches:
        switch()


def operator_times(denoiser: nn.Module, call: Call, *, repeats: int) -> dict[str, Any]:
    """Each module's own time in one call, longest first, and how far their sum is from the whole.

    A module's own time leaves out the modules that it calls, so the parts make up the whole; what `sum_to_whole` is above 1
    is what watching costs.
    """
    whole, alone = time_alone(denoiser, call, repeats)
    modules = dict(denoiser.named_modules())
    rows = [
        {"operator": name or "(the denoiser itself)", "kind": type(modules[name]).__name__, "own_ms": taken}
        for name, taken in sorted(alone.items(), key=lambda item: -item[1])
    ]
    return {"whole_ms": whole, "sum_ms": sum(alone.values()), "sum_to_whole": sum(alone.values()) / whole, "times": rows}


def _memory(run: Switch, device: torch.device) -> dict[str, Any]:
    """The most memory that the process holds in a generation, and how much of it the generation adds, in bytes.

    Allocated on CUDA, else resident; None where this system cannot tell.
    """
    run()
    release_memory()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
    watched = reset_peak(device)
    run()
    peak = peak_since_reset(device) if watched else None
    kind = "allocated" if device.type == "cuda" else "resident"
    return {"kind": kind, "peak_bytes": peak, "added_bytes": None if peak is None else max(0, peak - before)}


def _file_bytes(pipeline: Pipeline) -> int | None:
    """How large the weights of the folder are that a pipeline was loaded from; None where it came from elsewhere."""
    if pipeline.folder is None:
        return None
    files = [path for path in pipeline.folder.rglob("*") if path.suffix in WEIGHTS]
    return sum(path.stat().st_size for path in files if "judge" not in path.relative_to(pipeline.folder).parts) or None


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _caller(denoiser: nn.Module, call: Call) -> Switch:
    return functools.partial(_quietly, call.run, denoiser)
