"""The samples of a step: drawn by their number alone, whichever process computes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldpruner.operators.tracing import Call
from ldpruner.recovery.conditioning import Caller
from ldpruner.recovery.noising import Noising
from ldpruner.recovery.rows import Named, Rows


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One forward pass: the denoiser's call, and what it should answer for the first `len(target)` samples.

    With guidance the same noisy latents stand in the call a second time, without a prompt.
    """

    call: Call
    target: Tensor  # (n, ...)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What chance decides of one sample."""

    row: int
    at: int  # training timestep
    dropped: bool
    noise: Tensor

    @classmethod
    def of(cls, seed: int, step: int, sample: int, *, rows: int, times: int, dropout: float, shape: tuple[int, ...]) -> Draw:
        """The draw of sample number `sample` of step `step`, the same whenever and wherever it is made.

        Philox (Salmon et al., SC 2011) is a function of a key and a counter: every sample has its own stretch of counters.
        """
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sample, step]))
        return cls(
            row=int(random.integers(rows)),
            at=int(random.integers(times)),
            dropped=bool(random.random() < dropout),
            noise=torch.from_numpy(random.standard_normal(shape, dtype=np.float32)),
        )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Makes the batches of a step for one process."""

    latents: Rows
    prompt_of: Sequence[int]  # row of latents -> row of conditions; empty where the pipeline takes no prompts
    conditions: Rows  # row 0 belongs to the empty prompt
    caller: Caller
    noising: Noising
    seed: int
    dropout: float
    batch_size: int
    accumulation: int
    with_unconditional: bool
    device: torch.device

    def of_step(self, step: int, process: int) -> Iterator[Batch]:
        """The batches of one process: its stretch of the step's samples, cut up for gradient accumulation."""
        first = process * self.batch_size * self.accumulation
        for start in range(first, first + self.batch_size * self.accumulation, self.batch_size):
            yield self._batch([self._draw(step, sample) for sample in range(start, start + self.batch_size)])

    def probing(self) -> Batch:
        """A batch of one sample."""
        return self._batch([self._draw(0, 0)])

    def _draw(self, step: int, sample: int) -> Draw:
        return Draw.of(
            self.seed,
            step,
            sample,
            rows=len(self.latents),
            times=len(self.noising),
            dropout=self.dropout,
            shape=self.latents.shapes["latents"],
        )

    def _batch(self, draws: Sequence[Draw]) -> Batch:
        clean = self.latents.take([draw.row for draw in draws])["latents"].to(self.device)
        noise = torch.stack([draw.noise for draw in draws]).to(self.device)
        at = torch.tensor([draw.at for draw in draws], device=self.device)
        prompts = [0 if draw.dropped else self.prompt_of[draw.row] for draw in draws] if self.prompt_of else []
        noisy, timesteps = self.noising.noisy(clean, noise, at), self.noising.timesteps[at]
        if self.with_unconditional:
            noisy, timesteps, prompts = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), prompts + [0] * len(draws)
        call = self.caller.call(noisy, timesteps, self._conditions(prompts))
        return Batch(call=call, target=self.noising.target(clean, noise, at))

    def _conditions(self, prompts: Sequence[int]) -> Named:
        return {name: tensor.to(self.device) for name, tensor in self.conditions.take(prompts).items()} if prompts else {}
