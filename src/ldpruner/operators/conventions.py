"""What the names of a denoiser's arguments say, by the field's conventions: latents, timesteps, text, masks, positions.

A configuration gives sizes. What neither tells, such as a width, begins as a prime number that nothing else has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

TEXT = 11  # tokens of text, where the configuration names no number; a prime, to be seen again in an error
GRIDS = ((4, 6), (8, 16), (16, 32))  # height and width of latents, in patches, where the configuration names no size
FRAMES = 3
UNKNOWN = tuple(n for n in range(1009, 1500) if all(n % d for d in range(2, 39)))  # sizes to be found
Make = Callable[["Facts", str], list[Any]]  # the guesses at an argument of this name, the likeliest first


@dataclass(frozen=True)
class Shape:
    """A tensor to be made: normal noise, the same number everywhere, numbers below `value`, or places in order along an axis."""

    dims: tuple[int, ...]
    kind: Literal["noise", "full", "below", "places"] = "noise"
    value: bool | int | float = 0  # its type is the tensor's; for places, the axis

    def made(self, generator: torch.Generator) -> Tensor:
        if self.kind == "noise":
            return torch.randn(self.dims, generator=generator)
        if self.kind == "full":
            return torch.full(self.dims, self.value)
        if self.kind == "below":
            return torch.randint(max(int(self.value), 1), self.dims, generator=generator)
        axis = int(self.value) % len(self.dims)
        line = [length if i == axis else 1 for i, length in enumerate(self.dims)]
        return torch.arange(self.dims[axis]).view(line).expand(self.dims).clone()


def mapped(form: Any, change: Callable[[Any], Any]) -> Any:
    """A nest of shapes and plain values with every leaf changed."""
    return tree_map(change, form, is_leaf=lambda leaf: isinstance(leaf, Shape))


def shapes_in(form: Any) -> list[Shape]:
    """Every shape of a nest."""
    leaves = tree_leaves(form, is_leaf=lambda leaf: isinstance(leaf, Shape))
    return [leaf for leaf in leaves if isinstance(leaf, Shape)]


def with_size(form: Any, old: int, new: int) -> Any:
    """The nest with one size in place of another, in every tensor."""

    def changed(leaf: Any) -> Any:
        return replace(leaf, dims=tuple(new if dim == old else dim for dim in leaf.dims)) if isinstance(leaf, Shape) else leaf

    return mapped(form, changed)


@dataclass
class Facts:
    """What a configuration says of arguments."""

    samples: int
    config: Mapping[str, Any]
    grid: tuple[int, int, int]  # frames, height, width of latents
    patch: tuple[int, int, int]
    channels: int | None
    unknown: dict[str, int] = field(default_factory=dict)  # what it is of -> the prime that stands for it

    @classmethod
    def of(cls, denoiser: nn.Module, samples: int, default: tuple[int, int] = GRIDS[0]) -> Facts:
        config: Mapping[str, Any] = dict(getattr(denoiser, "config", {}))
        patch = _patch(config)
        height, width = _size(config) or (default[0] * patch[1], default[1] * patch[2])
        channels = next((config[key] for key in _CHANNELS if isinstance(config.get(key), int)), None)
        return cls(samples, config, (_frames(config, samples, patch[0]), height, width), patch, channels)

    @property
    def widths(self) -> list[int]:
        """Every whole number of the configuration that can be a width."""
        numbers = {leaf for leaf in tree_leaves(dict(self.config)) if isinstance(leaf, int) and not isinstance(leaf, bool)}
        return sorted(number for number in numbers if number > 0)

    @property
    def lengths(self) -> list[int]:
        """How many tokens latents can make: of an image or of a video, in patches or not, or a row."""
        frames, height, width = self.grid
        area = height * width // (self.patch[1] * self.patch[2])
        found = [area, frames // self.patch[0] * area, height * width, frames * height * width, width]
        return list(dict.fromkeys(found))

    def text_length(self, name: str) -> int:
        """Tokens of text: what the configuration says, for a second text with the same ending."""
        ending = next((end for end in re.findall(r"_(?:t5|2)$", name)), "")
        keys = rf"text.*_len(gth)?{ending}$|^max_sequence_length{ending}$|^num_embeddings{ending}$"
        found = [value for key, value in self.config.items() if re.search(keys, key) and isinstance(value, int)]
        return found[0] if found else TEXT

    def forms(self, name: str) -> list[Any]:
        """Guesses at an argument, the likeliest first; empty where its name says nothing."""
        make = next((make for pattern, make in _ROLES if re.search(pattern, name)), None)
        return make(self, name) if make else []

    def size_of(self, *what: str) -> int:
        """The prime that stands for an unknown size."""
        return self.unknown.setdefault(" ".join(what), UNKNOWN[len(self.unknown) % len(UNKNOWN)])


_CHANNELS = ("in_channels", "in_dim", "latent_dim", "io_channels", "input_dims", "latent_channels", "embedding_dim")


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    return (int(value[-2]), int(value[-1])) if isinstance(value, list | tuple) and len(value) >= 2 else None


def _patch(config: Mapping[str, Any]) -> tuple[int, int, int]:
    size = config.get("patch_size", 1)
    time = size[0] if isinstance(size, list | tuple) and len(size) == 3 else config.get("patch_size_t")
    return (int(time or 1), *(_pair(size) or (1, 1)))


def _size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    if config.get("sample_height") and config.get("sample_width"):
        return int(config["sample_height"]), int(config["sample_width"])
    return _pair(config.get("sample_size")) or _pair(config.get("max_resolution"))


def _frames(config: Mapping[str, Any], samples: int, patch: int) -> int:
    """As the configuration says, through the video's autoencoder where that is named; a multiple of the patch."""
    frames = next((int(config[key]) for key in ("num_frames", "sample_frames", "video_length") if config.get(key)), None)
    if frames is None:
        return FRAMES * patch if samples != FRAMES * patch else (FRAMES + 2) * patch
    if config.get("temporal_compression_ratio"):
        frames = (frames - 1) // int(config["temporal_compression_ratio"]) + 1
    return math.ceil(frames / patch) * patch


