"""Measurements to plan from: a bench.json, or one that ships with the package, by the name of its card.

    posttrain bench --output runs/bench
    python -m posttrain.bench.measurement runs/bench/bench.json posttrain/bench/measured/h200.json

The second line makes the shipped form of a measurement: what a plan needs of each row. `commands` (seconds of whole
commands at true size, from tests/gpu) is kept if the file to write has it already. Never imports torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError

SHIPPED = Path(__file__).parent / "measured"
DEFAULT = "h200"
SETTINGS = ("scale", "batch", "group", "text", "rank", "steps", "window", "encode")
FIELDS = (
    "method", "size", "images", "images_per_second", "tflops", "share", "share_recomputed", "peak_gib",
    "block_bytes_a_token", "first_seconds", "shape", "multiple",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """The rows of a bench, and what whole commands took if that was measured."""

    path: Path
    result: dict[str, Any]
    """As in bench.json; `commands` only in shipped ones."""

    @property
    def card(self) -> str:
        return self.result["device"]

    @property
    def date(self) -> str:
        return self.result["environment"]["started"][:10]

    def row(self, method: str, size: Sequence[int] | None = None) -> dict[str, Any] | None:
        """The row of a method at the size nearest to `size` in pixels (None: the first); None without one."""
        rows = [row for row in self.result["rows"] if row["method"] == method and "failed" not in row]
        if size is None:
            return rows[0] if rows else None
        pixels = size[0] * size[1]
        # Nearest by ratio, as time grows with the number of tokens: 512 x 512 is midway from 256 x 256 to 1024 x 1024.
        return min(rows, key=lambda row: _ratio(row["size"][0] * row["size"][1], pixels), default=None)

    def command(self, name: str) -> dict[str, Any]:
        """What was measured of a whole command; {}: nothing."""
        return self.result.get("commands", {}).get(name, {})

    def is_of(self, transformer: dict[str, Any]) -> bool:
        """Whether the measured model has the blocks and the width of this config.json of a transformer."""
        width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        shape = self.result["rows"][0]["shape"]
        return (shape["blocks"], shape["width"]) == (transformer["num_layers"], width)


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


def names() -> list[str]:
    """The cards whose measurements ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load(name: str) -> Measurement:
    """A bench.json by its path, or a shipped one by its card's name. Raises UserError if it is neither, or empty."""
    path = SHIPPED / f"{name}.json" if name in names() else Path(name)
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"measured: {name}: no such file; measure with posttrain bench, or name a card that was measured:"
            f" {', '.join(names())}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"measured: {path}: not a bench.json ({error}); measure again") from None
    if not isinstance(result, dict) or not result.get("rows"):
        raise UserError(f"measured: {path}: has no rows, so it is not a bench.json; measure again")
    return Measurement(path, result)


def shipped_form(result: dict[str, Any], commands: dict[str, Any]) -> dict[str, Any]:
    """What a plan needs of a bench.json."""
    # Of the environment only what dates the measurement; the rest describes somebody's machine.
    environment = result["environment"]
    rows = []
    for row in result["rows"]:
        if "failed" in row:
            continue
        kept = {name: row[name] for name in FIELDS if name in row}
        rows.append(kept | {"ms": {"decode": row["ms"]["decode"]}} if "decode" in row["ms"] else kept)
    return {
        "device": result["device"],
        "gpu_gib": result["gpu_gib"],
        "environment": {
            "started": environment["started"],
            "packages": {"torch": environment["packages"]["torch"]},
            "commit": environment["commit"],
        },
        "settings": {name: result["settings"][name] for name in SETTINGS},
        "text_encoder_gib": result["text_encoder_gib"],
        "matmul": result["matmul"],
        "rows": rows,
        "commands": commands,
    }


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    commands = json.loads(target.read_text())["commands"] if target.exists() else {}
    target.write_text(json.dumps(shipped_form(load(str(source)).result, commands), indent=1) + "\n")


if __name__ == "__main__":
    main()
