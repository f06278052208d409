"""The methods that are compared: each is a scorer, a rule of selection and priors, all of them the package's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from ldpruner.selection import Priors


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a method comes to its plan."""

    scorer: str
    selection: str = "order"
    priors: Priors = field(default_factory=Priors)


WAYS = {
    "ld-pruner, sweep": Way(scorer="paper", selection="sweep"),  # our default
    "ld-pruner": Way(scorer="paper"),  # the paper's: lowest score first
    "ld-pruner, ratio": Way(scorer="paper", selection="ratio"),
    "ld-pruner, spread": Way(scorer="paper", priors=Priors(apart=1)),
    "ld-pruner, ends kept": Way(scorer="paper", priors=Priors(protect_ends=1)),
    "random": Way(scorer="random"),
    "magnitude": Way(scorer="magnitude"),
    "taylor": Way(scorer="taylor"),
    "diff-pruning": Way(scorer="diff-pruning"),
    "block-influence": Way(scorer="block-influence"),
    "laptop-diff": Way(scorer="output-mse", selection="exact"),  # rises that add up, in a knapsack
    "bk-sdm": Way(scorer="bk-sdm"),
    "ends-and-spread": Way(scorer="ends-and-spread"),
}
