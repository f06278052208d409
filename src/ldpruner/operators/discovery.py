"""Every operator that can be replaced, and what that saves: from one traced call and a dry run per replacement."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ldpruner.ldpruner_v1 import build
from ldpruner.operators.dataflow import Uses
from ldpruner.operators.repeating import repeating
from ldpruner.operators.stages import stage_of_blocks
from ldpruner.operators.timing import device_of, time_modules, time_pointwise
from ldpruner.operators.tracing import Call, Trace, architecture, on_meta, trace
from ldpruner.operators.watching import Traced, tensors_in
from ldpruner.plans import Candidate, Cost, Edit, Operator, Operators, dead_edit, outermost, within
from ldpruner.replacements import REPLACEMENTS, pointwise_cost, zeros_like_output

log = logging.getLogger(__name__)

HOLDING = frozenset({"pointwise", "shortcut"})  # replacements that hold parameters
CHEAP = 2e9  # multiply-accumulates of a call: one of fewer is quicker than what the meta device takes to go through its shapes


def discover(denoiser: nn.Module, call: Call, *, timing_repeats: int = 9) -> Operators:
    """Find every module that a registered replacement fits, and time it on the device that it is on.

    A module qualifies when the call runs it exactly once. Every pair of operator and replacement has run in the module around
    it: on the meta device, which takes no memory, or in a copy of a denoiser so small that it is quicker. `timing_repeats=0`
    leaves times at 0. Raises `PipelineError` where the denoiser cannot be traced.
    """
    traced = trace(denoiser, call)
    found = _Survey(_tried_in(denoiser, traced), traced, batch=call.batch, read=call.read).operators()
    total = Cost(params=_params(denoiser), macs=traced.macs // call.batch)
    operators = Operators(
        model=architecture(denoiser),
        denoiser=type(denoiser).__name__,
        device=str(device_of(denoiser)),
        total=total,
        operators=tuple(found),
    )
    return with_times(operators, denoiser, call, repeats=timing_repeats) if timing_repeats else operators


def with_times(operators: Operators, denoiser: nn.Module, call: Call, *, repeats: int) -> Operators:
    """The same operators with times measured now, on the denoiser's device: medians over `repeats`."""
    whole, times = time_modules(denoiser, call, repeats)
    alike = dict[str, float]()  # stand-ins of one shape take as long, wherever they stand

    def timed(operator: Operator) -> Operator:
        candidates = tuple(replace(c, cost=replace(c.cost, latency_ms=stand_in_time(operator, c))) for c in operator.candidates)
        return replace(operator, cost=replace(operator.cost, latency_ms=times[operator.name]), candidates=candidates)

    def stand_in_time(operator: Operator, candidate: Candidate) -> float:
        if candidate.replacement == "pointwise":
            make = json.dumps([operator.input_shape, candidate.options])
            if make not in alike:
                alike[make] = time_pointwise(operator, dict(candidate.options), denoiser, repeats)
            return alike[make]
        return times[f"{operator.name}.{candidate.options['child']}"] if candidate.replacement == "shortcut" else 0.0

    total = replace(operators.total, latency_ms=whole)
    return replace(operators, total=total, operators=tuple(timed(operator) for operator in operators.operators))


