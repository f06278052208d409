"""One call of a denoiser, traced.

The call runs on the meta device, on a copy that holds shapes and no weights: it costs neither memory nor arithmetic, and
counts multiplications that PyTorch's counter misses on a CPU. A few classes look at numbers on their way, and run with them.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ldpruner.errors import PipelineError
from ldpruner.operators.dataflow import Dataflow
from ldpruner.operators.watching import Traced, Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """The arguments of one denoiser call, as the pipeline made it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    read: frozenset[str] = frozenset()  # paths of modules that the pipeline's own code read to make it

    def to(self, device: str) -> Call:
        """The same call with every tensor on `device`; on "meta" only shapes are left."""
        return self._with(lambda tensor: tensor.to(device))

    def copied(self) -> Call:
        """The same call with copies of its tensors."""
        return self._with(Tensor.clone)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Call:
        args, kwargs = tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs))
        return Call(args, kwargs, self.read)

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
        return _traced(meta_copy(denoiser).requires_grad_(False), call.to("meta"))
    except Exception as error:  # whatever the denoiser's own code raises, it may be that it looks at numbers
        if on_meta(denoiser):
            raise PipelineError(f"{type(denoiser).__name__}: its call cannot be traced without weights ({error}).") from error
        log.info("%s is traced with numbers, as without them: %s", type(denoiser).__name__, error)
    try:
        return _traced(denoiser, call.copied())
    except Exception as error:
        raise PipelineError(f"{type(denoiser).__name__}: its call cannot be traced ({error}).") from error


@torch.inference_mode(mode=False)  # inside it, PyTorch hides the parts of composite operations from who watches
def _traced(ran_in: nn.Module, call: Call) -> Trace:
    watch = Watch(ran_in)
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
