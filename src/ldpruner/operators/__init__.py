"""Operators of a denoiser, found by tracing one call: no table of class names."""

from ldpruner.operators.discovery import discover
from ldpruner.operators.examples import EXAMPLES, example_call
from ldpruner.operators.tracing import Call, architecture, meta_copy

__all__ = ["EXAMPLES", "Call", "architecture", "discover", "example_call", "meta_copy"]