class DeadCode:
    """Finds what edits leave without a use. The denoiser is traced once; what edits take its tensors from is told by themselves."""

    def __init__(self, denoiser: nn.Module, call: Call, operators: Operators) -> None:
        self.operators = operators
        self._trace = trace(denoiser, call)
        alive = self._trace.dataflow.reaching()
        can_die = (operator.name for operator in operators.operators if operator.if_dead)
        self._used = {name for name in can_die if alive.intersection(self._trace.modules[name].operations)}

    def completed(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """The edits, and those that take away what they leave without a use, one by one or jointly."""
        found = self._found_with(edits)
        kept = [edit for edit in edits if not any(within(edit.operator, path) for path in found)]
        by_name = {edit.operator: edit for edit in kept} | {name: dead_edit(self.operators[name]) for name in found}
        return tuple(by_name[operator.name] for operator in self.operators.operators if operator.name in by_name)

    def _found_with(self, edits: Sequence[Edit]) -> list[str]:
        """The outermost operators of which nothing leads to the output any more."""
        modules, instead = self._trace.modules, dict[int, list[int]]()
        for edit in edits:
            instead |= _instead(modules, edit.operator, edit.replacement, edit.options)
        operations, tensors = self._trace.dataflow.needed(instead)
        left = [name for name in self._used if not operations.intersection(modules[name].operations)]
        needed = [e.operator for e in edits if any(id(made) in tensors for made in tensors_in(modules[e.operator].output))]
        apart = [name for name in left if not any(within(name, e.operator) for e in edits)]
        apart += [e.operator for e in edits if e.operator in self._used and e.operator not in needed]  # stand-ins for no one
        return list(outermost(name for name in apart if not any(within(stand_in, name) for stand_in in needed)))


def _instead(modules: Mapping[str, Traced], name: str, replacement: str, options: Mapping[str, Any]) -> dict[int, list[int]]:
    """Of every tensor that an operator gives: those that its stand-in reads to make it."""
    entry = modules[name]
    if replacement == "shortcut":
        return {id(entry.output): [id(modules[f"{name}.{options['child']}"].output)]}
    given = {tuple(source): id(tensor) for source, tensor in entry.arguments}
    made = entry.output if isinstance(entry.output, tuple | list) else [entry.output]
    sources = options.get("returns", [options.get("source")])  # those of a `zero` say where its shape is from: it reads nothing
    reads = [[given[tuple(source)]] if isinstance(source, list | tuple) else [] for source in sources]
    return {id(piece): read for piece, read in zip(made, reads, strict=True) if isinstance(piece, Tensor)}


def _tried_in(denoiser: nn.Module, traced: Trace) -> nn.Module:
    """Where stand-ins are tried: a copy with numbers in it where that is quicker, and every device knows how to use them."""
    cheap = traced.macs < CHEAP and all(parameter.dtype == torch.float32 for parameter in denoiser.parameters())
    return copy.deepcopy(denoiser).eval() if cheap and not on_meta(denoiser) else traced.ran_in


@dataclass
class _Survey:
    """Goes through the modules of a traced skeleton and tries every replacement on each, in a denoiser that it may change."""

    tried_in: nn.Module
    trace: Trace
    batch: int
    read: frozenset[str] = frozenset()  # modules that a pipeline asks for, as for the width of an embedding
    _known: dict[tuple[str, str, str], bool] = field(default_factory=dict)  # trials, by what they depend on
    _makes: dict[str, str] = field(default_factory=dict)

    def operators(self) -> list[Operator]:
        self.like = next(self.tried_in.parameters())
        once = [
            entry for entry in self.trace.modules.values() if entry.calls == 1 and _does_something(entry) and self._unread(entry)
        ]
        self.zeros = {entry.name: self._when_dead(entry) for entry in once if _params(entry.module)}
        self.uses = Uses(self.trace.dataflow)
        found = [operator for operator in map(self._operator, once) if operator.candidates or operator.if_dead]
        found = self._leaving_a_parameter(self._not_looked_into(found))
        self.can_die = [operator.name for operator in found if operator.if_dead]
        found = [replace(o, candidates=tuple(self._with_dead(o))) for o in found]
        found = [operator for operator in found if operator.candidates or operator.if_dead]
        return _with_parents(_with_stages(found, stage_of_blocks(self.tried_in, self.trace.modules)))

    def _unread(self, entry: Traced) -> bool:
        """Whether the code of the pipeline, which a stand-in's own trial does not see, reads neither the module nor its parts."""
        return not any(within(path, entry.name) for path in self.read)

    def _not_looked_into(self, found: Sequence[Operator]) -> list[Operator]:
        """Without operators of which code beyond the module around them reads parts, such as an attention's processor."""
        names, layers = {operator.name for operator in found}, dict[int, list[Operator]]()
        for operator in found:
            layers.setdefault(sum(operator.name.startswith(name + ".") for name in names), []).append(operator)
        kept = {operator.name for layer in layers.values() for operator in self._running(layer)}
        return [operator for operator in found if operator.name in kept]

    def _leaving_a_parameter(self, found: Sequence[Operator]) -> list[Operator]:
        """With fewer ways to replace what holds the first parameter of a module that is asked for one, mostly for its dtype.

        Each stand-in without parameters runs there, as others hold some; all together they would leave none.
        """
        for asked in sorted(self.trace.asked - {""}):
            first = next((name for name, _ in self.tried_in.get_submodule(asked).named_parameters()), "")
            owner = f"{asked}.{first}".rpartition(".")[0]
            found = [_kept_for_its_parameters(o) if within(owner, o.name) and o.name.startswith(f"{asked}.") else o for o in found]
        return [operator for operator in found if operator.candidates or operator.if_dead]

    def _running(self, layer: Sequence[Operator]) -> Sequence[Operator]:
        """Of operators that do not lie in each other, those with whose stand-ins the whole denoiser runs, found by halves."""
        if self._run_together(layer):
            return layer
        if len(layer) == 1:
            log.info("%s stays: code beyond the module around it reads its parts", layer[0].name)
            return []
        half = len(layer) // 2
        return [*self._running(layer[:half]), *self._running(layer[half:])]

    def _run_together(self, layer: Sequence[Operator]) -> bool:
        with ExitStack() as stack:
            for operator in layer:
                first = operator.candidates[0] if operator.candidates else None
                options = dict(first.options) if first else dict(operator.if_dead or {})
                stack.enter_context(self._swapped(operator.name, first.replacement if first else "zero", options))
            return self._gives_the_same(self.trace.modules[""])

    def _when_dead(self, entry: Traced) -> dict[str, Any] | None:
        """Options of the `zero` that can hold its place; None where the module around asks more of it, such as its parts."""
        options = zeros_like_output(entry)
        return options if options is not None and self._runs(entry, "zero", options) else None

    def _operator(self, entry: Traced) -> Operator:
        return Operator(
            name=entry.name,
            kind=type(entry.module).__name__,
            input_shape=tuple(entry.arguments[0][1].shape),
            output_shape=tuple(tensors_in(entry.output)[0].shape),
            cost=self._cost(entry),
            parent=None,
            candidates=tuple(self._candidates(entry)),
            if_dead=self.zeros.get(entry.name),
            axis=entry.axis_options(tensors_in(entry.output)[0].ndim).get("axis"),
        )

    def _cost(self, entry: Traced) -> Cost:
        return Cost(params=_params(entry.module), macs=entry.macs // self.batch)

    def _candidates(self, entry: Traced) -> Iterator[Candidate]:
        for name in REPLACEMENTS:
            options = REPLACEMENTS[name](entry)
            tried = name == "zero" and options == self.zeros.get(entry.name)
            if options is not None and (tried or self._runs(entry, name, options)):
                yield Candidate(
                    replacement=name,
                    options=options,
                    cost=self._stand_in_cost(entry, name, options),
                )

    def _stand_in_cost(self, entry: Traced, name: str, options: dict[str, Any]) -> Cost:
        if name == "pointwise":
            return pointwise_cost(options, entry.output)
        return self._cost(self.trace.modules[f"{entry.name}.{options['child']}"]) if name == "shortcut" else Cost()

    def _runs(self, entry: Traced, replacement: str, options: dict[str, Any]) -> bool:
        """Whether the module around the operator gives what it gave before; what reads its parts from further away, see above.

        Blocks of a denoiser are alike: what ran in one of the same make that was given the same shapes is not tried again. Without
        numbers, siblings that are given the like give what they gave: they would only go through the same shapes again.
        """
        around = self._called_around(entry.name.rpartition(".")[0])
        make = self._make(around, entry.name), replacement, json.dumps(options)
        if make not in self._known:
            siblings = list(self._siblings(around, entry.name)) if on_meta(self.tried_in) else []
            with self._swapped(entry.name, replacement, options), repeating(siblings):
                self._known[make] = self._gives_the_same(around)
        return self._known[make]

    def _siblings(self, around: Traced, operator: str) -> Iterator[Traced]:
        """What the module around an operator calls once beside it, however deep in lists."""
        waiting = [(around.name, around.module)]
        while waiting:
            path, module = waiting.pop()
            for name, child in module.named_children():
                inside = f"{path}.{name}" if path else name
                entry = self.trace.modules.get(inside)
                if within(operator, inside) or entry is None or entry.calls > 1:
                    waiting += [(inside, child)] if inside != operator else []
                else:
                    yield entry

    def _make(self, around: Traced, operator: str) -> str:
        """What a trial depends on: a module's structure and settings, what it was given, and the path of the operator in it."""
        if self.trace.has_numbers:
            return operator
        if around.name not in self._makes:
            settings = [(name, type(m).__name__, _settings(m)) for name, m in around.module.named_modules()]
            given = tree_map(lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, around.given)
            self._makes[around.name] = repr((settings, given))
        return self._makes[around.name] + operator[len(around.name) :]

    @contextmanager
    def _swapped(self, path: str, replacement: str, options: dict[str, Any]) -> Iterator[None]:
        """The denoiser in which stand-ins are tried with this one in it, for as long as the block runs."""
        parent, _, name = path.rpartition(".")
        siblings, module = self.tried_in.get_submodule(parent)._modules, self.tried_in.get_submodule(path)
        with self.like.device:  # without numbers to begin with, where there are to be none
            siblings[name] = build(replacement, options, module).to(next(module.parameters(), self.like))
        try:
            yield
        finally:
            siblings[name] = module

    def _gives_the_same(self, around: Traced) -> bool:
        """Whether a module, with what is swapped in it, gives the shapes that it gave."""
        given = _copies if self.trace.has_numbers else _zeros
        args, kwargs = tree_map(lambda leaf: given(leaf, self.like.device), around.given)
        try:
            with torch.no_grad():
                return _shapes(self.tried_in.get_submodule(around.name)(*args, **kwargs)) == _shapes(around.output)
        except Exception as error:  # whatever the denoiser's own code raises: the stand-in does not fit there
            log.info("a stand-in does not fit in %s: %s", around.name or "the denoiser", error)
            return False

    def _called_around(self, path: str) -> Traced:
        while path and path not in self.trace.modules:
            path = path.rpartition(".")[0]
        return self.trace.modules[path]

    def _with_dead(self, operator: Operator) -> Iterator[Candidate]:
        """The candidates with the outermost operators that no longer reach the output, but for those that cut the latents off."""
        name = operator.name
        idle = not self.uses.operations.intersection(self.trace.modules[name].operations)  # in the original: no weights for it
        for candidate in operator.candidates:
            if idle and candidate.replacement in HOLDING:
                continue
            lost, tensors = self.uses.lost(_instead(self.trace.modules, name, candidate.replacement, candidate.options))
            if self._reads_latents(without=tensors):
                died = self.uses.all_lost([self.trace.modules[other].operations for other in self.can_die], lost) if lost else []
                apart = (other for other, dead in zip(self.can_die, died, strict=False) if dead)
                apart = (other for other in apart if not within(other, name) and not within(name, other))
                yield replace(candidate, dead=tuple(outermost(apart)))
            else:
                log.info("%s at %s: the output would not depend on the latents", candidate.replacement, name)

    def _reads_latents(self, *, without: set[int]) -> bool:
        """Whether the output depends on the first argument of the call, where it no longer does on these tensors."""
        args, kwargs = self.trace.modules[""].given
        first = next((given for given in (*args, *kwargs.values()) if tensors_in(given)), None)
        return any(id(tensor) in self.uses.tensors and id(tensor) not in without for tensor in tensors_in(first))


def _with_stages(operators: list[Operator], stages: Mapping[str, str]) -> list[Operator]:
    def placed(operator: Operator) -> Operator:
        block = next((block for block in stages if within(operator.name, block)), "")
        stage = stages.get(block) or next((stage for stage in stages.values() if operator.name == stage), "")
        return replace(operator, block=block, stage=stage)

    return [placed(operator) for operator in operators]


def _with_parents(operators: list[Operator]) -> list[Operator]:
    names = {operator.name for operator in operators}

    def parent(name: str) -> str | None:
        while name := name.rpartition(".")[0]:
            if name in names:
                return name
        return None

    return [replace(operator, parent=parent(operator.name)) for operator in operators]


def _does_something(entry: Traced) -> bool:
    """Whether the module takes a tensor and gives another one; a dropout at rest gives back what it got."""
    outputs = tensors_in(entry.output)
    return bool(entry.name and entry.arguments and outputs) and not any(given is outputs[0] for _, given in entry.arguments)


def _zeros(leaf: Any, device: torch.device) -> Any:
    """What stands for a tensor where numbers do not matter."""
    return torch.zeros_like(leaf, device=device) if isinstance(leaf, Tensor) else leaf


def _kept_for_its_parameters(operator: Operator) -> Operator:
    candidates = tuple(c for c in operator.candidates if c.replacement in HOLDING)
    return replace(operator, candidates=candidates, if_dead=None)


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's own values and the shapes of its own parameters."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in module._parameters.items() if parameter is not None]
    values = [(name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)]
    return [*shapes, *values]


def _copies(leaf: Any, device: torch.device) -> Any:
    """What stands for a tensor where the code around looks at its numbers."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _shapes(tree: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(leaf.shape, leaf.dtype) for leaf in tensors_in(tree) if isinstance(leaf, Tensor)]


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
