"""From recipes and options to the checked settings of a command.

Recipes and options are laid over the defaults as plain data, later ones over earlier ones: sections key by key,
everything else whole, lists too. The result is checked once, by the class of the settings (types.py). A problem is told
with the place that the value came from.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Any, get_origin

import yaml
from pydantic import ValidationError

from posttrain import commands
from posttrain.commands import Command
from posttrain.config.fields import alternatives, bare, describe, field_types, hints, section, suggestion
from posttrain.config.recipe import read_recipe, read_value
from posttrain.config.types import ConfigError, explain
from posttrain.errors import UserError

COMMAND_LINE = "command line"


@dataclass
class Given:
    """What a command line gives: recipes, options by their path with their text, and flags."""

    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)


def make(config: type, data: dict[str, Any]) -> Any:
    """Settings from plain data. Raises ConfigError."""
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(config).validate_python(data)
    except ValidationError as error:
        raise explain(config, error) from None


def load_config(name: str, words: list[str]) -> tuple[Any, bool]:
    """The checked settings of a command from its arguments, and whether --resume was given.

    Raises UserError for a missing file, an unknown key, a wrong type or a value out of range.
    """
    command = commands.get(name)
    assert command is not None, name
    config, given = split(command, words)
    return resolve(config, given), "resume" in given.flags


def split(command: Command, words: list[str]) -> tuple[type, Given]:
    """The class of the settings, which the recipes may decide, and what the arguments give."""
    given, rest = Given(), []
    at = 0
    while at < len(words):
        option, equals, value = words[at].partition("=")
        # Recipes are read first, wherever they stand: what they hold decides which options there are.
        if option == "--config":
            if not equals:
                value = _value_of(option, words, at)
                at += 1
            given.recipes[value] = read_recipe(value)
        else:
            rest.append(words[at])
            if option.startswith("--") and not equals and at + 1 < len(words) and not _is_option(words[at + 1]):
                rest.append(words[at + 1])  # kept beside its option, whatever it looks like
                at += 1
        at += 1
    config = _class_for(command, given.recipes)
    _read_options(config, command, rest, given)
    if command.any_recipe:
        known = hints(config)
        for path, data in given.recipes.items():
            given.recipes[path] = {key: value for key, value in data.items() if key in known}
    return config, given


def _class_for(command: Command, recipes: dict[str, dict[str, Any]]) -> type:
    """The settings that know most keys of the recipes."""
    # A recipe does not name its command, but its keys tell.
    keys = set(itertools.chain(*recipes.values()))
    choices = [command.settings()]
    for name in command.recipes_of:
        other = commands.get(name)
        assert other is not None
        choices.append(other.settings())
    return min(choices, key=lambda config: len(keys - set(hints(config))))


# ---- options ----------------------------------------------------------------------------------------------------


def _is_option(word: str) -> bool:
    return word.startswith("--")


def _value_of(option: str, words: list[str], at: int) -> str:
    if at + 1 >= len(words) or _is_option(words[at + 1]):
        raise UserError(f"{COMMAND_LINE}: {option}: expected one argument")
    return words[at + 1]


def _read_options(config: type, command: Command, words: list[str], given: Given) -> None:
    """Puts options and flags into `given`."""
    types = field_types(config)
    flags = {"help", "print_config"} | ({"resume"} if command.resumable else set())
    flags |= {"dry-run"} if command.dry else set()
    at = 0
    while at < len(words):
        word = words[at]
        if word == "-h":
            word = "--help"
        if not _is_option(word):
            raise UserError(f"{COMMAND_LINE}: '{word}' is not an option; a recipe is given as --config {word}")
        option, equals, value = word.partition("=")
        path = option.removeprefix("--")
        path = command.aliases.get(path, path)
        at += 1
        if path in flags and not equals:
            given.flags.add(path)
        elif path not in types:
            known = ["config", *sorted(flags), *types]
            raise UserError(f"{COMMAND_LINE}: {option}: unknown option{suggestion(path, known, '--')}")
        elif equals:
            given.options[path] = value
        # A switch needs no value: `--json` alone is true.
        elif bare(types[path]) is bool and (at == len(words) or _is_option(words[at])):
            given.options[path] = "true"
        else:
            count = _words_of(types[path], option, words, at)
            given.options[path] = words[at] if not count else json.dumps(words[at : at + count])
            at += count or 1


def _words_of(kind: Any, option: str, words: list[str], at: int) -> int:
    """How many words after an option are the entries of its list of texts (`--references a.png b.png`); 0: one word, as
    a recipe would have it."""
    first = _value_of(option, words, at - 1)
    if bare(kind) != list[str] or isinstance(read_value(first), list | None):
        return 0
    return len([*itertools.takewhile(lambda word: not _is_option(word), words[at:])])


def _option_value(text: str, kind: Any) -> Any:
    """An option's value. Where text is expected it stays as it is, so that a prompt may look like a number."""
    members = list(map(bare, alternatives(kind)))
    # As in a recipe, so that lists, numbers and null are written alike in both.
    value = read_value(text)
    if str in members and not (value is None and type(None) in members):
        # Where a list or a mapping may stand too, it is one if it is written as one.
        others = list(map(get_origin, members))
        if not (isinstance(value, list | dict) and type(value) in others):
            return text
    return value


