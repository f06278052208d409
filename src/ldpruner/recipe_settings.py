"""What a recipe says: a whole experiment, from scores to measurements, as frozen dataclasses and as YAML. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldpruner.errors import DataError, RecipeError
from ldpruner.files import read_prompts
from ldpruner.forms import check_form
from ldpruner.plans import Repairing, parse_budgets
from ldpruner.probes import Probe
from ldpruner.reading import as_yaml, merged, read, yaml_in, yaml_of
from ldpruner.recovery.settings import Distillation
from ldpruner.selection.priors import Priors

REDUCED = "reduced"  # the section that says what is other where a recipe is only tried


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The pipeline, and how it is loaded; names are those of `ldpruner.load`."""

    source: str  # a folder, a hub id, a checkpoint in one file, or zoo:NAME
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # distillation is in float32 whatever this says
    device: str | None = None
    revision: str | None = None
    variant: str | None = None
    component: str | None = None
    config: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Generations:
    """What is generated, see `Probe`; of the prompts in a file as many are taken as there are samples."""

    samples: int = 16
    num_inference_steps: int = 10
    seed: int = 0
    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompts and self.prompts_file:
            raise RecipeError("give prompts or prompts_file, not both.")
        Probe(samples=self.samples, num_inference_steps=self.num_inference_steps)  # it says what is wrong with them

    def probe(self) -> Probe:
        """The same as a probe. Raises `DataError` where the prompts cannot be read."""
        prompts = read_prompts(Path(self.prompts_file).expanduser()) if self.prompts_file else self.prompts
        names = ("samples", "num_inference_steps", "seed", "guidance_scale", "solver", "call")
        return Probe(prompts=prompts[: self.samples], **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Scoring(Generations):
    """How operators are scored, see `scoring.score`."""

    method: str = "paper"
    replacements: tuple[str, ...] | None = None
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Planning:
    """What is to be left, and how operators are chosen, see `planning.plan`."""

    budget: Mapping[str, str | float]
    selection: str = "sweep"
    protect_ends: int = 0
    stage_cap: float = 1.0
    apart: int = 0
    repair: Repairing = "none"

    def __post_init__(self) -> None:
        parse_budgets(self.budget)
        self.priors()

    def priors(self) -> Priors:
        return Priors(protect_ends=self.protect_ends, stage_cap=self.stage_cap, apart=self.apart)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How the pruned pipeline is saved."""

    form: str = "portable"

    def __post_init__(self) -> None:
        check_form(self.form)


@dataclass(frozen=True, kw_only=True)
class Distilling(Generations):
    """How the pruned pipeline learns from the original: on `data`, or on the original's generations; see `recovery.distil`."""

    samples: int = 1000
    num_inference_steps: int = 20
    seed: int = 1_000_000  # far from those of the evaluation
    data: str | None = None
    split: str = "train"
    caption: str = "{text}"
    training: Distillation = field(default_factory=Distillation)


@dataclass(frozen=True, kw_only=True)
class Evaluating(Generations):
    """What is measured of the samples of both models, see `evaluation.evaluate`."""

    samples: int = 500
    num_inference_steps: int = 20
    metrics: tuple[str, ...] | None = None
    features: tuple[str, ...] | None = None
    reference: str | None = None
    resize: int | None = None
    batch_size: int = 50


@dataclass(frozen=True, kw_only=True)
class Timing(Generations):
    """How both models are timed, see `benchmarking.benchmark`."""

    samples: int = 1
    num_inference_steps: int = 20
    rounds: int = 31


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment: the stages in the order in which they run, and what they are given."""

    name: str
    published: Mapping[str, Any] = field(default_factory=dict)  # results that the summary is to stand beside
    sources: Mapping[str, str] = field(default_factory=dict)  # where data comes from, by the place where it is to lie
    model: Loading
    score: Scoring = field(default_factory=Scoring)
    plan: Planning
    prune: Pruning = field(default_factory=Pruning)
    distil: Distilling | None = None
    evaluate: Evaluating = field(default_factory=Evaluating)
    benchmark: Timing = field(default_factory=Timing)

    @classmethod
    def load(cls, path: Path | str, *, reduced: bool = False, model: str | None = None, changes: Iterable[str] = ()) -> Recipe:
        """Read a recipe, with its section `reduced` over the rest where that is asked for, another model, and changes such as
        `score.samples=8`.

        Raises `RecipeError` where it cannot be read, or a key or a value of it is none that a recipe has.
        """
        place = Path(path).expanduser()
        try:
            return _read(yaml_in(place), reduced, model, changes)
        except RecipeError as error:
            raise error if str(error).startswith(str(place)) else RecipeError(f"{place}: {error}") from error

    def to_yaml(self) -> str:
        """The recipe as a file that `load` reads, without the changes that it was read with."""
        return as_yaml(asdict(self))

    def files(self) -> list[tuple[str, str]]:
        """The data that stages read: the setting that names it, and its place."""
        sections = {"score": self.score, "distil": self.distil, "evaluate": self.evaluate, "benchmark": self.benchmark}
        found = [(f"{name}.prompts_file", section.prompts_file) for name, section in sections.items() if section]
        found += [("distil.data", self.distil.data if self.distil else None), ("evaluate.reference", self.evaluate.reference)]
        nets = [net.partition("=") for net in self.evaluate.features or ()]
        found += [("evaluate.features", place) for net, _, place in nets if net == "inception" or place in self.sources]
        return [(setting, place) for setting, place in found if place]

    def check_files(self) -> None:
        """Raise `DataError` where data is missing: where it is to be had, and where it is to lie."""
        lines = []
        for setting, place in self.files():
            if not Path(place).expanduser().exists():
                source = f"Take it from {self.sources[place]}, and put it there" if place in self.sources else "Put it there"
                lines.append(f"{setting}: {place} is missing. {source}; or name another with --set {setting}=PLACE.")
        if lines:
            raise DataError(" ".join(lines))


def _read(data: Any, reduced: bool, model: str | None, changes: Iterable[str]) -> Recipe:
    if not isinstance(data, dict):
        raise RecipeError("is no recipe: it has no sections.")
    whole = {name: value for name, value in data.items() if name != REDUCED}
    less = data.get(REDUCED, {})
    if not isinstance(less, dict) or (reduced and not less):
        raise RecipeError(f"{REDUCED}: holds nothing that would be other. Leave --reduced out.")
    both = {False: whole, True: merged(Recipe, whole, less)}
    for each in both.values():
        read(Recipe, each)  # what is misspelt in the section that is not asked for is told too
    chosen = both[reduced] if model is None else _put(both[reduced], ["model", "source"], model, "")
    for change in changes:
        chosen = _changed(chosen, change)
    return read(Recipe, chosen)


def _changed(data: dict[str, Any], change: str) -> dict[str, Any]:
    """The data with one value put in, such as `score.samples=8`, read as YAML."""
    path, equals, text = change.partition("=")
    names = [name.strip().replace("-", "_") for name in path.split(".")]
    if not equals or not all(names):
        raise RecipeError(f"--set {change}: say SECTION.KEY=VALUE, such as score.samples=8.")
    changed: dict[str, Any] = _put(data, names, yaml_of(text, f"--set {change}"), change)
    return changed


def _put(data: Any, names: list[str], value: Any, change: str) -> Any:
    if not names:
        return value
    if data is not None and not isinstance(data, dict):
        raise RecipeError(f"--set {change}: there is no section before {names[0]}.")
    return {**(data or {}), names[0]: _put((data or {}).get(names[0]), names[1:], value, change)}
