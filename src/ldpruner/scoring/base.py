"""What every scorer is asked and promises, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol

from ldpruner.originals import Original
from ldpruner.pipelines import Pipeline
from ldpruner.plans import Edit, Operators, Quantity, Score
from ldpruner.probes import Probe
from ldpruner.processes import Crew
from ldpruner.registry import Registry
from ldpruner.scoring.ledger import Ledger
from ldpruner.surgery import Fitted

Targets = Mapping[Quantity, float]  # shares of what the original costs
CUTS = (0.80, 0.65, 0.50)  # shares that scores are for where no budget was named


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Edits of a pipeline to be scored, the generations that are to judge them, and what the scores are for."""

    pipeline: Pipeline
    edits: Sequence[Edit]
    probe: Probe
    fitted: Fitted = field(default_factory=dict)
    batch_size: int | None = None  # samples in one denoiser call, all of them by default
    operators: Operators | None = None  # what each edit saves
    targets: tuple[Targets, ...] = ()  # the budgets that plans will be made for
    edits_at_once: int = 1  # in one denoiser call, where a scorer gives each few samples, see `side_by_side`
    crew: Crew = field(default_factory=Crew)  # the processes that share the work
    ledger: Ledger = field(default_factory=Ledger)  # what was measured before

    @cached_property
    def original(self) -> Original:
        """What the pipeline generates unchanged; first asked for while nothing is changed."""
        return Original.of(self.pipeline)

    @property
    def mine(self) -> Sequence[Edit]:
        """The edits that this process is to score, where each is scored by itself."""
        return self.crew.share(self.edits)


class Scorer(Protocol):
    """Scores edits. The engine never asks which scorer it holds."""

    budgeted: ClassVar[bool] = False  # whether scores depend on the targets that they are for

    def cost(self, edits: int, probe: Probe) -> int:
        """Denoiser passes of one sample that so many edits cost at most; 0 where they are too few to prepare for."""
        return 0

    def few_samples(self, probe: Probe) -> int:
        """How many samples of one edit go through a denoiser call, where several edits may; 0 where they may not."""
        return 0

    def scores(self, asked: Asked) -> Iterator[Score]:
        """One score per edit, in order, each given out as soon as it is known; the denoiser is as before in between.

        Of several processes each may give those of its own edits (`asked.mine`), or all.
        """
        ...


SCORERS: Registry[Callable[[], Scorer]] = Registry("scoring method")
