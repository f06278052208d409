"""One call of a denoiser, watched: what every module takes and gives, and which outputs are only ever added to something.

The call runs on the meta device, on a copy that holds shapes and no weights: it costs neither memory nor arithmetic, and
counts multiplications that PyTorch's counter misses on a CPU. A few classes look at numbers on their way, and run with them.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ldpruner.errors import PipelineError
from ldpruner.ldpruner_v1 import channel_axis
from ldpruner.operators.dataflow import Dataflow

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Call:
    """The arguments of one denoiser call, as the pipeline made it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: str) -> Call:
        """The same call with every tensor on `device`; on "meta" only shapes are left."""
        return self._with(lambda tensor: tensor.to(device))

    def copied(self) -> Call:
        """The same call with copies of its tensors."""
        return self._with(Tensor.clone)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Call:
        args, kwargs = tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs))
        return Call(args, kwargs)

    def of_rows(self, rows: Sequence[int]) -> Call:
        """The call with these of its rows, as often as they are named: of every tensor that has as many as there are samples."""
        batch, places = self.batch, torch.tensor(rows, dtype=torch.long)
        if list(rows) == list(range(batch)):
            return self
        return self._with(lambda leaf: leaf[places.to(leaf.device)] if leaf.ndim and len(leaf) == batch else leaf)

    def run(self, denoiser: nn.Module) -> Any:
        return denoiser(*self.args, **self.kwargs)

    @property
    def nbytes(self) -> int:
        """What its tensors take."""
        return sum(leaf.nbytes for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor))

    @property
    def batch(self) -> int:
        """How many samples go through the denoiser at once; guidance doubles them."""
        return 1 if self._latents is None else len(self._latents)

    @property
    def guided(self) -> bool:
        """Whether the same latents are given twice, without their prompts and then with them, as guidance has it."""
        if self._latents is None or len(self._latents) % 2:
            return False
        return torch.equal(*self._latents.chunk(2))

    @property
    def _latents(self) -> Tensor | None:
        leaves = tree_flatten((self.args, self.kwargs))[0]
        return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1), None)


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


def meta_copy(denoiser: nn.Module) -> nn.Module:
    """A copy of the structure whose parameters and buffers are on the meta device; no weight is copied."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.detach().to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    return copy.deepcopy(denoiser, memo)


def shared_copy(denoiser: nn.Module) -> nn.Module:
    """A copy of the structure that holds the very same parameters and buffers."""
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())})


def dry_run(denoiser: nn.Module, call: Call) -> Any:
    """What a call gives, without arithmetic: on the meta device, or with numbers where that cannot be."""
    with torch.no_grad():
        try:
            return call.to("meta").run(meta_copy(denoiser).to("meta"))
        except Exception as error:  # whatever the denoiser's own code raises, it may be that it looks at numbers
            if on_meta(denoiser):
                raise
            log.info("%s runs with numbers, as without them: %s", type(denoiser).__name__, error)
            return call.copied().run(denoiser)


def architecture(denoiser: nn.Module) -> str:
    """A fingerprint of class, parameter names and shapes: equal for every set of weights of one architecture."""
    lines = [type(denoiser).__name__, *(f"{name} {tuple(p.shape)}" for name, p in denoiser.named_parameters())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_digest(denoiser: nn.Module) -> str:
    """A fingerprint of every weight: scores belong to weights, not only to an architecture."""
    digest = hashlib.sha256(architecture(denoiser).encode())
    for parameter in denoiser.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class Trace:
    """What every called module did, by dotted path in calling order, and how their operations hang together."""

    modules: dict[str, Traced]
    dataflow: Dataflow
    macs: int  # of the whole call, all samples
    ran_in: nn.Module  # what was called: a copy that holds shapes, or the denoiser itself
    asked: frozenset[str]  # modules that were asked for their parameters, as for the dtype of the first

    @property
    def has_numbers(self) -> bool:
        """Whether the call had to be made with numbers, as the denoiser's own code looks at them."""
        return not on_meta(self.ran_in)


def trace(denoiser: nn.Module, call: Call) -> Trace:
    """Watch one call: on the meta device, or, where the denoiser's own code looks at numbers, as masks and indices, with them.

    With numbers it costs a call and the memory of all that it makes on the way. Raises `PipelineError` where neither runs.
    """
    try:
        return _traced((denoiser if on_meta(denoiser) else meta_copy(denoiser)).requires_grad_(False), call.to("meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        if on_meta(denoiser):
            raise PipelineError(f"{type(denoiser).__name__}: its call cannot be traced without weights ({error}).") from error
        log.info("%s is traced with numbers, as without them: %s", type(denoiser).__name__, error)
        return _traced(denoiser, call.copied())


@torch.inference_mode(mode=False)  # inside it, PyTorch hides the parts of composite operations from who watches
def _traced(ran_in: nn.Module, call: Call) -> Trace:
    watch = _Watch(ran_in)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, watch, watch.hooked(), _attention_in_parts(ran_in):
        output = call.run(ran_in)
    watch.finish(output)
    flops = counter.get_flop_counts()
    root = type(ran_in).__name__
    for name, traced in watch.traced.items():
        traced.macs = sum(flops.get(f"{root}.{name}" if name else root, {}).values()) // 2
    return Trace(watch.traced, watch.dataflow, int(counter.get_total_flops()) // 2, ran_in, frozenset(watch.asked))


def _attention_in_parts(ran_in: nn.Module) -> AbstractContextManager[None]:
    """On a CPU, where PyTorch's counter does not know fused attention: have attention written out."""
    return sdpa_kernel(SDPBackend.MATH) if device_type(ran_in) == "cpu" else nullcontext()


def device_type(module: nn.Module) -> str:
    return next((tensor.device.type for tensor in module.parameters()), "cpu")


def on_meta(module: nn.Module) -> bool:
    """Whether a module holds shapes and no numbers."""
    return device_type(module) == "meta"


def count_macs(denoiser: nn.Module, call: Call) -> int:
    """Multiply-accumulates of one denoiser call for one sample, half of the floating-point operations that PyTorch counts."""
    return trace(denoiser, call).macs // call.batch


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor of a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        self._keep.append(output)
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
            for name in self._makers.get(tensor, set()):
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
