"""Getting quality back: repair in closed form, and distillation from the original.

Names are imported when they are first used: the command line reads the settings of a distillation without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldpruner.recovery.closed_form import repair
    from ldpruner.recovery.distillation import Distilled, distil
    from ldpruner.recovery.latents import FIRST_SEED
    from ldpruner.recovery.launching import leave_processes
    from ldpruner.recovery.settings import Distillation

_LAZY = {
    "FIRST_SEED": "latents",
    "Distillation": "settings",
    "Distilled": "distillation",
    "distil": "distillation",
    "leave_processes": "launching",
    "repair": "closed_form",
}

__all__ = ["FIRST_SEED", "Distillation", "Distilled", "distil", "leave_processes", "repair"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ldpruner.recovery' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ldpruner.recovery.{_LAZY[name]}"), name)
