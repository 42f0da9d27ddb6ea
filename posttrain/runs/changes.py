"""Settings that were changed when a run was resumed: changes.json in its directory, and comments of its recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from posttrain.config.diff import Change
from posttrain.runs.ending import newest_checkpoint
from posttrain.runs.files import replace_text
from posttrain.runs.read import read_changes


def record_changes(run: Path, changed: Sequence[Change]) -> str:
    """Adds to changes.json, and returns all of it as comments of the recipe.

    A run that has no checkpoint begins anew, with its recipe alone.
    """
    file, newest = run / "changes.json", newest_checkpoint(run)
    if newest is None:
        file.unlink(missing_ok=True)
        return ""
    table = read_changes(run)
    for setting, old, new in changed:
        table.append({"after_step": newest[0], "setting": setting, "before": old, "now": new})
    if changed:
        replace_text(file, json.dumps(table, indent=1, ensure_ascii=False))
    lines = []
    for row in table:
        before, now = json.dumps(row["before"], ensure_ascii=False), json.dumps(row["now"], ensure_ascii=False)
        lines.append(f"# resumed after step {row['after_step']} with another {row['setting']}: {before} -> {now}\n")
    return "".join(lines)
