"""Tiny random denoisers, one for each class of diffusers: what `specimens/*.yaml` says of it, built.

An entry has the arguments of the class's constructor under `config`, and under `call` one forward call. A value in a call is

- a list of whole numbers: noise of that shape, float32;
- `{int: SHAPE, below: N}`: whole numbers from 0 to N - 1; `{full: SHAPE, value: V}`: the number V, whole where V is whole;
- `{bool: SHAPE}`: true everywhere; `{float: V, shape: SHAPE}`: the number V as float32;
- `{range: N, shape: SHAPE}`: 0 to N - 1, whole numbers, in that shape;
- `{values: NESTED LIST}`: these numbers as a tensor, whole where all are whole;
- `{cache: CLASS, layers: N}`: an empty cache, see `caches.py`;
- `{list: [VALUES]}`, `{tuple: [VALUES]}`, `{dict: {NAME: VALUE}}`: a nest of values;
- anything else, such as a number, a word or null: itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from caches import CACHES
from torch import Tensor, nn

from ldpruner.operators import Call

FOLDER = Path(__file__).parent / "specimens"


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """A class of diffusers, the arguments that make it tiny, and how to call it where that cannot be learned."""

    name: str
    config: dict[str, Any]
    call: dict[str, Any] | None = None
    why: str = ""  # what keeps `ldpruner.example_call` from learning its call; empty where it does
    fails: str = ""  # part of the error that ends its walk, where one does
    cause: str = ""  # and why

    def build(self, seed: int = 0) -> nn.Module:
        """The denoiser with random weights, the same for every seed; those that begin as zeros, or unset, get numbers too.

        Output layers and gates often begin as zeros, which would hide whatever an edit does.
        """
        torch.manual_seed(seed)
        with _unset_as_nan():
            denoiser: nn.Module = getattr(diffusers, self.name)(**self.config)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                if parameter.is_floating_point() and (not parameter.any() or parameter.isnan().any()):
                    parameter.normal_(std=0.02)
        return denoiser.eval()

    def stated_call(self, seed: int = 0) -> Call:
        """The call as the file has it, the same for every seed."""
        assert self.call is not None, f"{self.name}: no call is stated"
        generator = torch.Generator().manual_seed(seed)
        return Call((), {name: _value(spec, generator) for name, spec in self.call.items()})


@contextmanager
def _unset_as_nan() -> Iterator[None]:
    """What a class leaves unset, for a checkpoint to fill, holds NaN and not what lay in memory."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def specimens() -> dict[str, Specimen]:
    """Every entry of every file, by class."""
    found: dict[str, Specimen] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for name, entry in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items():
            assert name not in found, f"{name} is in two files"
            found[name] = Specimen(name=name, **entry)
    return found


def _value(spec: Any, generator: torch.Generator) -> Any:
    if isinstance(spec, list):
        return torch.randn(spec, generator=generator)
    if not isinstance(spec, dict):
        return spec
    kind = next(iter(spec))
    return _MAKERS[kind](spec, generator)


def _range(spec: dict[str, Any], _: torch.Generator) -> Tensor:
    numbers = torch.arange(spec["range"])
    return numbers.repeat(math.prod(spec["shape"]) // spec["range"]).view(spec["shape"])


_MAKERS: dict[str, Any] = {
    "int": lambda spec, generator: torch.randint(spec["below"], spec["int"], generator=generator),
    "full": lambda spec, _: torch.full(spec["full"], spec["value"]),
    "bool": lambda spec, _: torch.ones(spec["bool"], dtype=torch.bool),
    "float": lambda spec, _: torch.full(spec["shape"], float(spec["float"])),
    "range": _range,
    "values": lambda spec, _: torch.tensor(spec["values"]),
    "cache": lambda spec, _: CACHES[spec["cache"]](spec["layers"]),
    "list": lambda spec, generator: [_value(value, generator) for value in spec["list"]],
    "tuple": lambda spec, generator: tuple(_value(value, generator) for value in spec["tuple"]),
    "dict": lambda spec, generator: {name: _value(value, generator) for name, value in spec["dict"].items()},
}
