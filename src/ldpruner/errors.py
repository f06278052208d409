"""One family of errors. Each is also the builtin that a caller would expect, and says where, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LDPrunerError(Exception):
    """Anything that the user can mend; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class PipelineError(LDPrunerError, ValueError):
    """A model that cannot be loaded, or cannot be run as a diffusion pipeline."""


class OperatorError(LDPrunerError, LookupError):
    """An operator that the denoiser does not have, or a replacement that does not fit it."""


class BudgetError(LDPrunerError, ValueError):
    """A budget that is malformed or out of reach."""


class PlanError(LDPrunerError, ValueError):
    """A plan that cannot be read, or that was made for another model."""


class RunError(LDPrunerError, ValueError):
    """A run folder that cannot be read, or that belongs to another model or probe."""


class ArtifactError(LDPrunerError, OSError):
    """A file or folder that cannot be written, or a form that cannot hold a plan."""


class HubError(LDPrunerError, OSError):
    """The Hub does not have, does not take or does not answer what was asked."""


class DataError(LDPrunerError, ValueError):
    """Training or reference data that is missing or unreadable."""


class RecipeError(LDPrunerError, ValueError):
    """A recipe that cannot be read, or that says what no recipe can."""


class UnknownNameError(LDPrunerError, LookupError):
    """A name that no registry entry has."""


def suggest(name: str, known: Iterable[str]) -> str:
    """A clause that names the nearest known names, or all of them when none is near and they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(names)}" if len(names) <= 12 else f"none of {len(names)} known names is near"
