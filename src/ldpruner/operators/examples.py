"""A call of a denoiser that no pipeline made: learned from its class, its configuration, and the errors that it raises.

Names of arguments say what they are by convention, among diffusers' models: latents, timesteps, text, masks, grids of positions.
What names do not tell, such as widths, is found by trying on the meta device. A width that is unknown begins as a prime number
that nothing else has; when an operation refuses it, the error's text holds that number beside the one that would do. Between
other guesses, such as whether latents are a grid or a row of tokens, the one counts that brings the call the furthest.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ldpruner.errors import PipelineError
from ldpruner.operators.tracing import Call, meta_copy
from ldpruner.registry import Registry

log = logging.getLogger(__name__)

EXAMPLES: Registry[Callable[[nn.Module, int], Call]] = Registry("example call")  # class name -> a call of so many samples

SAMPLES = 2
TEXT = 7  # tokens of text
GRID = (2, 4, 6)  # frames, height, width of latents where the configuration names no size, in patches
UNKNOWN = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069)  # one for each width to be found
ROUNDS = 60  # of trying, after which a signature counts as one that cannot be learned
TOGETHER = frozenset({"img_ids", "txt_ids"})  # arguments of which one alone says nothing
Forms = dict[str, Any]  # argument -> a nest of `Shape`s and plain values
Make = Callable[["Facts", str], list[Any]]  # the guesses at an argument of this name


@dataclass(frozen=True)
class Shape:
    """A tensor to be made: normal noise, the same number everywhere, numbers below `value`, or a grid's places in order."""

    dims: tuple[int, ...]
    kind: Literal["noise", "full", "below", "places"] = "noise"
    value: bool | int | float = 0  # its type is the tensor's

    def made(self, generator: torch.Generator) -> Tensor:
        if self.kind == "noise":
            return torch.randn(self.dims, generator=generator)
        if self.kind == "full":
            return torch.full(self.dims, self.value)
        if self.kind == "below":
            return torch.randint(max(int(self.value), 1), self.dims, generator=generator)
        return torch.arange(self.dims[-2]).view(-1, 1).expand(self.dims).clone()


def example_call(denoiser: nn.Module, *, samples: int = SAMPLES, seed: int = 0) -> Call:
    """A call of `denoiser` with noise of the right shapes, where no pipeline is at hand to make one.

    A class whose signature cannot be learned is registered: `EXAMPLES.register("ClassName")(make)`, where `make(denoiser, samples)`
    gives the call. Raises `PipelineError` that says how far the best guess came.
    """
    name = type(denoiser).__name__
    if name in EXAMPLES:
        return EXAMPLES[name](denoiser, samples)
    forms = _Learner(denoiser, samples).learned()
    generator = torch.Generator().manual_seed(seed)
    parameter = next(denoiser.parameters())

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, Shape):
            return leaf
        tensor = leaf.made(generator)
        return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)

    return Call((), {name: _mapped(form, made) for name, form in forms.items()})


def _mapped(form: Any, change: Callable[[Any], Any]) -> Any:
    return tree_map(change, form, is_leaf=lambda leaf: isinstance(leaf, Shape))