def _grids(facts: Facts, channels: int) -> list[Any]:
    n, c, (f, h, w) = facts.samples, channels, facts.grid
    grids = [(n, c, h, w), (n, c, f, h, w), (n, f, c, h, w), (n, f, h, w, c), (n * f, c, h, w), (n, c, w), (n, w, c), (n, c)]
    patches = (n, facts.lengths[0], c, 1, *facts.patch[1:])
    return [*map(Shape, grids), *(Shape((n, length, c)) for length in facts.lengths), Shape(patches)]


def _latents(facts: Facts, name: str) -> list[Any]:
    unknown, known = facts.size_of(name), facts.channels
    guesses = _grids(facts, unknown)
    n, (_, h, w) = facts.samples, facts.grid
    if known is None:
        return [*guesses, [Shape((unknown, 1, h, w))] * n]
    ours = [*_grids(facts, known), [Shape((known, 1, h, w))] * n, [Shape((known, h, w))] * n]
    return [*ours, *guesses] if name in {"hidden_states", "sample", "x"} else [*guesses, *ours]


def _audio(facts: Facts, name: str) -> list[Any]:
    return [Shape((facts.samples, TEXT, facts.size_of(name))), Shape((facts.samples, facts.size_of(name), TEXT))]


def _text(facts: Facts, name: str) -> list[Any]:
    n, width, length = facts.samples, facts.size_of(name), facts.text_length(name)
    many = facts.size_of(name, "many")
    plain = [Shape(dims) for dims in ((n, length, width), (n, width), (n, 1, width))]
    lists = [[Shape((length, width))] * n, [Shape((n, length, width))]]
    deep = [Shape(dims) for dims in ((n, many, length, width), (n, length, many, width), (many, n, length, width))]
    aligned = [Shape((n, size, width)) for size in facts.lengths]
    return [*plain, *lists, *deep, Shape((n * facts.grid[0], length, width)), *aligned]


