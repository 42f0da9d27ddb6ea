"""Rows of `make gpu` as a Markdown table.

python -m tests.gpu.table runs/gpu.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "command": "command",
    "recipe": "recipe",
    "first_step": "seconds to the first step",
    "step": "seconds a step",
    "images_s": "images a second",
    "peak_gib": "peak GiB",
    "seconds": "seconds in all",
}


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """The newest row of each command and recipe."""
    newest = {(row["command"], row["recipe"]): row for row in rows}
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in newest.values():
        lines.append("| " + " | ".join(cell(row.get(key)) for key in COLUMNS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gpu.jsonl")
    print(table([json.loads(line) for line in file.read_text().splitlines()]))
