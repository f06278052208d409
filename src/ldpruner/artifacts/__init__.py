"""A pruned pipeline on disk: a diffusers folder in one of three forms, beside the plan and the record of how it was made."""

from ldpruner.artifacts.dense import densify
from ldpruner.artifacts.folder import save, save_denoiser, save_distilled
from ldpruner.forms import FORMS, check_form, loading_lines

__all__ = ["FORMS", "check_form", "densify", "loading_lines", "save", "save_denoiser", "save_distilled"]
