"""What `import ldpruner` does to the import system: it teaches diffusers to load pruned models, without importing it.

Diffusers looks a loader up by the name in a model's config.json. Ours has to be on file before that, but importing torch
and diffusers takes seconds, so it is filed at the moment when diffusers' own table of loaders is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "diffusers.quantizers.auto"
FORMAT_MODULE = "ldpruner_v1"


def arrange() -> None:
    """File the loader now if diffusers is ready for it, else as soon as it is."""
    _alias()
    if TABLE in sys.modules:
        importlib.import_module(f"ldpruner.{FORMAT_MODULE}")
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def _alias() -> None:
    """Let `ldpruner_v1`, the library that portable folders name, mean our copy of that file; it runs on first use."""
    if FORMAT_MODULE not in sys.modules:
        sys.modules[FORMAT_MODULE] = _Alias(FORMAT_MODULE)


class _Alias(ModuleType):
    """Gives the attributes of `ldpruner.ldpruner_v1`, which it imports when the first one is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(f"ldpruner.{FORMAT_MODULE}"), name)


class _TableFinder(MetaPathFinder):
    """Finds nothing itself; it wraps the loader of diffusers' table, once."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _TableLoader(spec.loader)
        return spec


class _TableLoader(Loader):
    """Loads diffusers' table as its own loader would, then files ours."""

    def __init__(self, original: Loader) -> None:
        self.original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.original.exec_module(module)
        importlib.import_module(f"ldpruner.{FORMAT_MODULE}")
