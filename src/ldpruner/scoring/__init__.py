"""How much each operator matters: one scorer per file, one engine that runs, stores and resumes them."""

from ldpruner.scoring import latent
from ldpruner.scoring.base import SCORERS, Scorer
from ldpruner.scoring.engine import Run, score

__all__ = ["SCORERS", "Run", "Scorer", "latent", "score"]