@dataclass(frozen=True)
class _Outcome:
    """How a call went: how many operations ran, and what ended it."""

    operations: int
    error: Exception | None = None

    def further_than(self, other: _Outcome) -> bool:
        return self.error is None or self.operations > other.operations

    @property
    def text(self) -> str:
        return "" if self.error is None else f"{type(self.error).__name__}: {' '.join(str(self.error).split())}"


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
    """Changes a guess at a call, one thing at a time, for as long as that brings the call further."""

    def __init__(self, denoiser: nn.Module, samples: int) -> None:
        self.denoiser = denoiser
        self.tried_in = meta_copy(denoiser)
        self.device = "meta"
        self.name = type(denoiser).__name__
        parameters = inspect.signature(denoiser.forward).parameters.items()
        self.parameters = {name: parameter for name, parameter in parameters if name != "return_dict"}
        self.facts = Facts.of(denoiser, samples)

    def learned(self) -> Forms:
        """The forms of a call that runs through. Raises `PipelineError`."""
        forms = {name: next(iter(self.facts.forms(name)), None) for name in self.parameters if self._is_given(name)}
        outcome = self._try(forms)
        if _asks_for_numbers(outcome.error):
            outcome = self._with_numbers(forms)
        for _ in range(ROUNDS):
            if outcome.error is None:
                return forms
            better = self._better(forms, outcome)
            if better is None:
                break
            forms, outcome = better
            if _asks_for_numbers(outcome.error):
                outcome = self._with_numbers(forms)
        raise PipelineError(
            f"{self.name}: no call of it could be learned from its class; the best guess ended with {outcome.text[:200]}. "
            "Give the call, or register one, see `ldpruner.operators.examples`."
        )

    def _is_given(self, name: str) -> bool:
        parameter = self.parameters[name]
        plain = parameter.kind not in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}
        return plain and (parameter.default is parameter.empty or name in {"encoder_hidden_states", "timestep"})

    def _with_numbers(self, forms: Forms) -> _Outcome:
        """Go on with numbers, where the class's own code looks at them."""
        self.tried_in, self.device = copy.deepcopy(self.denoiser), str(next(self.denoiser.parameters()).device)
        return self._try(forms)

    def _better(self, forms: Forms, outcome: _Outcome) -> tuple[Forms, _Outcome] | None:
        """The first change by what the error says, or else the furthest of all others, that goes further; None: there is none."""
        for changed in self._by_error(forms, outcome.text):
            tried = self._try(changed)
            if tried.further_than(outcome):
                return changed, tried
        best: tuple[Forms, _Outcome] | None = None
        for changed in self._by_guess(forms, outcome.text):
            tried = self._try(changed)
            if tried.error is None:
                return changed, tried
            if tried.further_than(best[1] if best else outcome):
                best = changed, tried
        return best

    def _by_error(self, forms: Forms, text: str) -> Iterator[Forms]:
        """Values of unknown widths that the error's own numbers suggest; 1, which any operation spreads, comes last."""
        numbers = sorted({int(number) for number in re.findall(r"\d+", text)})
        found = [
            (value, unknown)
            for unknown in _unknown_in(forms)
            for seen, wanted in itertools.product(numbers, repeat=2)
            if seen >= unknown and seen != wanted
            for value in _solutions(unknown, seen, wanted)
            if value not in UNKNOWN
        ]
        for value, unknown in sorted(set(found), key=lambda pair: pair[0] == 1):
            yield _with_width(forms, unknown, value)

    def _by_guess(self, forms: Forms, text: str) -> Iterator[Forms]:
        """Other forms of one argument, arguments that were left out, and what the error calls missing."""
        for name in self.parameters:
            yield from ({**forms, name: form} for form in self.facts.forms(name) if name not in forms or forms[name] != form)
        for key in re.findall(r"['`\"](\w+)['`\"]", text):
            for name in (name for name in self.parameters if name.endswith("cond_kwargs")):
                held = forms.get(name) or {}
                yield from ({**forms, name: {**held, key: form}} for form in self.facts.forms(key) if key not in held)
        for unknown in _unknown_in(forms):
            yield from (_with_width(forms, unknown, value) for value in self.facts.widths)
        for first, second in itertools.combinations(sorted(TOGETHER & (self.parameters.keys() - forms.keys())), 2):
            for one, other in itertools.product(self.facts.forms(first), self.facts.forms(second)):
                yield {**forms, first: one, second: other}
        if {"num_frames", "height", "width"} <= self.parameters.keys():
            yield {**forms, **{name: self.facts.forms(name)[0] for name in ("num_frames", "height", "width")}}

    def _try(self, forms: Forms) -> _Outcome:
        counter, generator = _Counter(), torch.Generator().manual_seed(0)

        def made(leaf: Any) -> Any:
            return leaf.made(generator).to(self.device) if isinstance(leaf, Shape) else leaf

        kwargs = {name: _mapped(form, made) for name, form in forms.items()}
        try:
            with torch.no_grad(), counter:
                self.tried_in(**kwargs)
        except Exception as error:  # whatever the denoiser's own code raises
            return _Outcome(counter.count, error)
        return _Outcome(counter.count)


