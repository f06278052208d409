"""What is generated to compare two denoisers: how many samples, from which noise, in how many steps. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ldpruner.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The generations that judge a change. Sample i starts from noise seeded with `seed + i`, whatever the batch size.

    The paper compares generated latents (LD-Pruner, arXiv 2404.11936) and does not fix these numbers; more samples and
    steps cost proportionally more and settle the order of operators that score alike.
    """

    samples: int = 16
    num_inference_steps: int = 10
    seed: int = 0
    prompts: tuple[str, ...] = ()  # sample i takes prompt i, in turn; unconditional pipelines take none
    guidance_scale: float | None = None  # None: what the pipeline uses by default
    solver: str | None = None  # None: the pipeline's own scheduler; else one of `solvers.SOLVERS`, which needs fewer steps
    call: Mapping[str, Any] = field(default_factory=dict)  # what else the pipeline's call is given, such as height; JSON

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RunError(f"samples={self.samples}: 1 or more are needed.")
        if self.num_inference_steps < 1:
            raise RunError(f"num_inference_steps={self.num_inference_steps}: 1 or more are needed.")

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"prompts": list(self.prompts), "call": dict(self.call)}
        return {name: value for name, value in data.items() if name not in {"solver", "call"} or value}  # as it was without them

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Probe:
        return cls(**{**data, "prompts": tuple(data["prompts"])})
