"""Prune latent diffusion models by what each operator does to the generated latents.

    import ldpruner

    pruned = ldpruner.prune("zoo:fashion", budget={"latency": "65%"})
    pruned.save_pretrained("fashion-65")

Importing this brings neither torch nor diffusers: names are imported when they are first used. It does tell diffusers how
to load pruned models, should diffusers be imported too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ldpruner import _imports
from ldpruner.errors import LDPrunerError
from ldpruner.plans import Budget, Edit, Plan
from ldpruner.probes import Probe

if TYPE_CHECKING:
    from ldpruner.artifacts import save, save_distilled
    from ldpruner.benchmarking import benchmark, compare_calls
    from ldpruner.evaluation import Evaluation, FeatureNet, evaluate
    from ldpruner.operators import discover, example_call
    from ldpruner.pipelines import Pipeline, load
    from ldpruner.planning import plan
    from ldpruner.recovery import Distillation, distil
    from ldpruner.scoring import Run, score
    from ldpruner.surgery import prune_, trial
    from ldpruner.workflow import Pruned, apply, prune

__version__ = "0.1.0"

_LAZY = {
    "Distillation": "recovery",
    "Evaluation": "evaluation",
    "FeatureNet": "evaluation",
    "Pipeline": "pipelines",
    "Pruned": "workflow",
    "Run": "scoring",
    "apply": "workflow",
    "benchmark": "benchmarking",
    "compare_calls": "benchmarking",
    "discover": "operators",
    "distil": "recovery",
    "evaluate": "evaluation",
    "example_call": "operators",
    "load": "pipelines",
    "plan": "planning",
    "prune": "workflow",
    "prune_": "surgery",
    "save": "artifacts",
    "save_distilled": "artifacts",
    "score": "scoring",
    "trial": "surgery",
}

__all__ = [
    "Budget",
    "Distillation",
    "Edit",
    "Evaluation",
    "FeatureNet",
    "LDPrunerError",
    "Pipeline",
    "Plan",
    "Probe",
    "Pruned",
    "Run",
    "apply",
    "benchmark",
    "compare_calls",
    "discover",
    "distil",
    "evaluate",
    "example_call",
    "load",
    "plan",
    "prune",
    "prune_",
    "save",
    "save_distilled",
    "score",
    "trial",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ldpruner' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ldpruner.{_LAZY[name]}"), name)


_imports.arrange()