def _asks_for_numbers(error: Exception | None) -> bool:
    """Whether a call on the meta device ended because the class's code looks at numbers, which are not there."""
    return error is not None and "meta" in str(error) and "tensor" in str(error).lower()


def _solutions(unknown: int, seen: int, wanted: int) -> Iterator[int]:
    """Values of a width with which an operation would have met `wanted` where it met `seen`: `k * width` or `width + c`."""
    if seen % unknown == 0 and wanted % (seen // unknown) == 0 and wanted:
        yield wanted // (seen // unknown)
    elif seen % unknown and wanted > seen - unknown:
        yield wanted - (seen - unknown)


def _with_width(forms: Forms, unknown: int, value: int) -> Forms:
    def changed(leaf: Any) -> Any:
        return replace(leaf, dims=tuple(value if dim == unknown else dim for dim in leaf.dims)) if isinstance(leaf, Shape) else leaf

    return {name: _mapped(form, changed) for name, form in forms.items()}


def _unknown_in(forms: Forms) -> list[int]:
    found: list[int] = []

    def look(leaf: Any) -> Any:
        found.extend(dim for dim in leaf.dims if dim in UNKNOWN) if isinstance(leaf, Shape) else None
        return leaf

    for form in forms.values():
        _mapped(form, look)
    return sorted(set(found))


@dataclass
class Facts:
    """What conventions and a configuration say of arguments, by their names."""

    samples: int
    config: Mapping[str, Any]
    widths: list[int]  # every whole number of the configuration that can be one
    frames: int
    height: int
    width: int
    channels: int
    unknown: dict[str, int] = field(default_factory=dict)  # argument -> its unknown width

    @classmethod
    def of(cls, denoiser: nn.Module, samples: int) -> Facts:
        config: Mapping[str, Any] = dict(getattr(denoiser, "config", {}))
        patch = _pair(config.get("patch_size", 1))
        size = _pair(config.get("sample_size")) or tuple(n * p for n, p in zip(GRID[1:], patch or (1, 1), strict=True))
        numbers = {leaf for leaf in tree_leaves(dict(config)) if isinstance(leaf, int) and not isinstance(leaf, bool)}
        return cls(
            samples=samples,
            config=config,
            widths=sorted(number for number in numbers if number > 0),
            frames=int(config.get("sample_frames") or GRID[0] * int(config.get("patch_size_t") or 1)),
            height=size[0],
            width=size[1],
            channels=int(config.get("in_channels") or config.get("in_dim") or UNKNOWN[0]),
        )

    def forms(self, name: str) -> list[Any]:
        """Guesses at an argument, the likeliest first; empty where its name says nothing."""
        for pattern, make in _ROLES:
            if re.search(pattern, name):
                return make(self, name)
        return []

    def unknown_of(self, name: str) -> int:
        if name not in self.unknown:
            self.unknown[name] = UNKNOWN[1:][len(self.unknown) % (len(UNKNOWN) - 1)]
        return self.unknown[name]

    def ids_axes(self) -> int:
        axes = next((value for key, value in self.config.items() if "axes" in key and isinstance(value, list | tuple)), (1, 1, 1))
        return len(axes)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    return (int(value[-2]), int(value[-1])) if isinstance(value, list | tuple) and len(value) >= 2 else None


def _latents(facts: Facts, _: str) -> list[Any]:
    n, c, f, h, w = facts.samples, facts.channels, facts.frames, facts.height, facts.width
    grids = [Shape((n, c, h, w)), Shape((n, c, f, h, w)), Shape((n, f, c, h, w))]
    tokens = [Shape((n, h * w, c)), Shape((n, f * h * w, c)), Shape((n, c, h * w))]
    return [*grids, *tokens, [Shape((c, 1, h, w))] * n, [Shape((c, h, w))] * n]


def _text(facts: Facts, name: str) -> list[Any]:
    n, width = facts.samples, facts.unknown_of(name)
    return [Shape((n, TEXT, width)), Shape((n, width)), Shape((n, 1, width)), [Shape((TEXT, width))] * n, [Shape((n, TEXT, width))]]


def _vector(facts: Facts, name: str) -> list[Any]:
    n, width = facts.samples, facts.unknown_of(name)
    return [Shape((n, width)), Shape((n, 1, width)), Shape((n, TEXT, width))]


def _moment(facts: Facts, _: str) -> list[Any]:
    n = facts.samples
    floats = [Shape(dims, "full", 500.0) for dims in ((n,), (n, 1), ())]
    return [*floats, Shape((n,), "full", 500), Shape((n,), "full", 0)]


def _mask(facts: Facts, name: str) -> list[Any]:
    n, f, h, w = facts.samples, facts.frames, facts.height, facts.width
    text = [
        Shape((n, TEXT), "full", True),
        Shape((n, TEXT), "full", 1.0),
        Shape((n, TEXT), "full", 1),
        Shape((n, 1, TEXT), "full", 1.0),
    ]
    grids = [Shape((1, 1, h, w), "full", 1.0), Shape((n, 1, h, w), "full", 1.0)]
    tokens = [Shape((n, length), "full", True) for length in (h * w, f * h * w, TEXT + h * w)]
    return [*text, *grids, *tokens] if re.search("encoder|text", name) else [*grids, *tokens, *text]


def _places(facts: Facts, name: str) -> list[Any]:
    axes, n = facts.ids_axes(), facts.samples
    latents = [facts.height * facts.width, facts.frames * facts.height * facts.width]
    lengths = [TEXT] if re.search("txt|text", name) else [*latents, *(TEXT + length for length in latents)]
    return [Shape((*batch, length, axes), "places") for length in lengths for batch in ((), (n,))]


def _sizes(width: int) -> Make:
    return lambda facts, _: [Shape((facts.samples, width)), Shape((facts.samples, width), "full", 8)]


def _grid_sizes(facts: Facts, _: str) -> list[Any]:
    n = facts.samples
    sizes = [(1, facts.height, facts.width), (facts.frames, facts.height, facts.width), (facts.height, facts.width)]
    return [form for size in sizes for form in ([size] * n, [[size]] * n)]


def _number(of: str) -> Make:
    return lambda facts, _: [getattr(facts, of)]


def _full(value: int) -> Make:
    return lambda facts, _: [Shape((facts.samples,), "full", value)]


def _tokens(facts: Facts, _: str) -> list[Any]:
    n, h, w = facts.samples, facts.height, facts.width
    return [Shape(dims, "below", 8) for dims in ((n, TEXT), (n, h * w), (n, h, w))]


_ROLES: list[tuple[str, Make]] = [
    (r"^num_frames$", _number("frames")),
    (r"^height$", _number("height")),
    (r"^width$", _number("width")),
    (r"mask", _mask),
    (r"^time_ids$", _sizes(6)),
    (r"added_time_ids", _sizes(3)),
    (r"^resolution$|_size$|crop_coords", _sizes(2)),
    (r"aspect_ratio", _sizes(1)),
    (r"shapes?$|shape_list", _grid_sizes),
    (r"_lens$", _full(TEXT)),
    (r"(img|txt|image|text|position)_ids", _places),
    (r"input_ids|token_id", _tokens),
    (r"class_labels", _full(3)),
    (r"time|^t$|^sigma|^fps$|guidance", _moment),
    (r"pooled|global|image_embed|text_embeds|proj_embedding|class_embeds", _vector),
    (r"encoder|text|context|cap_feats|embed", _text),
    (r"hidden_states|^sample$|^x$|latents", _latents),
]