# ---- laying over one another ------------------------------------------------------------------------------------


def defaults(config: type) -> dict[str, Any]:
    """The defaults of a section as plain data. What must be given is left out, but for sections: they are walked into,
    so that a missing setting is named and not its section."""
    made: dict[str, Any] = {}
    kinds = hints(config)
    for entry in dataclasses.fields(config):
        # pydantic would take the class's own default, also where the section around it sets another.
        if entry.default is not dataclasses.MISSING:
            made[entry.name] = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            value: Any = entry.default_factory()
            made[entry.name] = dataclasses.asdict(value) if section(type(value)) else value
        elif (inner := section(kinds[entry.name])) is not None:
            made[entry.name] = defaults(inner)
    return made


def lay_over(base: dict[str, Any], data: dict[str, Any], config: type) -> dict[str, Any]:
    """`data` over `base`."""
    kinds = hints(config)
    laid = dict(base)
    for key, value in data.items():
        inner = section(kinds.get(key))
        if inner is not None and isinstance(value, dict):
            # A section that was null until now begins at its own defaults.
            below = base.get(key)
            laid[key] = lay_over(below if isinstance(below, dict) else defaults(inner), value, inner)
        else:
            laid[key] = value
    return laid


def resolve(config: type, given: Given) -> Any:
    """The checked settings. Raises UserError that says where the wrong value came from."""
    types = field_types(config)
    data = _laid(config, given, types)
    try:
        return make(config, data)
    except ConfigError as error:
        first, *others = [_with_source(problem, config, given, types) for problem in (error, *error.others)]
        raise UserError("; also ".join([first, *others])) from None


def _laid(config: type, given: Given, types: dict[str, Any]) -> dict[str, Any]:
    """Defaults, recipes and options over one another."""
    data = defaults(config)
    for recipe in given.recipes.values():
        # Each recipe is laid over what came before, so what it spoils is spoiled for all: it is checked at the end.
        data = lay_over(data, recipe, config)
    for path, text in given.options.items():
        # As a recipe with this one value, so that sections merge in the same way.
        value = _option_value(text, types[path])
        for part in reversed(path.split(".")):
            value = {part: value}
        data = lay_over(data, value, config)
    return data


def _with_source(error: ConfigError, config: type, given: Given, types: dict[str, Any]) -> str:
    """The message of a problem, which begins with the place that it came from."""
    if error.kind == "missing":
        # Nothing sets it, so the last recipe is the one to add it to.
        where = list(given.recipes)[-1] if given.recipes else COMMAND_LINE
        options = " and ".join(f"--{path}" for path in error.field.split(", "))
        return f"{where}: {error.field}: missing; add it to the recipe or pass {options}"
    problem = error.problem
    # An option gives a list as a whole, so entries are looked for under its name.
    path = re.sub(r"\[.*", "", error.field)
    if error.kind == "type" and error.field in given.options:
        problem = f"is '{given.options[error.field]}', expected {describe(types[error.field])}"
    source = _source(path, given)
    if source != COMMAND_LINE and (option := _culprit(error, config, given, types)) is not None:
        source = f"{COMMAND_LINE}: with --{option} {given.options[option]}"
    return f"{source}: {error.field}: {problem}"


def _culprit(error: ConfigError, config: type, given: Given, types: dict[str, Any]) -> str | None:
    """The option without which a recipe's value would fit: limits may depend on other settings."""
    for option in given.options if error.kind == "range" else ():
        options = {path: text for path, text in given.options.items() if path != option}
        without = Given(given.recipes, options, given.flags)
        try:
            make(config, _laid(config, without, types))
        except ConfigError as other:
            # Where something is missing, limits are not looked at.
            if other.kind == "missing" or error.field in (other.field, *(one.field for one in other.others)):
                continue
        return option
    return None


def _source(path: str, given: Given) -> str:
    """Where a value came from: the command line, which wins, or the last recipe that sets it."""
    parts = path.split(".")
    # A section may be given whole, so an option of any of the sections around counts.
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if not given.options.keys().isdisjoint(around) or not given.recipes:
        return COMMAND_LINE
    for recipe, data in reversed(given.recipes.items()):
        value: Any = data
        for part in parts:
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            return recipe
    return list(given.recipes)[-1]


def printed(config: Any) -> str:
    """The settings as a recipe."""
    data = dataclasses.asdict(config)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Tuples as lists; short lists of plain values, such as [512, 512], on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list that stands twice is written twice


def _list(dumper: yaml.SafeDumper, value: list | tuple) -> yaml.Node:
    flow = not any(isinstance(entry, dict) for entry in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", list(value), flow_style=flow)


_Dumper.add_representer(tuple, _list)
_Dumper.add_representer(list, _list)
