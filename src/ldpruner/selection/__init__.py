"""Which operators to replace: by a ranking or by an exact program, and the predicted cost of what is left."""

from ldpruner.selection.choice import Choice, choice_of, choose, chosen_in, options_of, predict, predict_edits, reachable, share
from ldpruner.selection.priors import Priors
from ldpruner.selection.rankings import IMPROVED, OBJECTIVES, RANKINGS, SWEEP, Option, selections_of
from ldpruner.selection.tables import Row, price_table, priced

__all__ = [
    "IMPROVED",
    "OBJECTIVES",
    "RANKINGS",
    "SWEEP",
    "Choice",
    "Option",
    "Priors",
    "Row",
    "choice_of",
    "choose",
    "chosen_in",
    "options_of",
    "predict",
    "predict_edits",
    "price_table",
    "priced",
    "reachable",
    "selections_of",
    "share",
]
