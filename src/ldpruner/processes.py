"""Several processes at one task, as torchrun or accelerate starts them: who does what, and what all of them found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from ldpruner.errors import RunError

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # how long one process waits for what another is still measuring


@dataclass(frozen=True)
class Crew:
    """The processes of one run, seen from number `rank` of `size`; by default there is this one alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls, *, cpu: bool) -> Crew:
        """The crew that this process was started in; `cpu` says that they compute on the processor.

        Raises `RunError` where accelerate was asked for several processes and has started one.
        """
        check_launch("score")
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState  # takes a second to import

        state = PartialState(cpu=cpu, timeout=PATIENCE)
        return cls(rank=state.process_index, size=state.num_processes)

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints, and writes what all share."""
        return self.rank == 0

    def share(self, tasks: Sequence[T], *, done: int = 0) -> Sequence[T]:
        """The tasks of this process: every `size`-th, in turn after as many as were shared out before."""
        return tasks[(self.rank - done) % self.size :: self.size]

    def gathered(self, found: dict[Any, T]) -> dict[Any, T]:
        """What all processes found, in each of them; waits until all have."""
        if self.size == 1:
            return found
        from torch import distributed

        parts: list[dict[Any, T]] = [{} for _ in range(self.size)]
        distributed.all_gather_object(parts, found)
        return {key: value for part in parts for key, value in part.items()}

    def leaders(self, thing: T | None) -> T:
        """The thing that the leading process gives, in all of them."""
        return next(iter(self.gathered({"": thing} if self.leads else {}).values()))  # type: ignore[return-value]

    def leave(self) -> None:
        """End this process's part."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


def check_launch(command: str) -> None:
    """Raise `RunError` where accelerate was asked for several processes and has started one: on a CPU it leaves that to MPI."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if asked and not os.environ.keys() & {"RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}:
        raise RunError(
            "`accelerate launch --cpu` starts one process, however many are asked for, unless MPI starts the others. "
            f"Say torchrun --nproc_per_node N -m ldpruner {command} ... --device cpu."
        )
