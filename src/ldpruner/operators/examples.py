"""A call of a denoiser that no pipeline made: learned from its class, its configuration, and the errors that it raises.

Names of arguments say what they are, see `conventions`. What names do not tell, such as widths, is found by trying on the meta
device, best guess first: of all calls tried, the one that ran the most operations is changed next. What its error says comes
first: a size that stands for an unknown one is in the text, beside the one that would do, and the line of code that failed names
arguments. Then come all other guesses. What is learned has run once with numbers, unless the denoiser has none.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
import linecache
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldpruner.errors import PipelineError
from ldpruner.operators.conventions import GRIDS, TEXT, UNKNOWN, Facts, Shape, anything, mapped, shapes_in, with_size
from ldpruner.operators.tracing import Call, meta_copy, on_meta
from ldpruner.operators.watching import tensors_in
from ldpruner.registry import Registry

log = logging.getLogger(__name__)

EXAMPLES: Registry[Callable[[nn.Module, int], Call]] = Registry("example call")  # class name -> a call of so many samples

SAMPLES = 2
TRIES = 300  # calls, after which a signature counts as one that cannot be learned
LARGEST = 2_000_000  # numbers in a tensor of a size that is not known yet
SEVERAL = 4  # guesses at an argument, where many arguments are tried
LAST = 3  # the stage of changes after which nothing else is left to try
ALWAYS = ("encoder_hidden_states", "timestep")  # given from the start, even where the class could do without
_TOO_SMALL = re.compile(r"[Kk]ernel size can't be|divisible by|multiples? of")
_UNCLEAR = re.compile("Invalid channel dimensions")
_LOOKS_AT_NUMBERS = re.compile("meta|unsupported scalarType|NotImplementedError")
Forms = dict[str, Any]  # argument -> a nest of `Shape`s and plain values


def example_call(denoiser: nn.Module, *, samples: int = SAMPLES, seed: int = 0) -> Call:
    """A call of `denoiser` with noise of the right shapes, where no pipeline is at hand to make one.

    A class whose signature cannot be learned is registered: `EXAMPLES.register("ClassName")(make)`, where `make(denoiser, samples)`
    gives the call. Raises `PipelineError` that says how far the best guess came.
    """
    name = type(denoiser).__name__
    if name in EXAMPLES:
        return EXAMPLES[name](denoiser, samples)
    return _call(denoiser, _learned(denoiser, samples), seed=seed)


def _learned(denoiser: nn.Module, samples: int) -> Forms:
    """The forms of a call that runs through, on a larger grid where the error speaks of sizes. Raises `PipelineError`."""
    furthest = _Tried({}, -1)
    for grid in GRIDS:
        learner = _Learner(denoiser, Facts.of(denoiser, samples, grid), wants_larger=grid != GRIDS[-1])
        found = learner.search()
        if found is not None:
            return found
        furthest = max(furthest, learner.furthest, key=lambda tried: tried.operations)
        if not _TOO_SMALL.search(learner.furthest.text):
            break
    raise PipelineError(
        f"{type(denoiser).__name__}: no call of it could be learned from its class; the best guess, of "
        f"{', '.join(furthest.forms) or 'no arguments'}, ran {furthest.operations} operations and ended: {furthest.text[:200]}. "
        'Give the call, or register one: `ldpruner.operators.EXAMPLES.register("ClassName")(make)`.'
    )


@dataclass(frozen=True)
class _Tried:
    """How a call went: how many operations ran, and what ended it."""

    forms: Forms
    operations: int
    error: str | None = None
    named: frozenset[str] = frozenset()  # words of the lines of code that failed, and of the error

    @property
    def text(self) -> str:
        return self.error or ""


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count += 1
        return made


class _Learner:
    """A best-first search among calls."""

    def __init__(self, denoiser: nn.Module, facts: Facts, *, wants_larger: bool) -> None:
        self.denoiser, self.facts, self.wants_larger = denoiser, facts, wants_larger
        self.runs_in = denoiser if on_meta(denoiser) else meta_copy(denoiser)
        parameters = inspect.signature(denoiser.forward).parameters.items()
        named = {name: p for name, p in parameters if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL} and name != "return_dict"}
        self.required = [name for name, p in named.items() if p.default is p.empty or name in ALWAYS]
        self.names = list(named)
        self.optional = {name for name, p in named.items() if p.default is not p.empty}
        self.seen: set[str] = set()
        self.furthest = _Tried({}, -1)

    def search(self) -> Forms | None:
        """The forms of a call that runs through; None where none of so many tries does, and `furthest` tells of the best."""
        order = itertools.count()
        first = self._try({name: next(iter(self._forms(name)), None) for name in self.required})
        queue = [(-first.operations, 0, next(order), first)]
        while queue and len(self.seen) < TRIES:
            _, stage, _, tried = heapq.heappop(queue)
            if tried.error is None:
                tried = self._settled(tried)
                if tried.error is None:
                    return tried.forms
            if self.wants_larger and _TOO_SMALL.search(tried.text):
                return None
            for changed in self._new(tried, stage):
                same = changed.error == tried.error  # more work for the same end is no progress
                progress = -tried.operations if same else -changed.operations
                heapq.heappush(queue, (progress, LAST if same else 0, next(order), changed))
                if changed.error is None or (changed.operations > tried.operations and not same):
                    break
            if stage < LAST:
                heapq.heappush(queue, (-tried.operations, stage + 1, next(order), tried))
        return None

    def _new(self, tried: _Tried, stage: int) -> Iterator[_Tried]:
        for forms in self._changes(tried, stage):
            if repr(forms) not in self.seen and len(self.seen) < TRIES:
                yield self._try(forms)

    def _settled(self, tried: _Tried) -> _Tried:
        """The same without arguments that nothing asks for, sizes that turned out to be free as the text's; run with numbers."""
        forms = tried.forms
        for name in [name for name in forms if name not in self.required]:
            fewer = {other: form for other, form in forms.items() if other != name}
            forms = fewer if self._try(fewer).error is None else forms
        for size in _unknown_in(forms):
            smaller = {name: with_size(form, size, TEXT) for name, form in forms.items()}
            forms = smaller if self._try(smaller).error is None else forms
        if not on_meta(self.denoiser):
            self.runs_in = self.denoiser
        return self._try(forms)

    def _forms(self, name: str) -> list[Any]:
        return self.facts.forms(name) or (anything(self.facts, name) if name in self.required else [])

    def _changes(self, tried: _Tried, stage: int) -> Iterator[Forms]:
        """What to try next: sizes by the error's numbers; arguments that the error names; other guesses; other arguments."""
        return (self._by_numbers, self._by_names, self._by_guess, self._by_more)[stage](tried)

    def _by_numbers(self, tried: _Tried) -> Iterator[Forms]:
        """Unknown sizes with what the error's own numbers suggest."""
        numbers = sorted({int(number) for number in re.findall(r"\d+", tried.text)})
        found = {
            (unknown == TEXT, value, unknown)
            for unknown in [*_unknown_in(tried.forms), TEXT]
            for seen, wanted in itertools.product(numbers, repeat=2)
            if seen >= unknown and seen != wanted
            for value in _solutions(unknown, seen, wanted)
            if value not in UNKNOWN and value > 1
        }
        if not found and any(number >= UNKNOWN[0] for number in numbers):  # the sum of two, say
            found = {(False, value, unknown) for unknown in _unknown_in(tried.forms) for value in self.facts.widths}
        for *_, value, unknown in sorted(found):
            yield {name: with_size(form, unknown, value) for name, form in tried.forms.items()}

    def _by_names(self, tried: _Tried) -> Iterator[Forms]:
        """Arguments that the error, or the code that failed, names: all that are missing at once, each alone, two together."""
        named = [name for name in self.names if name in tried.named]
        missing = {name: forms for name in named if tried.forms.get(name) is None and (forms := self._asked(name))}
        yield from self._by_keys(tried)
        yield {**tried.forms, **{name: forms[0] for name, forms in missing.items() if self.facts.forms(name)}}
        for name in named:
            yield from ({**tried.forms, name: form} for form in self._asked(name))
        for first, second in itertools.islice(itertools.combinations(missing, 2), 6):
            for one, other in itertools.product(missing[first][:4], missing[second][:4]):
                yield {**tried.forms, first: one, second: other}

    def _asked(self, name: str) -> list[Any]:
        return [] if name.endswith("kwargs") else self.facts.forms(name) or anything(self.facts, name)[:SEVERAL]

    def _by_keys(self, tried: _Tried) -> Iterator[Forms]:
        """Entries of arguments that are dicts, where the error asks for them by name."""
        for name in (name for name in self.names if re.search("cond.*kwargs|conditioning$", name)):
            held = tried.forms.get(name)
            if not isinstance(held, dict):
                held = {}
                yield {**tried.forms, name: held}
            keys = [key for key in re.findall(r"['`\"]([\w-]+)['`\"]", tried.text) if key not in held and key != name]
            guesses = {key: self.facts.forms(key) or anything(self.facts, key) for key in keys}
            if guesses:
                yield {**tried.forms, name: {**held, **{key: forms[0] for key, forms in guesses.items()}}}
            yield from ({**tried.forms, name: {**held, key: form}} for key, forms in guesses.items() for form in forms)

    def _by_guess(self, tried: _Tried) -> Iterator[Forms]:
        """Other forms of arguments that are given, or none, and widths that the configuration names."""
        for unknown in _unknown_in(tried.forms):
            for value in self.facts.widths:
                yield {name: with_size(form, unknown, value) for name, form in tried.forms.items()}
        for name in tried.forms:
            yield from ({**tried.forms, name: form} for form in self._forms(name))
            if name in self.optional:
                yield {other: form for other, form in tried.forms.items() if other != name}

    def _by_more(self, tried: _Tried) -> Iterator[Forms]:
        """Arguments that the class can do without."""
        for name in (name for name in self.names if name not in tried.forms):
            yield from ({**tried.forms, name: form} for form in self.facts.forms(name)[:SEVERAL])

    def _try(self, forms: Forms) -> _Tried:
        self.seen.add(repr(forms))
        tried = self._run(self.runs_in, forms)
        if tried.error and on_meta(self.runs_in) and not on_meta(self.denoiser):
            if _UNCLEAR.search(tried.error):  # with numbers, a convolution says which width it wants
                tried = replace(tried, error=self._run(self.denoiser, forms).error or tried.error)
            elif _LOOKS_AT_NUMBERS.search(tried.text):
                log.info("%s is tried with numbers from here on: %s", type(self.denoiser).__name__, tried.error)
                self.runs_in = self.denoiser
                tried = self._run(self.runs_in, forms)
        self.furthest = max(self.furthest, tried, key=lambda tried: tried.operations)
        return tried

    def _run(self, denoiser: nn.Module, forms: Forms) -> _Tried:
        """One call, watched; where an operation cannot be watched, it is made again without."""
        numbers = not on_meta(denoiser)
        if numbers and any(_is_too_large(shape) for shape in shapes_in(forms)):
            return _Tried(forms, 0, "a tensor that is too large")
        call = _call(denoiser, forms, seed=0)
        counter = _Counter()
        try:
            with torch.no_grad(), _in_silence():
                try:
                    with counter:
                        outputs = tensors_in(call.run(denoiser))
                except NotImplementedError as error:
                    if "HigherOrderOperator" not in str(error):
                        raise
                    outputs = tensors_in(call.run(denoiser))
        except Exception as error:  # whatever the denoiser's own code raises
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return _Tried(forms, counter.count, text, _words(error.__traceback__) | frozenset(re.findall(r"\w+", text)))
        if numbers and not all(bool(torch.isfinite(output).all()) for output in outputs):
            return _Tried(forms, counter.count, "the outputs are not finite")
        return _Tried(forms, counter.count)


