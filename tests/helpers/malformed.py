"""One structured mistake in a valid input, and what must become of it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.errors import UserError

NESTED: Any = 0
for _ in range(60):
    NESTED = [NESTED]
JUNK = [
    None, True, False, 0, -1, 1, 3.5, 1e308, -1e308, 10**30, float("inf"), float("-inf"), float("nan"), "", " ",
    "1e5", "nan", "\0", "a\0b", "../..", "/", "/dev/full", "x" * 5000, "ключ", "\x1b[31m", "'", '"', "{", "${a}", "\n",
    [], {}, [None], [[]], {"": 0}, {"a": {"a": 1}}, NESTED, [1, "a", None], "hf:", "server://none", "\u2028", "💥",
]  # fmt: skip


def nodes(data: Any, path: tuple = ()) -> list[tuple]:
    """The place of every value in a tree."""
    below = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in below for place in nodes(value, (*path, key)))]


def spoiled(data: Any, rng: random.Random) -> Any:
    """A copy with one mistake in it."""
    data = copy.deepcopy(data)
    *places, key = rng.choice(nodes(data)[1:])
    parent = data
    for place in places:
        parent = parent[place]
    how = rng.randrange(8)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice([f"{key}s", "unknown", "", "0", "a.b", " "])] = parent[key]
    elif how == 2 and isinstance(parent, dict):
        parent[str(key).upper()] = parent.pop(key)
    elif how == 3 and isinstance(parent[key], list):
        parent[key] = parent[key] * 2
    elif how == 4 and isinstance(parent[key], int | float):
        parent[key] = -parent[key] if rng.random() < 0.5 else parent[key] * 10**9
    elif how == 5:
        parent[key] = [parent[key]]
    else:
        parent[key] = rng.choice(JUNK)
    return data


def torn(text: bytes, rng: random.Random) -> bytes:
    """A file's bytes with a mistake that no editor of data would make."""
    place = rng.randrange(len(text) + 1)
    how = rng.randrange(10)
    if how == 0:
        return text[:place]
    if how == 1:
        return text[:place] + rng.choice([b"\0", b"\x07", b"\xff", b"\xc3", b"\x1b", b"\xed\xa0\x80"]) + text[place:]
    if how == 2:
        return text.decode(errors="replace").encode(rng.choice(["utf-16", "utf-32", "utf-16-le"]))
    if how == 3:
        return rng.choice([b"", b"\n\n", b"\0" * 64, b"\xef\xbb\xbf", b"[" * 200_000, b"{" * 5000, b'{"a":' * 50_000])
    if how == 4:
        return text[place:]
    if how == 5:
        return bytes(rng.randrange(256) for _ in range(200))
    if how == 6:
        return text.replace(b":", b"", 1)
    if how == 7:
        return text[:place] + rng.choice([b"{", b"}", b"[", b"]", b'"', b",", b"\t", b"'"]) + text[place:]
    if how == 8:
        return text[:place] + b"9" * 5000 + text[place:]
    return text[:place] + text[rng.randrange(len(text) + 1) :]


def jsonl(rows: list, rng: random.Random) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows).encode(
        "utf-8", "surrogatepass"
    )


def pictures(folder: Path) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = []
    for i in range(4):
        row: dict[str, Any] = {"prompt": f"prompt {i}", "source": "human", "share": 0.75, "margin": 0.1, "seed": i}
        for name in ("chosen", "rejected"):
            Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}{name}.png")
            row[name] = f"{i}{name}.png"
        rows.append(row | {"chosen_policy": "a", "rejected_policy": "b", "chosen_on_policy": True})
    return rows


def spoiled_rows(rows: list, file: Path, rng: random.Random) -> None:
    """Written as JSONL with a mistake in one row, or torn."""
    if rng.random() < 0.6:
        i = rng.randrange(len(rows))
        rows[i] = spoiled(rows[i], rng)
        file.write_bytes(jsonl(rows, rng))
    else:
        file.write_bytes(torn(jsonl(rows, rng), rng))


def refused(read: Callable[[], Any]) -> bool:
    """Whether it raises a UserError, whose message is one line that says something."""
    try:
        read()
    except UserError as error:
        said = " ".join(str(error).split())  # as the command prints it
        assert len(said) > 10, said
        return True
    return False