def _layers(facts: Facts, name: str) -> list[Any]:
    """One text for each layer, all in a list."""
    depth = sum(value for key, value in facts.config.items() if re.fullmatch(r"num_(\w+_)?layers", key) and isinstance(value, int))
    text = Shape((facts.samples, facts.text_length(name), facts.size_of(name)))
    return [[text] * count for count in (max(depth, 1), 1, 2, 3)]


def _with_mask(facts: Facts, name: str) -> list[Any]:
    n, length = facts.samples, facts.text_length(name)
    return [[(Shape((n, length, facts.size_of(name))), Shape((n, length), "full", True))]]


def _vector(facts: Facts, name: str) -> list[Any]:
    n, width = facts.samples, facts.size_of(name)
    return [Shape((n, width)), Shape((n, 1, width)), Shape((n, TEXT, width)), [Shape((n, TEXT, width))] * n]


def _moment(facts: Facts, _: str) -> list[Any]:
    n, f = facts.samples, facts.grid[0]
    floats = [Shape(dims, "full", 500.0) for dims in ((n,), (n, 1), (), (n, f), (n, 1, f), (1,))]
    tokens = [Shape((n, length), "full", 500.0) for length in facts.lengths]
    return [*floats, Shape((n,), "full", 500), Shape((n,), "full", 0), *tokens]


def _rate(facts: Facts, _: str) -> list[Any]:
    return [Shape((facts.samples,), "full", 1), [1] * facts.samples, 1]


def _mask(facts: Facts, name: str) -> list[Any]:
    n, (f, h, w), length = facts.samples, facts.grid, facts.text_length(name.replace("_mask", ""))
    values: tuple[bool | float, ...] = (True, 1.0, 1)
    text = [*(Shape((n, length), "full", value) for value in values), Shape((n, 1, length), "full", 1.0)]
    grids = [Shape(dims, "full", 1.0) for dims in ((1, 1, h, w), (n, 1, h, w), (n, 1, f, h, w), (1, 1, f, h, w))]
    tokens = [Shape((n, size), "full", True) for size in (*facts.lengths, *(length + size for size in facts.lengths))]
    unknown = facts.size_of(name)
    open_ended = [Shape((n, unknown), "full", value) for value in (True, 1)]
    deep = [Shape((n, unknown, facts.size_of(name, "deep")), "full", True)]
    tail = [*open_ended, *deep]
    return [*text, *grids, *tokens, *tail] if re.search("encoder|text", name) or name == "mask" else [*grids, *tokens, *text, *tail]


def _places(facts: Facts, name: str) -> list[Any]:
    axes = next((len(value) for key, value in facts.config.items() if "axes" in key and isinstance(value, list | tuple)), 3)
    length, n = facts.text_length(name), facts.samples
    ours = [length] if re.search("txt|text", name) else [*facts.lengths, *(length + size for size in facts.lengths)]
    several = [Shape((*batch, size, axes), "places", -2) for size in ours for batch in ((), (n,))]
    return [*several, *(Shape((n, size), "places", -1) for size in ours)]


