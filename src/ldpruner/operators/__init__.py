"""Operators of a denoiser, found by tracing one call: no table of class names."""

from ldpruner.operators.discovery import discover
from ldpruner.operators.tracing import Call, architecture, meta_copy

__all__ = ["Call", "architecture", "discover", "meta_copy"]
