"""What stages hand to each other: operators, scores, budgets, plans. Frozen, JSON in and out, no torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ldpruner import sharing
from ldpruner.errors import BudgetError, OperatorError, PlanError, suggest
from ldpruner.files import as_json, write_json, write_text
from ldpruner.markdown import merged, plan_card
from ldpruner.probes import Probe

SCHEMA = 1
PLAN = "pruning_plan.json"  # in a folder, or a repository of the Hub
Quantity = Literal["latency", "macs", "params"]
Repairing = Literal["none", "closed-form"]
QUANTITIES: tuple[Quantity, ...] = ("latency", "macs", "params")


def outermost(names: Iterable[str]) -> Iterator[str]:
    """The paths that lie in no other path given, in order."""
    given = set(names)
    return (name for name in sorted(given) if given.isdisjoint(_around(name)))


def _around(name: str) -> Iterator[str]:
    """What a dotted path lies in, the nearest first."""
    while name := name.rpartition(".")[0]:
        yield name


def within(name: str, block: str) -> bool:
    """Whether a dotted path is `block` or lies in it."""
    return name == block or name.startswith(block + ".")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one denoiser call spends in an operator. MACs are for one sample, time is for the traced batch."""

    params: int = 0
    macs: int = 0
    latency_ms: float = 0.0

    def of(self, quantity: Quantity) -> float:
        return {"latency": self.latency_ms, "macs": self.macs, "params": self.params}[quantity]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to replace one operator, with all that the stand-in needs to be built."""

    replacement: str
    options: Mapping[str, Any]  # JSON, see ldpruner_v1.py
    cost: Cost  # what the stand-in itself spends
    dead: tuple[str, ...] = ()  # operators that no longer reach the output once this one is replaced


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One module of the denoiser that can be replaced as a whole. Shapes are those of the traced call."""

    name: str  # dotted module path
    kind: str  # class name, to be read by people
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    cost: Cost
    parent: str | None  # the nearest enclosing operator
    candidates: tuple[Candidate, ...]  # empty for a module that can only die with another
    if_dead: Mapping[str, Any] | None  # options of the `zero` that holds its place once nothing reads its output
    block: str = ""  # the block that it is or lies in, and
    stage: str = ""  # the stage of that, or the one that it is; see `operators.stages`
    axis: int | None = None  # the dimension of its output that holds channels; None: the second from rank 4 on, else the last

    def candidate(self, replacement: str) -> Candidate:
        """The candidate of that name. Raises `OperatorError` where it does not fit this operator."""
        for candidate in self.candidates:
            if candidate.replacement == replacement:
                return candidate
        fitting = ", ".join(candidate.replacement for candidate in self.candidates)
        raise OperatorError(f"{self.name}: {replacement!r} does not fit this {self.kind}; what fits: {fitting}.")


@dataclass(frozen=True, kw_only=True)
class Operators:
    """Every operator of one denoiser, and what the whole denoiser costs."""

    model: str  # fingerprint of the architecture
    denoiser: str  # class name
    total: Cost
    device: str
    operators: tuple[Operator, ...]

    @cached_property
    def _by_name(self) -> dict[str, Operator]:
        return {operator.name: operator for operator in self.operators}

    def __getitem__(self, name: str) -> Operator:
        if name not in self._by_name:
            raise OperatorError(f"{name!r} is no operator of this {self.denoiser}: {suggest(name, self._by_name)}")
        return self._by_name[name]

    def pairs(self, replacements: Iterable[str] | None = None) -> list[tuple[Operator, Candidate]]:
        """Every operator beside every replacement that fits it, in the order of the denoiser's modules."""
        allowed = None if replacements is None else set(replacements)
        return [(o, c) for o in self.operators for c in o.candidates if allowed is None or c.replacement in allowed]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Operators:
        operators = tuple(
            Operator(
                **{
                    **entry,
                    "input_shape": tuple(entry["input_shape"]),
                    "output_shape": tuple(entry["output_shape"]),
                    "cost": Cost(**entry["cost"]),
                    "candidates": tuple(
                        Candidate(**{**c, "cost": Cost(**c["cost"]), "dead": tuple(c["dead"])}) for c in entry["candidates"]
                    ),
                }
            )
            for entry in data["operators"]
        )
        rest = {key: data[key] for key in ("model", "denoiser", "device")}
        return cls(**rest, total=Cost(**data["total"]), operators=operators)


