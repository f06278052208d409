"""The methods that are compared: each is a scorer, a rule of selection and priors, all of them the package's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from ldpruner.selection import Priors


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a method comes to its plan."""

    title: str  # for people
    scorer: str
    selection: str = "order"
    priors: Priors = field(default_factory=Priors)


WAYS = {
    "ld-pruner, sweep": Way(title="ldpruner's default", scorer="paper", selection="sweep"),
    "ld-pruner": Way(title="lowest score first, the paper's order", scorer="paper"),
    "ld-pruner, ratio": Way(title="lowest score per saving first", scorer="paper", selection="ratio"),
    "ld-pruner, spread": Way(title="the paper's order, spread", scorer="paper", priors=Priors(apart=1)),
    "ld-pruner, ends kept": Way(title="the paper's order, ends kept", scorer="paper", priors=Priors(protect_ends=1)),
    "random": Way(title="random", scorer="random"),
    "magnitude": Way(title="magnitude", scorer="magnitude"),
    "taylor": Way(title="Taylor", scorer="taylor"),
    "diff-pruning": Way(title="Diff-Pruning", scorer="diff-pruning"),
    "block-influence": Way(title="block influence", scorer="block-influence"),
    "laptop-diff": Way(title="LAPTOP-Diff's knapsack", scorer="output-mse", selection="exact"),  # rises that add up, in a knapsack
    "bk-sdm": Way(title="BK-SDM's scheme", scorer="bk-sdm"),
    "ends-and-spread": Way(title="keep the ends and spread", scorer="ends-and-spread"),
    "ld-pruner, improved": Way(title="fast scores, the plan improved", scorer="fast", selection="improved"),
}
