"""Getting quality back: repair in closed form, and distillation from the original."""

from ldpruner.recovery.closed_form import repair

__all__ = ["repair"]
