"""Texts without this machine's paths, for pages and cards that others may see: where a file lies may name a user."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

CACHED = re.compile(r"/models--([^/]+?)--([^/]+)(/|$)")
"""In the path of a model that the hub's client has downloaded."""
WITHIN = re.compile(r"""(?<=[\s="'(\[,`])/[^\s"'=,;)\]`/]+(/[^\s"'=,;)\]`/]+)+""")
"""An absolute path within a longer text."""


def public(value: Any) -> Any:
    """The value, a text or lists and objects of texts, with absolute paths made relative to the working directory, or
    reduced to their last part where they lie elsewhere. Downloaded models have their hub ids."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(public, value))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    # A value that is one path may contain spaces and commas, at which WITHIN would end it.
    if value.startswith("/") and "\n" not in value:
        return _short(value)
    return WITHIN.sub(lambda match: _short(match[0]), value)


def _short(path: str) -> str:
    # The hub's cache has the id as a folder's name, models--OWNER--NAME, far above the files.
    if match := CACHED.search(path):
        return f"{match[1]}/{match[2]}"
    here = Path.cwd()
    # At the root of the file system every path would be below it.
    if Path(path).is_relative_to(here) and here != Path("/"):
        return str(Path(path).relative_to(here))
    return Path(path).name or path
