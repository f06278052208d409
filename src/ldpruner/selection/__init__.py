"""Which operators to replace: by a ranking or by an exact program, and the predicted cost of what is left."""

from ldpruner.selection.choice import Choice, choice_of, choose, chosen_in, options_of, predict, reachable, share
from ldpruner.selection.priors import Priors
from ldpruner.selection.rankings import OBJECTIVES, PLAIN_SWEEP, RANKINGS, SWEEP, Option, selections_of

__all__ = [
    "OBJECTIVES",
    "PLAIN_SWEEP",
    "RANKINGS",
    "SWEEP",
    "Choice",
    "Option",
    "Priors",
    "choice_of",
    "choose",
    "chosen_in",
    "options_of",
    "predict",
    "reachable",
    "selections_of",
    "share",
]
