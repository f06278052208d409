"""What happens in one call of a denoiser: every module's arguments and output, and how operations hang together.

Which outputs are only ever added to something, which a skip path makes, which are written in place later on, where channels are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ldpruner.ldpruner_v1 import channel_axis
from ldpruner.operators.dataflow import Dataflow

Source = list[Any]  # [position, keyword] of an argument

# Operations f with f(0) = 0 that act on each number by itself or only move numbers about: a branch that passes through
# them and is then added to the stream contributes nothing once it is zero.
_HOMOGENEOUS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "expand",
        "clone",
        "_to_copy",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "unbind",
        "chunk",
        "alias",
        "detach",
        "contiguous",
        "flatten",
        "unflatten",
        "mul",
        "div",
        "neg",
        "mul_",
        "div_",
        "dropout",
        "native_dropout",
        "as_strided",
    ]
)
# Operations that look at the shape of their input, not at its numbers.
_SHAPE_ONLY = frozenset(["new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like", "empty_like", "full_like"])
_ADDITIONS = frozenset({"add", "add_", "sub", "sub_"})


@dataclass
class Traced:
    """What one module did during the call."""

    name: str
    module: nn.Module
    calls: int = 0
    arguments: list[tuple[Source, Tensor]] = field(default_factory=list)  # tensor arguments in order
    output: Any = None
    macs: int = 0  # of the whole call, all samples
    is_branch: bool = False  # its output is added to something, and used in no other way
    shortcut: tuple[str, float] | None = None  # child on the skip path, and the scale of its contribution
    given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # all its arguments
    operations: range = range(0)  # what ran inside it, as numbers of the dataflow
    is_written: bool = False  # numbers of its output are changed in place later on, so it must not be what others read
    axes: dict[int, int] = field(default_factory=dict)  # rank of a tensor -> where its channels are, where a map inside tells

    def channel_axis(self, ndim: int) -> int:
        """Where tensors of this rank have their channels: as the first map inside has them, else as their rank has them."""
        return self.axes.get(ndim, channel_axis(ndim, {}) if ndim else 0) % max(ndim, 1)

    def axis_options(self, ndim: int) -> dict[str, int]:
        """What a stand-in's options have to say of that: nothing, where it goes by rank."""
        axis = self.channel_axis(ndim)
        return {} if axis == channel_axis(ndim, {}) else {"axis": 1 if axis == 1 else -1}


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor of a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


