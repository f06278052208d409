"""Which operators to replace: by a ranking or by an exact program, and the predicted cost of what is left."""

from ldpruner.selection.choice import Choice, choose, options_of, predict, reachable, share
from ldpruner.selection.priors import Priors
from ldpruner.selection.rankings import OBJECTIVES, RANKINGS, SWEEP, Objective, Option, selections_of

__all__ = [
    "OBJECTIVES",
    "RANKINGS",
    "SWEEP",
    "Choice",
    "Objective",
    "Option",
    "Priors",
    "choose",
    "options_of",
    "predict",
    "reachable",
    "selections_of",
    "share",
]
