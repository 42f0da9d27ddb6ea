"""What `posttrain COMMAND --help` prints: each setting with its type, range, default and unit."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import textwrap
from typing import Annotated, Any, get_args, get_origin

from posttrain.commands import Command
from posttrain.config.fields import alternatives, bare, describe, hints, section
from posttrain.config.types import Check

WIDTH = 110


def help_text(name: str, command: Command, config: type) -> str:
    about = inspect.getdoc(config) or ""
    if command.recipes_of:  # preflight, whose settings are those of the recipe that it is given
        about = (
            f"{command.help.capitalize()}. {command.about} The keys of the recipe say which command it is for. The"
            f" settings below are that command's: {about}"
        )
    lines = [
        f"usage: posttrain {name} --config RECIPE [--section.field value ...]",
        "",
        textwrap.fill(f"{about} Options override recipes.", WIDTH),
        "",
        "  -h, --help            Show this text.",
        "  --config RECIPE       Recipe: a YAML file with the keys below. Of several, later ones win.",
        "  --print_config        Print the resolved settings as a recipe, and do nothing else.",
    ]
    if command.resumable:
        lines.append(
            "  --resume              Continue from the newest complete checkpoint of the run, if there is one."
        )
    if command.dry:
        lines.append("  --dry-run             Check all settings and paths, and print the plan.")
    return "\n".join([*lines, *_fields(config, "", None)])


def _fields(config: type, prefix: str, instance: Any, options: bool = True) -> list[str]:
    """The settings of a section, and below them those of the sections in it."""
    # Settings of the section itself come first, so that its own list is not torn apart by the sections in it.
    texts, kinds = docstrings(config), hints(config)
    plain, sections = [""], []
    for entry in dataclasses.fields(config):
        path = f"{prefix}{entry.name}"
        default = _default(entry, instance)
        inner, text = section(kinds[entry.name]), texts.get(entry.name, "")
        entries = _entries(kinds[entry.name])
        if inner is None:
            note = f"{_kind(kinds[entry.name])}, {_shown(default)}"
            plain.append(f"  {'--' + path if options else path} ({note})")
            plain.append(textwrap.indent(textwrap.fill(text, WIDTH - 6), " " * 6))
            if entries is not None:
                sections += ["", f"Each entry of {path}:", *_fields(entries, "", None, options=False)]
            continue
        about = " ".join((inspect.getdoc(inner) or "").split())
        # A method may have other defaults than the section's class, such as tdm's optim.
        given = default if dataclasses.is_dataclass(default) else None
        off = " (default: null)" if default is None else ""
        sections += ["", textwrap.fill(f"{path}{off}: {about} {text}".strip(), WIDTH)]
        sections += _fields(inner, f"{path}.", given, options)
    return [line for line in plain if line.strip()] + sections


def _entries(kind: Any) -> type | None:
    """The section that each entry of a list is."""
    kind = bare(kind)
    return section(get_args(kind)[0]) if get_origin(kind) is list else None


def _default(entry: dataclasses.Field, instance: Any) -> Any:
    """The value that a setting has in the section around it; MISSING if it must be given."""
    if instance is not None:
        return getattr(instance, entry.name)
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if default is None:
        return "default: null"
    if isinstance(default, bool):
        return f"default: {str(default).lower()}"
    return f"default: {list(default) if isinstance(default, tuple) else default}"


def _kind(kind: Any) -> str:
    """The type in words, with its range."""
    # The settings of its entries are listed in a block of their own.
    entries = _entries(kind)
    if entries is not None:
        return "a list of sections"
    members = alternatives(kind)
    words = []
    for member in members if len(members) > 1 else (kind,):
        ranges = [word for word in _ranges(member) if word]
        words.append(" ".join([describe(member), *ranges[:1]]))
    return " or ".join(words)


def _ranges(kind: Any) -> list[str]:
    words = []
    if get_origin(kind) is Annotated:
        words += [mark.words for mark in kind.__metadata__ if isinstance(mark, Check)]
    for part in get_args(kind):
        if not isinstance(part, str | Check):
            words += _ranges(part)
    return words


@functools.cache
def docstrings(config: type) -> dict[str, str]:
    """The text below each field, on one line; those of base classes too."""
    texts: dict[str, str] = {}
    # The class itself last, whose text for a field that it declares anew is the one that counts.
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = _classes(cls.__module__)[cls.__name__].body
        # The text of a field is the statement below it.
        for node, following in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                value = following.value if isinstance(following, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    texts[node.target.id] = " ".join(value.value.split())
    return texts


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    # Python keeps no text below a field, so it is read from the source; only --help needs it.
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
