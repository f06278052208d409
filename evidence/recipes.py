"""How students learn, where the command line does not say otherwise: all methods of a pipeline and budget alike."""

from __future__ import annotations

from typing import Any

GUIDE = "ld-pruner, ratio at 40%"
LEARNT_BY = ("distil_steps", "milestones", "learning_rate", "task_weight", "guide_budget", "autoguidance_scale")
RECIPES: dict[str, dict[str, Any]] = {
    name: dict(zip(LEARNT_BY, recipe, strict=True))
    for name, recipe in {
        "fashion": (400, [100, 200], 1e-4, 0.0, GUIDE, 1.4),
        "emoji": (1000, [250, 500], 5e-4, 1.0, None, 1.4),
        "digits": (1600, [400, 800], 5e-4, 0.0, GUIDE, 1.8),
    }.items()
}
LONGER: dict[tuple[str, str], dict[str, Any]] = {  # budgets after which more is to be learnt
    ("emoji", "50%"): {"distil_steps": 3000, "milestones": [500, 1000, 2000]},
}
