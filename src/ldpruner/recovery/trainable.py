"""Which weights of a student learn: all, some, or low-rank additions to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldpruner.errors import OperatorError, PlanError, RunError, suggest
from ldpruner.ldpruner_v1 import Shortcut, StandIn
from ldpruner.operators.tracing import Call, trace
from ldpruner.plans import within
from ldpruner.recovery.settings import Distillation
from ldpruner.surgery import removed_operators


class Learner:
    """A denoiser with its frozen weights frozen, and its adapters in place where there are any."""

    def __init__(self, denoiser: nn.Module, settings: Distillation, call: Call) -> None:
        self.denoiser = denoiser
        frozen = frozen_paths(denoiser, settings, call)
        denoiser.requires_grad_(True)
        self.adapters = None
        if settings.lora_rank:
            self.adapters = _with_adapters(denoiser, settings, frozen)
        for name, parameter in denoiser.named_parameters():
            if any(within(name, path) for path in frozen):
                parameter.requires_grad_(False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: parameter for name, parameter in self.denoiser.named_parameters() if parameter.requires_grad}

    def leave_unreached(self, loss: Callable[[], Tensor]) -> None:
        """Freeze what has no gradient: weights that no loss reaches would make processes wait for one another's."""
        loss().backward()  # type: ignore[no-untyped-call]
        for parameter in self.parameters().values():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        if not self.parameters():
            raise RunError("every weight that the losses reach is frozen: nothing would be learnt. Freeze less.")

    def finished(self) -> nn.Module:
        """The denoiser under its own class and parameter names, adapters added into the weights they adapt."""
        if self.adapters is not None:
            self.denoiser = self.adapters.merge_and_unload()
        return self.denoiser.requires_grad_(True).eval()


def frozen_paths(denoiser: nn.Module, settings: Distillation, call: Call) -> tuple[str, ...]:
    """Dotted paths of what stays as it is. Raises `OperatorError` for a path that the denoiser does not have."""
    known = {name for name, _ in denoiser.named_modules()} | {name for name, _ in denoiser.named_parameters()}
    for path in settings.freeze:
        if path not in known or not path:
            raise OperatorError(f"freeze {path!r}: is no part of this {type(denoiser).__name__}: {suggest(path, known - {''})}")
    return settings.freeze + (before_first_edit(denoiser, call) if settings.freeze_before_first_edit else ())


def before_first_edit(denoiser: nn.Module, call: Call) -> tuple[str, ...]:
    """The parameters of modules that have run by the time that the first edited operator does: no edit changes what they see.

    HierarchicalPrune and PPCL report that most of a drop is mended with early blocks left alone.
    """
    edits = removed_operators(denoiser)
    if not edits:
        raise PlanError("freeze_before_first_edit: nothing was removed from this student. Name paths with freeze.")
    order = list(trace(denoiser, call).modules)
    first = min((order.index(edit) for edit in edits if edit in order), default=len(order))
    early = [name for name in order[:first] if not any(within(edit, name) for edit in edits) and name]
    return tuple(f"{name}.{own}" for name in early for own, _ in denoiser.get_submodule(name).named_parameters(recurse=False))


def _with_adapters(denoiser: nn.Module, settings: Distillation, frozen: Iterable[str]) -> Any:
    """LoRA (arXiv 2106.09685) on every linear map and convolution that learns; stand-ins, which are small, learn whole."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise RunError("lora_rank needs peft: pip install 'ldpruner[recover]'.") from error
    ours = {name for name, part in denoiser.named_modules() if isinstance(part, StandIn) and not isinstance(part, Shortcut)}
    # where plain diffusers loaded the student, they are of classes that its folder brought along
    ours |= {name for name, entry in removed_operators(denoiser).items() if entry["replacement"] != "shortcut"}
    stand_ins = sorted(ours)
    names = [
        name
        for name, module in denoiser.named_modules()
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and not any(within(name, path) for path in (*stand_ins, *frozen))
        and f"{name}.weight" not in frozen
        and getattr(module, "groups", 1) == 1
    ]
    if not names and not stand_ins:
        raise RunError("lora_rank: no linear map or convolution is left to adapt. Freeze less.")
    exactly = "|".join(re.escape(name) for name in names)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(settings.seed)  # of the additions' first factors, the second are zero
        config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=f"({exactly})")
        adapters = LoraModel(denoiser, {"default": config}, "default")
    for name in stand_ins:
        denoiser.get_submodule(name).requires_grad_(True)
    return adapters
