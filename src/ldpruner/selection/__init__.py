"""Which operators to replace: a ranking per strategy, one rule for nesting, and the predicted cost of what is left."""

from ldpruner.selection.choice import Choice, choose, predict, reachable, share
from ldpruner.selection.priors import Priors
from ldpruner.selection.rankings import RANKINGS, SWEEP, Option, rankings_of

__all__ = ["RANKINGS", "SWEEP", "Choice", "Option", "Priors", "choose", "predict", "rankings_of", "reachable", "share"]
