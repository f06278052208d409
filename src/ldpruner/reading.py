"""YAML to frozen dataclasses and back: what is unknown, missing or of another type is one clear error. No torch."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from ldpruner.errors import LDPrunerError, RecipeError, suggest

T = TypeVar("T")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it comes without types
    """Plain data only. As YAML 1.2 has it, `no` and `on` are words and 1e-4 is a number; a key that is said twice is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {
        first: [entry for entry in entries if entry[0].rpartition(":")[2] not in ("bool", "float")]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        said = [key.value for key, _ in node.value]
        twice = next((name for place, name in enumerate(said) if name in said[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is said twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"({_NUMBER.pattern})$"), list("-+.0123456789"))


def yaml_of(text: str, where: str) -> Any:
    """What a text in YAML says. Raises `RecipeError`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: is no YAML ({' '.join(str(error).split())}).") from error


def yaml_in(path: Path) -> Any:
    """What a YAML file says. Raises `RecipeError` where it is missing or is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise RecipeError(f"{path}: cannot be read ({reason}).") from error
    return yaml_of(text, str(path))


def as_yaml(data: Any) -> str:
    """Plain data as the text of a YAML file, in its own order."""
    return str(yaml.safe_dump(_plain(data), sort_keys=False, allow_unicode=True, width=120))


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _plain(value) for name, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, list | tuple) else data


def read(kind: type[T], data: Any, where: str = "") -> T:
    """A dataclass from a mapping of its fields' names; fields that are dataclasses, tuples and mappings are read alike.

    `where` is the path that errors name. Raises `RecipeError`.
    """
    return cast("T", _value(kind, data, where))


def merged(kind: Any, base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a dataclass with other data over it, section by section; lists and free mappings are replaced whole."""
    hints, result = get_type_hints(kind), dict(base)
    for name, value in over.items():
        section = _dataclass_in(hints.get(name))
        both = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        result[name] = merged(section, base[name], value) if section and both else value
    return result


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a field holds, if it does, or may do so."""
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


def _value(kind: Any, data: Any, where: str) -> Any:
    """`data` as `kind`: a dataclass, a union, a literal, a tuple of one kind, a mapping from text, or a plain type."""
    if is_dataclass(kind):
        return _record(kind, data, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is not None:
        compound = {Union: _one_of, types.UnionType: _one_of, Literal: _literal, tuple: _tuple, Mapping: _mapped}
        return compound[origin](inner, data, where)
    if kind is float and type(data) is int:
        return float(data)
    if kind is not Any and type(data) is not kind:
        raise RecipeError(f"{where}: expected {_WORDS[kind]}, found {_told(data)}.")
    return data


def _literal(known: tuple[Any, ...], data: Any, where: str) -> Any:
    if data not in known:
        raise RecipeError(f"{where}: {data!r} is unknown: {suggest(str(data), map(str, known))}")
    return data


def _tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    return tuple(_value(kinds[0], each, f"{where}[{place}]") for place, each in enumerate(_of(list, data, where, "a list")))


def _mapped(kinds: tuple[Any, ...], data: Any, where: str) -> dict[str, Any]:
    return {str(name): _value(kinds[1], each, f"{where}.{name}") for name, each in _mapping(data, where).items()}


def _record(kind: Any, data: Any, where: str) -> Any:
    hints, known = get_type_hints(kind), {each.name: each for each in fields(kind) if each.init}
    given, at = _mapping(data, where), f"{where}." if where else ""
    for name in given:
        if name not in known:
            raise RecipeError(f"{at}{name} is unknown: {suggest(str(name), known)}")
    for name, each in known.items():
        if name not in given and _required(each):
            raise RecipeError(f"{at}{name} is missing.")
    values = {name: _value(hints[name], value, f"{at}{name}") for name, value in given.items()}
    try:
        return kind(**values)
    except RecipeError:
        raise
    except LDPrunerError as error:
        raise RecipeError(f"{where}: {error}" if where else str(error)) from error


def _required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _one_of(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and types.NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    for kind in kinds[:-1]:
        try:
            return _value(kind, data, where)
        except RecipeError:
            continue
    return _value(kinds[-1], data, where)


def _mapping(data: Any, where: str) -> dict[Any, Any]:
    return cast("dict[Any, Any]", _of(dict, data, where or "the whole", "names with values"))


def _of(kind: type, data: Any, where: str, words: str) -> Any:
    if not isinstance(data, kind):
        raise RecipeError(f"{where}: expected {words}, found {_told(data)}.")
    return data


def _told(data: Any) -> str:
    text = "nothing" if data is None else repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
