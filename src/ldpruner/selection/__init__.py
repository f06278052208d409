"""Which operators to replace: by a ranking or by an exact program, and the predicted cost of what is left."""

from ldpruner.selection.choice import Choice, choose, predict, predict_edits, reachable, share
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
    "predict_edits",
    "reachable",
    "selections_of",
    "share",
]
