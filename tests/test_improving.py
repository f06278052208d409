"""The search on the joint shift: what single scores cannot tell, held against every set there is."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest

from invented import denoiser, operator, operators, scored, sets
from ldpruner.improving import Improver, contributions, improve, keys_of
from ldpruner.plans import Candidate, Operators, Quantity, Score
from ldpruner.selection import Priors, choose, options_of, predict, share
from ldpruner.selection.choice import FREE, Chosen, chosen_in

TARGETS: dict[Quantity, float] = {"latency": 0.85, "params": 0.84}


class Together:
    """Judges sets whose edits act on each other: the squares of their scores add up, and so does what each pair does beside."""

    def __init__(self, scores: list[Score], pairs: Mapping[frozenset[str], float]) -> None:
        self.squares = {entry.key: entry.score**2 for entry in scores}
        self.pairs = pairs
        self.asked: list[frozenset[tuple[str, str]]] = []

    @classmethod
    def drawn(cls, model: Operators, scores: list[Score], seed: int) -> Together:
        draw = random.Random(seed)
        names = [each.name for each in model.operators]
        return cls(
            scores, {frozenset(pair): draw.choice([0, 0, -1, 1, 4]) * draw.random() for pair in itertools.combinations(names, 2)}
        )

    def shift(self, chosen: Mapping[str, Candidate]) -> float:
        alone = sum(self.squares[name, candidate.replacement] for name, candidate in chosen.items())
        beside = sum(self.pairs.get(frozenset(pair), 0.0) for pair in itertools.combinations(chosen, 2))
        return math.sqrt(max(alone + beside, 0.01 * alone))

    def __call__(self, chosen: Mapping[str, Candidate]) -> float:
        self.asked.append(keys_of(chosen))
        return self.shift(chosen)


def start_of(model: Operators, scores: list[Score], targets: Mapping[Quantity, float], priors: Priors = FREE) -> Chosen:
    return chosen_in(choose(model, scores, targets, selection="exact-2", priors=priors).edits, model)


def meet(model: Operators, chosen: Mapping[str, Candidate], targets: Mapping[Quantity, float]) -> bool:
    return all(share(predict(model, dict(chosen)), model.total, quantity) <= target for quantity, target in targets.items())


def test_two_edits_that_are_harmless_alone_and_harmful_together_are_told_apart() -> None:
    model = operators(*(operator(name, 10, "identity") for name in "abcd"))
    scores = scored(("a", "identity", 1.0), ("b", "identity", 1.1), ("c", "identity", 1.5), ("d", "identity", 9.0))
    start = start_of(model, scores, {"latency": 0.8})
    assert set(start) == {"a", "b"}
    judge = Together(scores, {frozenset("ab"): 30.0})
    found = improve(start, model, scores, {"latency": 0.8}, judge=judge)
    assert set(found.chosen) == {"a", "c"}
    assert set(found.steps[0].chosen) == {"a", "b"}
    assert found.shift == judge.shift(found.chosen) == pytest.approx(math.sqrt(1 + 1.5**2))


def test_an_edit_that_makes_up_for_another_is_found() -> None:
    model = operators(*(operator(name, 10, "identity") for name in "abcd"))
    scores = scored(("a", "identity", 1.0), ("b", "identity", 1.1), ("c", "identity", 1.5), ("d", "identity", 2.0))
    judge = Together(scores, {frozenset("cd"): -5.0})
    found = improve(start_of(model, scores, {"latency": 0.8}), model, scores, {"latency": 0.8}, judge=judge)
    assert set(found.chosen) == {"c", "d"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("priors", [Priors(), Priors(apart=1)])
def test_it_comes_near_the_best_of_all_sets_that_may_stand_and_meet_the_targets(seed: int, priors: Priors) -> None:
    model, scores = denoiser(seed)
    judge = Together.drawn(model, scores, seed)
    fit = [taken for taken in sets(model) if priors.allow(taken, model, "latency") and meet(model, taken, TARGETS)]
    start = start_of(model, scores, TARGETS, priors)
    if not fit:
        assert not meet(model, start, TARGETS)
        return
    found = improve(start, model, scores, TARGETS, judge=judge, priors=priors)
    assert found.chosen in fit
    ranked = sorted(judge.shift(taken) for taken in fit)
    assert found.shift <= ranked[len(ranked) // 50]
    assert found.shift <= judge.shift(start)


def test_no_set_is_measured_twice_and_no_more_than_are_allowed() -> None:
    model, scores = denoiser(3)
    start = start_of(model, scores, TARGETS)
    for allowance in (1, 2, 10, 40):
        judge = Together.drawn(model, scores, 3)
        found = improve(start, model, scores, TARGETS, judge=judge, allowance=allowance)
        assert len(judge.asked) == len(set(judge.asked)) == found.evaluations <= allowance
        assert [step.shift for step in found.steps] == sorted((step.shift for step in found.steps), reverse=True)
        assert (found.chosen, found.shift) == (found.steps[-1].chosen, found.steps[-1].shift)
    assert improve(start, model, scores, TARGETS, judge=judge, allowance=1).chosen == start


def test_the_same_arguments_give_the_same_set() -> None:
    model, scores = denoiser(5)
    start = start_of(model, scores, TARGETS)
    first, second = (improve(start, model, scores, TARGETS, judge=Together.drawn(model, scores, 5), allowance=30) for _ in range(2))
    assert first == second


def test_what_was_learned_at_one_target_serves_at_the_next() -> None:
    model, scores = denoiser(2)
    judge = Together.drawn(model, scores, 2)
    improver = Improver.of(model, scores, ["latency"], judge=judge)
    first = improver.improved([start_of(model, scores, {"latency": 0.85})], {"latency": 0.85}, allowance=40)
    lower = {"latency": 0.80}
    assert not meet(model, first.chosen, lower)
    plain = start_of(model, scores, lower)
    second = improver.improved([plain, first.chosen], lower, allowance=10)
    assert meet(model, second.chosen, lower)
    assert second.shift <= judge.shift(plain)
    assert len(judge.asked) == len(set(judge.asked)) <= 50


def test_contributions_are_what_leaving_an_edit_out_or_putting_one_in_changes() -> None:
    model = operators(*(operator(name, 10, "identity") for name in "abcd"))
    scores = scored(*((name, "identity", 1.0) for name in "abcd"))
    options = {option.score.key: option for option in options_of(model, scores)}
    a, b, c = (frozenset({(name, "identity")}) for name in "abc")
    known = {a | b: 2.0, a: 1.0, b: 1.9, a | b | c: 3.0}
    harms = contributions(options, a | b, known)
    assert harms["b", "identity"] > harms["a", "identity"] > 0, "without b 3 of 4 go, without a 0.39"
    assert harms["c", "identity"] > harms["d", "identity"], "c adds 5; of d nothing is known but its score"
    assert harms["d", "identity"] == pytest.approx(2.0), "1 squared, where two that score 1 come to 4 together"