def _order(facts: Facts, name: str) -> list[Any]:
    """Places along one axis, or along each of a grid's."""
    patches = [size // step for size, step in zip(facts.grid, facts.patch, strict=True)]
    length = facts.text_length(name) if "text" in name else facts.grid[0]
    row = Shape((length,), "places")
    rows = [row, Shape((1, length), "places", 1), Shape((facts.samples, length), "places", 1)]
    each = [Shape((size,), "places") for size in patches]
    return rows if re.search("text|indices", name) else [each, *rows]


def _rotary(facts: Facts, name: str) -> list[Any]:
    """Cosines and sines, of a length and a head dim that are to be found."""
    length, width, heads = facts.size_of(name, "length"), facts.size_of(name), facts.size_of(name, "heads")
    dims = [(length, width), (facts.samples, length, width), (facts.samples, heads, length, width)]
    return [*((Shape(d), Shape(d)) for d in dims), Shape((length, width)), Shape((length, facts.size_of(name, "deep"), width))]


def _sizes(*widths: int) -> Make:
    def make(facts: Facts, name: str) -> list[Any]:
        n = facts.samples
        return [Shape((n, width), "full", 8.0) for width in (*widths, facts.size_of(name))]

    return make


def _grid_sizes(facts: Facts, _: str) -> list[Any]:
    n, (f, h, w), (pf, ph, pw) = facts.samples, facts.grid, facts.patch
    grids = [(1, h, w), (f, h, w), (1, h // ph, w // pw), (f // pf, h // ph, w // pw)]
    sizes: list[tuple[int, ...]] = [*dict.fromkeys(grids), (h, w)]
    return [form for size in sizes for form in ([size] * n, [[size]] * n)]


def _side(axis: int) -> Make:
    return lambda facts, _: [facts.grid[axis]]


def _full(value: bool | int) -> Make:
    def make(facts: Facts, name: str) -> list[Any]:
        n = facts.samples
        dims = [(n,), *((n, length) for length in (facts.text_length(name), *facts.lengths)), (n, facts.size_of(name))]
        return [Shape(d, "full", value) for d in dims]

    return make


def _tokens(facts: Facts, name: str) -> list[Any]:
    n, (_, h, w) = facts.samples, facts.grid
    dims = [(n, facts.text_length(name)), (n, h, w), *((n, length) for length in facts.lengths)]
    return [Shape(d, "below", 8) for d in dims]


def anything(facts: Facts, name: str) -> list[Any]:
    """Guesses at what an error asks for, where the name says nothing."""
    n, size = facts.samples, facts.size_of(name)
    counts = [Shape(dims, "full", 0) for dims in ((n,), (n, TEXT), (n, TEXT, size), (n, TEXT, TEXT))]
    return [Shape((n, size)), Shape((n, TEXT, size)), *counts, 1, True]


_ROLES: list[tuple[str, Make]] = [
    (r"^num_frames$", _side(0)),
    (r"^height$", _side(1)),
    (r"^width$", _side(2)),
    (r"^audio_num_frames$|depth$", lambda _facts, _name: [TEXT]),
    (r"_and_mask", _with_mask),
    (r"mask", _mask),
    (r"^time_ids$|added_time_ids|micro_cond", _sizes(6, 3, 2)),
    (r"meta_size", _sizes(6)),
    (r"^resolution$|_size$|crop_coords", _sizes(2)),
    (r"aspect_ratio", _sizes(1)),
    (r"shapes?$|shape_list", _grid_sizes),
    (r"_lens$", lambda facts, name: [Shape((facts.samples,), "full", facts.text_length(name))]),
    (r"rotary|freqs|image_rope|video_rope", _rotary),
    (r"(img|txt|image|text|position)_ids|^position", _places),
    (r"rope_pos|indices|indexes", _order),
    (r"input_ids|token_id", _tokens),
    (r"drop$", _full(False)),
    (r"segment|indicator|token_type|tags$", _full(1)),
    (r"class_labels", _full(3)),
    (r"^style$", _full(0)),
    (r"^fps$", _rate),
    (r"interpolation_scale|_scale$|kwargs|cache|chunk", lambda _facts, _name: []),
    (r"layers$", _layers),
    (r"time|^t$|^sigma|guidance|^ofs$", _moment),
    (r"audio_(hidden|latents)", _audio),
    (r"pooled|global|image_embed|text_embeds|proj_embedding|class_embeds|_img$|^id_", _vector),
    (r"encoder|encoding|text|context_emb|^context$|cap_feats|embed", _text),
    (r"hidden_states|^sample$|^x$|latents|tokens$|_cond$|pixel|plucker|camera|noise", _latents),
]