def _call(denoiser: nn.Module, forms: Forms, *, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    parameter = next(denoiser.parameters(), torch.zeros(()))

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, Shape):
            return leaf
        tensor = _as_meta(leaf) if parameter.is_meta else leaf.made(generator)
        return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)

    return Call((), {name: mapped(form, made) for name, form in forms.items()})


def _is_too_large(shape: Shape) -> bool:
    return bool(set(shape.dims) & set(UNKNOWN)) and math.prod(shape.dims) > LARGEST


def _as_meta(shape: Shape) -> torch.Tensor:
    value = 0.0 if shape.kind == "noise" else 0 if shape.kind != "full" else shape.value
    return torch.full(shape.dims, value, device="meta")


def _words(traceback: TracebackType | None) -> frozenset[str]:
    """Every word of the lines of code that were being run when an error came up."""
    found: set[str] = set()
    while traceback is not None:
        code, offset = traceback.tb_frame.f_code, traceback.tb_lasti // 2
        places = list(code.co_positions()) if hasattr(code, "co_positions") else []
        first, last = places[offset][:2] if places else (None, None)
        for line in range(first or traceback.tb_lineno, (last or first or traceback.tb_lineno) + 1):
            found.update(re.findall(r"\w+", linecache.getline(code.co_filename, line)))
        traceback = traceback.tb_next
    return frozenset(found)


@contextmanager
def _in_silence() -> Iterator[None]:
    """What a class warns of matters to who calls it, not to who tries."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _solutions(unknown: int, seen: int, wanted: int) -> Iterator[int]:
    """Values of a size with which an operation would have met `wanted` where it met `seen`: `k * size` or `k * (size + c)`."""
    if seen % unknown == 0:
        times = seen // unknown
        yield from [wanted // times] if wanted % times == 0 else []
    elif unknown != TEXT:
        for times in (1, 4, 8):
            more = seen // times - unknown
            if seen % times == wanted % times == 0 and 0 < more < wanted // times:
                yield wanted // times - more


def _unknown_in(forms: Forms) -> list[int]:
    return sorted({dim for shape in shapes_in(forms) for dim in shape.dims if dim in UNKNOWN})
