"""Which operators to replace: by a ranking or by an exact program, and the predicted cost of what is left."""

from ldpruner.selection.choice import Choice, choose, predict, reachable, share
from ldpruner.selection.priors import Priors
from ldpruner.selection.rankings import OBJECTIVES, RANKINGS, SWEEP, Option, selections_of

__all__ = [
    "OBJECTIVES",
    "RANKINGS",
    "SWEEP",
    "Choice",
    "Option",
    "Priors",
    "choose",
    "predict",
    "reachable",
    "selections_of",
    "share",
]