@dataclass(frozen=True, kw_only=True)
class Score:
    """What replacing one operator costs, by the method that scored it; low means that it can go."""

    operator: str
    replacement: str
    score: float
    seconds: float
    mean_shift: float | None = None  # the two terms of the paper's score; other methods have none
    std_shift: float | None = None
    output_error: float | None = None  # the paper's scorer measures it beside: root mean square, on the original's own inputs
    judged: str | None = None  # by what the fast scorer judged it: "screen", "output", "latents of 16"
    doubt: float | None = None  # standard deviation of the score's natural logarithm

    @property
    def key(self) -> tuple[str, str]:
        return self.operator, self.replacement


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Replace one operator by a named stand-in."""

    operator: str  # dotted module path in the denoiser
    replacement: str  # a name in REPLACEMENTS
    options: Mapping[str, Any]
    reason: Literal["chosen", "dead"] = "chosen"
    score: float | None = None


def dead_edit(operator: Operator) -> Edit:
    """The edit that takes a dead operator away: nothing reads its output, so zeros of its shape hold its place."""
    assert operator.if_dead is not None
    return Edit(operator=operator.name, replacement="zero", options=operator.if_dead, reason="dead")


def corrected(edits: Iterable[Edit], operators: Operators) -> tuple[Edit, ...]:
    """The edits, with room for a scale and a shift per channel in every stand-in that can hold them.

    Pointwise maps need none; what is dead has no one to correct it for.
    """
    return tuple(_corrected(edit, operators[edit.operator]) for edit in edits)


def _corrected(edit: Edit, operator: Operator) -> Edit:
    single = not edit.options.get("many", False)
    if edit.reason == "dead" or edit.replacement == "pointwise" or not single or len(operator.output_shape) < 2:
        return edit
    usual = 1 if len(operator.output_shape) > 3 else -1
    axis = {} if operator.axis in {None, usual} else {"axis": operator.axis}
    return replace(edit, options={**edit.options, "correction": operator.output_shape[operator.axis or usual], **axis})


@dataclass(frozen=True, kw_only=True)
class Budget:
    """An upper bound on one quantity: absolute (ms, MACs, parameters), or a share of the original."""

    quantity: Quantity
    limit: float
    relative: bool

    @classmethod
    def parse(cls, quantity: str, limit: str | float) -> Budget:
        """Read `("latency", "65%")` or `("params", 4e6)`. Raises `BudgetError` with what would be understood."""
        if quantity not in QUANTITIES:
            raise BudgetError(f"budget {quantity!r} is unknown: {suggest(quantity, QUANTITIES)}")
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(%?)\s*", str(limit))
        try:
            value = float(match[1]) if match else -1.0
        except ValueError:
            value = -1.0
        if match is None or not 0 < value < math.inf or (match[2] and value > 100):
            raise BudgetError(f"budget {quantity}={limit}: give a positive number, or a share such as {quantity}=65%.")
        return cls(quantity=quantity, limit=value / 100 if match[2] else value, relative=bool(match[2]))

    def share(self, total: Cost) -> float:
        """The bound as a share of the original, 0 to 1."""
        return self.limit if self.relative else self.limit / total.of(self.quantity)

    def __str__(self) -> str:
        return f"{self.quantity}={self.limit:.4g}" if not self.relative else f"{self.quantity}={self.limit * 100:.4g}%"


def parse_budgets(budget: Mapping[str, str | float]) -> tuple[Budget, ...]:
    """Every bound of `{"latency": "65%", "params": 4e6}`; all of them will hold. Raises `BudgetError`."""
    if not budget:
        raise BudgetError('no budget was given: say for example {"latency": "65%"}.')
    return tuple(Budget.parse(quantity, limit) for quantity, limit in budget.items())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to replace in which architecture, and why; a few kilobytes that apply to the base model anywhere."""

    model: str  # fingerprint of the architecture
    denoiser: str
    edits: tuple[Edit, ...]
    budgets: tuple[Budget, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)  # quantity -> share of the original
    probe: Probe | None = None  # what the scores, and fitted stand-ins, were made from
    selection: str = ""
    repair: Repairing = "none"  # how stand-ins are fitted to each other once all edits are made

    def check_model(self, model: str, denoiser: str) -> None:
        """Raise `PlanError` where this plan belongs to another architecture."""
        if self.model != model:
            raise PlanError(
                f"this plan was made for another model: it fits the {self.denoiser} {self.model[:12]}, "
                f"and this is a {denoiser} {model[:12]}. Score and plan this model anew."
            )

    def operators_config(self) -> dict[str, dict[str, Any]]:
        """The edits as a pruned model's config.json holds them."""
        return {edit.operator: {"replacement": edit.replacement, "options": dict(edit.options)} for edit in self.edits}

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | asdict(self) | {"probe": self.probe.to_json() if self.probe else None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        if data.get("schema") != SCHEMA:
            raise PlanError(f"plan schema {data.get('schema')!r} is unknown: this version reads {SCHEMA}.")
        return cls(
            model=data["model"],
            denoiser=data["denoiser"],
            edits=tuple(Edit(**edit) for edit in data["edits"]),
            budgets=tuple(Budget(**budget) for budget in data["budgets"]),
            predicted=data["predicted"],
            probe=Probe.from_json(data["probe"]) if data["probe"] else None,
            selection=data["selection"],
            repair=data.get("repair", "none"),
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, base_model: str | None = None) -> None:
        """Write the plan to a folder, beside a card that says what it fits and removes; a card that is not ours stays."""
        place = Path(folder)
        self.save(place / PLAN)
        there = (place / sharing.CARD).read_text(encoding="utf-8") if (place / sharing.CARD).is_file() else None
        card = merged(self._card(place.name, base_model), there)
        if card is not None:
            write_text(place / sharing.CARD, card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a plan of ldpruner",
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Put the plan and its card into a repository of the Hub, made where it is missing; the commit's address.

        `base_model` is the hub id of what it was made for, for the card to name. A card that is there and is not a plan's
        stays. Raises `HubError`.
        """
        files = {PLAN: as_json(self.to_json()), sharing.CARD: self._card(repo_id, base_model)}
        return sharing.push(
            files,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )

    def _card(self, name: str, base_model: str | None) -> str:
        predicted = [f"{quantity}={share * 100:.4g}%" for quantity, share in self.predicted.items()]
        return plan_card(name, self.to_json(), base_model=base_model, budgets=list(map(str, self.budgets)), predicted=predicted)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Plan:
        """Read a plan from a file, from a folder, or from a repository of the Hub such as `org/name`.

        Raises `PlanError` where there is none in it, `HubError` where the Hub has or gives none.
        """
        name = os.fspath(source)
        path = Path(name).expanduser()
        if sharing.is_hub_id(name):
            path = sharing.fetch(name, PLAN, revision=revision, token=token)
        return cls.load(path / PLAN if (path / PLAN).is_file() else path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises `PlanError` where the file is missing or is no plan."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise PlanError(f"{path}: {error}") from error
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise PlanError(f"{path}: is no plan ({reason}). Make one with `ldpruner plan`.") from error
