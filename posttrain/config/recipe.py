"""Reads a recipe (YAML) and says, before anything else runs, which key or value is wrong and what is right.

jsonargparse builds the configuration; its messages do not name the file, so the file is checked against the
dataclasses here first.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from posttrain.errors import UserError
from posttrain.resources import packaged, packaged_all

MOST_VALUES = 100_000
"""In a recipe."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.MarkedYAMLError(None, None, f"key '{key.value}' is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe as plain data. Raises UserError if it is missing, is not YAML or is not a mapping.

    A recipe of the package, and files of the package that it names, are found from any directory.
    """
    try:
        text = Path(packaged(str(path))).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a recipe after --config") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give the path of a recipe after --config") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; give a YAML recipe") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a path with a null in it
        raise UserError(f"{path}: cannot be read: {error}; give the path of a recipe after --config") from None
    try:
        data = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}; check brackets, quotes and indents") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; check brackets") from None
    except (ValueError, AttributeError, TypeError):  # SafeLoader takes for granted that a date is one
        raise UserError(f"{path}: not YAML: a value is not what its tag or its form says; put text in quotes") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: is not a recipe: write one `section: value` or `key: value` a line")
    try:
        _check_plain(data, set(), itertools.count())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return packaged_all(data)


def _check_plain(value: Any, around: set[int], seen: Iterator[int]) -> None:
    """Raises ValueError for a key that is no text, and for aliases by which a few lines stand for endlessly many."""
    if next(seen) > MOST_VALUES:
        raise ValueError(f"its aliases come to more than {MOST_VALUES} values; write out what is meant")
    if not isinstance(value, dict | list):
        return
    if id(value) in around:
        raise ValueError("an alias stands for what it is a part of; write out what is meant")
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise ValueError(f"the key {_show(key)} is not text; put it in quotes")
    for item in value.values() if isinstance(value, dict) else value:
        _check_plain(item, around | {id(value)}, seen)


def check_recipe(path: str | Path, data: dict[str, Any], config: type) -> None:
    """Raise UserError for the first key that the dataclass does not have or value of the wrong type."""
    for field, problem in _problems(data, config, ""):
        raise UserError(f"{path}: {field}: {problem}")


class _Text(str):
    """Of a field that is text, whatever it looks like (1e5)."""


class _Dumper(yaml.SafeDumper):
    """Puts such text in quotes."""


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def dumped(data: Any) -> str:
    """YAML on one line, of what `completed` gave."""
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=True)


def completed(value: Any, kind: Any, whole: bool = False) -> Any:
    """The value with all settings of each entry of its lists of sections, those that it leaves out at their defaults.

    jsonargparse would take them from the entry in the same place of an earlier recipe's list, if that is as long.
    `whole`: of a section too, as each within such an entry is.
    """
    args = get_args(kind)
    if isinstance(value, str) and str in (kind, *args):
        return _Text(value)
    if (section := _section(kind)) and isinstance(value, dict):
        hints = get_type_hints(section)
        given = {name: completed(item, hints.get(name), whole) for name, item in value.items()}
        return _defaults(section) | given if whole else given
    if get_origin(kind) is list and isinstance(value, list):
        return [completed(item, args[0], whole=True) for item in value]
    return value


def _defaults(section: Any) -> dict[str, Any]:
    given = {}
    for field in dataclasses.fields(section):
        if field.default is not dataclasses.MISSING:
            given[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            made: Any = field.default_factory()
            plain = isinstance(made, list | dict)
            given[field.name] = made if plain else dataclasses.asdict(made)
    return given


def field_types(config: type, prefix: str = "") -> dict[str, Any]:
    """Every settable path of a dataclass, such as `optim.lr`, with its type; sections are walked into."""
    paths: dict[str, Any] = {}
    for name, kind in get_type_hints(config).items():
        paths[prefix + name] = kind
        if section := _section(kind):
            paths |= field_types(section, f"{prefix}{name}.")
    return paths


def suggestion(wrong: str, known: list[str], before: str = "") -> str:
    """`; did you mean ...?`, or what there is when nothing is near. `before` is put before each name."""
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {before}{near[0]}?"
    return f"; known here: {', '.join(known)}"


def describe(kind: Any) -> str:
    """A type in words for an error message."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is list:
        return f"a list, each {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each {describe(args[0])}"
    if origin is dict:
        return "a mapping"
    if dataclasses.is_dataclass(kind):
        return "a section with " + ", ".join(f.name for f in dataclasses.fields(kind))
    words = {
        list: "a list",
        dict: "a mapping",
        float: "a number",
        int: "a whole number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return words[kind]


def _section(kind: Any) -> type | None:
    """The dataclass that a section is, or may be where it may also be null; None for any other type."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return next((k for k in kinds if dataclasses.is_dataclass(k)), None)  # type: ignore[return-value]


def _problems(value: Any, kind: Any, path: str) -> Iterator[tuple[str, str]]:
    origin, args = get_origin(kind), get_args(kind)
    if (section := _section(kind)) and isinstance(value, dict):
        yield from _section_problems(value, section, path)
    elif origin is list and isinstance(value, list):
        for i, item in enumerate(value):
            yield from _problems(item, args[0], f"{path}[{i}]")
    elif origin is tuple and isinstance(value, list) and len(value) == len(args):
        for i, (item, part) in enumerate(zip(value, args, strict=True)):
            yield from _problems(item, part, f"{path}[{i}]")
    elif origin is dict and isinstance(value, dict) and args[1] is not Any:
        for name, item in value.items():
            yield from _problems(item, args[1], f"{path}.{name}")
    elif not fits(value, kind):
        yield path, f"is {_show(value)}, expected {describe(kind)}"


def _section_problems(value: dict, kind: Any, path: str) -> Iterator[tuple[str, str]]:
    hints = get_type_hints(kind)
    dot = f"{path}." if path else ""
    for name, item in value.items():
        if name not in hints:
            yield f"{dot}{name}", f"unknown key{suggestion(str(name), list(hints), dot)}"
        else:
            yield from _problems(item, hints[name], f"{dot}{name}")
    if path.endswith("]"):  # in a list nothing can be added from the command line, so a gap is an error here
        for field in dataclasses.fields(kind):
            default = field.default is not dataclasses.MISSING
            if field.name not in value and not default and field.default_factory is dataclasses.MISSING:
                yield f"{dot}{field.name}", f"is missing; expected {describe(hints[field.name])}"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value, as YAML reads it, is of a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(next(_problems(value, a, ""), None) is None for a in args)
    if kind is float:
        return _is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is dict:
        return isinstance(value, dict)
    return isinstance(kind, type) and not dataclasses.is_dataclass(kind) and isinstance(value, kind)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as text; jsonargparse reads a number
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."