@contextmanager
def reads_noted(denoiser: nn.Module) -> Iterator[set[str]]:
    """The paths of the denoiser's modules that any code asks their parents for while the block runs.

    What a list holds counts with the list: which of it is taken out leaves no mark.
    """
    paths = {id(module): name for name, module in denoiser.named_modules()}
    found, get = set[str](), nn.Module.__getattr__

    def noting(module: nn.Module, name: str) -> Any:
        value = get(module, name)
        if isinstance(value, nn.Module) and id(module) in paths:
            path = f"{paths[id(module)]}.{name}".lstrip(".")
            found.update([path, *(f"{path}.{inside}" for inside in value._modules if isinstance(value, _INDEXED))])
        return value

    nn.Module.__getattr__ = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.__getattr__ = get  # type: ignore[method-assign]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every tensor that a module gives, to see how it is used.

    Each tensor is kept alive until the end, so that its id stays its own; on the meta device that holds no memory.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.root = root
        self.traced: dict[str, Traced] = {}
        self.dataflow = Dataflow()
        self.asked: set[str] = set()
        self._written: dict[int, int] = {}  # memory -> the last operation that changed it in place
        self._views: dict[int, set[int]] = {}  # memory -> the tensors that are views of it
        self._keep: list[Any] = []
        self._makers: dict[int, set[str]] = {}  # tensor -> modules whose output it is, through homogeneous operations
        self._added: set[str] = set()
        self._used_otherwise: set[str] = set()
        self._summands: dict[int, list[int]] = {}  # sum -> the two tensors added
        self._scaled: dict[int, tuple[int, float]] = {}  # tensor -> the tensor it is a multiple of, and the factor

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.root.named_modules():
                enter = module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                leave = module.register_forward_hook(self._leave(name), with_kwargs=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
                module.__dict__["parameters"] = self._asked(name, module.parameters)
                stack.callback(module.__dict__.pop, "parameters")
            yield

    def _asked(self, name: str, parameters: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            self.asked.add(name)
            return parameters(*args, **kwargs)

        return asked

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            traced = self.traced.setdefault(name, Traced(name, module))
            traced.calls += 1
            traced.arguments = _named_tensors(module, args, kwargs)
            traced.given = (args, kwargs)
            traced.operations = range(len(self.dataflow), len(self.dataflow))
            self._keep.append((args, kwargs))

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.traced[name].output = output
            self.traced[name].operations = range(self.traced[name].operations.start, len(self.dataflow))
            self._keep.append(output)
            for tensor in tensors_in(output):
                self._makers.setdefault(id(tensor), set()).add(name)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._keep.append((args, kwargs, output))  # what was read too, such as a constant: another would get its id
        for tensor in tensors_in((args, kwargs, output)):
            self._views.setdefault(_memory(tensor), set()).add(id(tensor))
        changed: set[int] = set()  # what is written in place is made anew, and so is every other view of that memory
        for place, argument in enumerate(func._schema.arguments[: len(args)]):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for memory in map(_memory, tensors_in(args[place])):
                    self._written[memory] = len(self.dataflow)
                    changed |= self._views[memory]
        self._follow(func.overloadpacket.__name__, args, kwargs or {}, output, changed)
        return output

    def _follow(self, operation: str, args: Any, kwargs: Mapping[str, Any], output: Any, changed: set[int]) -> None:
        inputs = tensors_in((args, kwargs))
        read = [] if operation in _SHAPE_ONLY else inputs
        self.dataflow.add((id(tensor) for tensor in read), changed | {id(tensor) for tensor in tensors_in(output)})
        makers = set().union(*(self._makers.get(id(tensor), set()) for tensor in inputs))
        if operation in _ADDITIONS:
            self._added |= makers
            self._makers.pop(id(output), None)  # an addition in place makes a new value of an old tensor
            self._summands[id(output)] = [id(tensor) for tensor in inputs]
        elif operation in _HOMOGENEOUS:
            for tensor in tensors_in(output):
                self._makers[id(tensor)] = self._makers.get(id(tensor), set()) | makers
            if operation in {"mul", "div"} and len(args) == 2 and isinstance(args[1], int | float):
                self._scaled[id(output)] = (id(args[0]), float(args[1]) if operation == "mul" else 1 / float(args[1]))
        else:
            self._used_otherwise |= makers

    def finish(self, output: Any) -> None:
        self.dataflow.outputs = [id(tensor) for tensor in tensors_in(output)]
        for tensor in self.dataflow.outputs:
            self._used_otherwise |= self._makers.get(tensor, set())
        for name, traced in self.traced.items():
            traced.is_branch = name in self._added - self._used_otherwise
            traced.shortcut = self._find_shortcut(traced)
            ended = traced.operations.stop
            traced.is_written = any(self._written.get(_memory(tensor), -1) >= ended for tensor in tensors_in(traced.output))
        self._find_axes()

    def _find_axes(self) -> None:
        """Tell every module where its tensors have their channels: as the first map or normalisation inside it has them, or
        else, as for an activation, the nearest module around it of which that is known.
        """
        for name, traced in self.traced.items():
            axis = _axis_of(traced.module)
            if axis is None:
                continue
            for ndim in {tensor.ndim for tensor in tensors_in(traced.output)}:
                for around in self._around(name):
                    around.axes.setdefault(ndim, axis)
        for name, traced in self.traced.items():
            for ndim in {tensor.ndim for tensor in tensors_in(traced.output)} - traced.axes.keys():
                known = next((around.axes[ndim] for around in self._around(name) if ndim in around.axes), None)
                if known is not None:
                    traced.axes[ndim] = known

    def _around(self, name: str) -> Iterator[Traced]:
        """What was called of a module and those that it lies in, the innermost first."""
        while True:
            if name in self.traced:
                yield self.traced[name]
            if not name:
                return
            name = name.rpartition(".")[0]

    def _find_shortcut(self, block: Traced) -> tuple[str, float] | None:
        """The child of `block` that maps the block's input onto one summand of the block's output, if there is one."""
        if not isinstance(block.output, Tensor) or not block.arguments:
            return None
        total, scale = self._unscaled(id(block.output))
        for summand in self._summands.get(total, []):
            tensor, factor = self._unscaled(summand)
            for name in sorted(self._makers.get(tensor, set())):
                child = self.traced[name]
                inside = name.startswith(block.name + ".") and id(child.output) == tensor
                if inside and child.arguments and child.arguments[0][1] is block.arguments[0][1]:
                    return name[len(block.name) + 1 :], scale * factor
        return None

    def _unscaled(self, tensor: int) -> tuple[int, float]:
        scale = 1.0
        while tensor in self._scaled:
            tensor, factor = self._scaled[tensor]
            scale *= factor
        return tensor, scale


_INDEXED = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def _memory(tensor: Tensor) -> int:
    """Which memory a tensor is a view of."""
    return int(tensor.untyped_storage()._cdata)


def _axis_of(module: nn.Module) -> int | None:
    """Where a single map or normalisation has its channels; None for a module that does not tell."""
    if isinstance(module, _CHANNELS_SECOND):
        return 1
    weight = module._parameters.get("weight")
    return -1 if isinstance(module, nn.Linear | nn.Embedding) or (weight is not None and weight.ndim == 1) else None


def _named_tensors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Source, Tensor]]:
    """Tensor arguments as `([position, keyword], tensor)`, in the order of the module's own signature."""
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [([i, names[i] if i < len(names) else f"#{i}"], value) for i, value in enumerate(args)]
    named += [([names.index(key) if key in names else -1, key], value) for key, value in kwargs.items()]
    return [(source, value) for source, value in named if isinstance(value, Tensor)]
