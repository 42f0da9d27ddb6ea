"""The fields of settings: their types, by path, and in words for messages and --help. Needs nothing of the project."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def bare(kind: Any) -> Any:
    """The type without its range."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return kind


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union that a recipe can hold, so not a function; of another type, it alone."""
    kind = bare(kind)
    if get_origin(kind) not in (Union, types.UnionType):
        return (kind,)
    return tuple(member for member in get_args(kind) if get_origin(member) is not collections.abc.Callable)


def section(kind: Any) -> type | None:
    """The class of a section, also of one that may be null; None for any other type."""
    for member in alternatives(kind):  # of `Section | None` the section
        if dataclasses.is_dataclass(bare(member)):
            return bare(member)
    return None


@functools.cache
def hints(config: type) -> dict[str, Any]:
    """The type of each field, with its range."""
    # Annotations are text under `from __future__ import annotations`, and ClassVars are among them.
    every = get_type_hints(config, include_extras=True)
    return {field.name: every[field.name] for field in dataclasses.fields(config)}


def field_types(config: type, prefix: str = "") -> dict[str, Any]:
    """Every setting by its path, such as `optim.lr`, with its type; sections are walked into."""
    paths: dict[str, Any] = {}
    for name, kind in hints(config).items():
        paths[prefix + name] = kind
        inner = section(kind)
        if inner is not None:
            paths |= field_types(inner, f"{prefix}{name}.")
    return paths


def value_at(config: Any, path: str) -> Any:
    """The value of a setting by its path; None if a section on the way is null. `*` is each key of a mapping, whose
    values come as a list."""
    part, _, rest = path.partition(".")
    if config is None or not part:
        return config
    if part == "*":
        return [value_at(value, rest) for value in config.values()]
    return value_at(config[part] if isinstance(config, dict) else getattr(config, part), rest)


def settings_at(config: Any, path: str) -> list[str]:
    """The paths that one with a `*` stands for, one for each key of the mapping there; any other path as it is."""
    before, star, after = path.partition(".*")
    if not star:
        return [path]
    return [f"{before}.{key}{after}" for key in value_at(config, before)]


def describe(kind: Any) -> str:
    """A type in words for a message."""
    kind = bare(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    # `X | Y` and Optional[X] have different origins.
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, alternatives(kind)))
    if origin is list:
        return f"a list, each {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each {describe(args[0])}"
    if origin is dict:
        return "a mapping"
    if dataclasses.is_dataclass(kind):
        return "a section with " + ", ".join(hints(kind))  # type: ignore[arg-type]
    words = {
        list: "a list",
        dict: "a mapping",
        float: "a number",
        int: "a whole number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        Any: "a value",
    }
    return words[kind]


def suggestion(wrong: str, known: Sequence[str], before: str = "") -> str:
    """`; did you mean ...?`, or what there is when nothing is near. `before` is put before each name."""
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {before}{near[0]}?"
    return f"; known here: {', '.join(known)}"


def show(value: Any) -> str:
    """A value for a message, on one line."""
    if value is None:
        return "null"
    # Text in quotes, so that 7 and '7' differ.
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."
