"""How much each operator matters: one scorer per file, one engine that runs, stores and resumes them."""

from ldpruner.scoring import (
    bk_sdm,
    block_influence,
    chance,
    diff_pruning,
    ends_and_spread,
    fast,
    latent,
    magnitude,
    output_mse,
    screen,
    taylor,
)
from ldpruner.scoring.agreement import rank_agreement
from ldpruner.scoring.base import SCORERS, Asked, Scorer
from ldpruner.scoring.engine import Run, score

__all__ = [
    "SCORERS",
    "Asked",
    "Run",
    "Scorer",
    "bk_sdm",
    "block_influence",
    "chance",
    "diff_pruning",
    "ends_and_spread",
    "fast",
    "latent",
    "magnitude",
    "output_mse",
    "rank_agreement",
    "score",
    "screen",
    "taylor",
]
