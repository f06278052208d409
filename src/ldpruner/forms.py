"""The forms in which a pruned pipeline is saved, and how each is loaded. No torch."""

from __future__ import annotations

from ldpruner.errors import UnknownNameError, suggest

FORMS = {
    "portable": "loads in plain diffusers with trust_remote_code=True, nothing to install",
    "plugin": "loads in plain diffusers after `import ldpruner`, no code in the folder",
    "dense": "loads anywhere with the same output, at the original's size and speed",
}


def check_form(form: str) -> None:
    """Raise `UnknownNameError` for a form that does not exist."""
    if form not in FORMS:
        raise UnknownNameError(f"form {form!r} is unknown: {suggest(form, FORMS)}")


def loading_lines(out: str, form: str) -> str:
    """The lines of Python that load a saved folder in plain diffusers."""
    trust = ", trust_remote_code=True" if form == "portable" else ""
    first = "import ldpruner\n" if form == "plugin" else ""
    return f'{first}from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{out}"{trust})'
