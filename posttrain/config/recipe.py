"""Reads recipes (YAML) and the values of options, as plain data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.fields import show
from posttrain.errors import UserError
from posttrain.resources import packaged, packaged_all

MOST_VALUES = 100_000
"""In a recipe."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: list[Any] = []  # a key may be a list, which no set takes
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key '{key.value}' is given twice", key.start_mark)
            seen.append(key.value)
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
    """Raises ValueError for a key that is not text, and for aliases by which a few lines stand for endlessly many."""
    if next(seen) > MOST_VALUES:
        raise ValueError(f"its aliases come to more than {MOST_VALUES} values; write out what is meant")
    if not isinstance(value, dict | list):
        return
    # YAML can tie a list to itself, and nothing that walks it would ever end.
    if id(value) in around:
        raise ValueError("an alias stands for what it is a part of; write out what is meant")
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise ValueError(f"the key {show(key)} is not text; put it in quotes")
    for item in value.values() if isinstance(value, dict) else value:
        _check_plain(item, around | {id(value)}, seen)


def read_value(option: str) -> Any:
    """The value of an option, as YAML reads it; values that are not valid YAML are kept as strings."""
    try:
        return yaml.safe_load(option)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        return option
