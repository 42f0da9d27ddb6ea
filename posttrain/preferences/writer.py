"""Writes a set of pairs in shards of parquet; dataset.py has its columns, and reads it."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from posttrain.errors import UserError, counted
from posttrain.preferences.dataset import CARD, FEATURES, VERSION, Preference, problem_of, shards_of
from posttrain.runs.files import replacing
from posttrain.training.checkpoint import is_full

README = "README.md"
ROW_GROUP = 16
"""Rows that are read at once."""
SHARD_BYTES = 2**27
"""A shard is also full when its images take this many bytes."""


def row_of(pair: Preference) -> dict[str, Any]:
    """A pair as a row of a set, with its images as PNG. Raises ValueError for an invalid pair."""
    if problem := problem_of(pair):
        raise ValueError(f"{pair.prompt!r}: {problem}")
    row = {name: getattr(pair, name) for name in FEATURES}
    row["references"] = []
    for shown in pair.references:
        row["references"].append({"image": {"bytes": _png(shown.image), "path": None}, "strength": shown.strength})
    for name in ("chosen", "rejected"):
        row[name] = {"bytes": _png(row[name]), "path": None}
    return row


class PreferenceWriter:
    """Writes a set in whole shards, so that a writer that was killed can resume after `written` pairs.

    `card` is added to preferences.json: anything that JSON can hold. It may grow until the end of the `with` block,
    which writes it. After an exception, pairs that are in no shard yet are lost, and the set stays unfinished.
    """

    def __init__(
        self, path: str | Path, resume: bool = False, rows: int = 256, card: Mapping[str, Any] | None = None
    ) -> None:
        """`rows` is the most of a shard. Raises UserError for a finished set, and without `resume` for any other."""
        self.path, self.rows, self.card = Path(path), rows, dict(card or {})
        if (self.path / CARD).exists():
            raise UserError(f"{self.path}: holds a finished set of pairs; choose another directory")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made: {error.strerror}; choose another directory") from None
        for left_over in self.path.glob(".shard-*"):  # of a writer that was killed
            left_over.unlink()
        # Other files than shards count too: a wrong directory must not be written into.
        if any(self.path.iterdir()) and not resume:
            raise UserError(f"{self.path}: is not empty; go on with what is there, or choose another directory")
        self._pending: list[dict[str, Any]] = []
        self._bytes = 0
        self._shards = shards_of(self.path)

    @property
    def written(self) -> int:
        """Pairs in whole shards."""
        return sum(self._shards.values())

    def add(self, pair: Preference) -> None:
        self.add_row(row_of(pair))

    def add_row(self, row: dict[str, Any]) -> None:
        """Adds a row of `row_of`, which may come from another process."""
        self._bytes += len(row["chosen"]["bytes"]) + len(row["rejected"]["bytes"])
        self._pending.append(row)
        if len(self._pending) >= self.rows or self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the pending rows as a shard."""
        if not self._pending:
            return
        name = f"shard-{len(self._shards):05d}.parquet"
        table = pa.Table.from_pylist(self._pending, schema=FEATURES.arrow_schema)
        # Readers take one row group at a time, and check its pages: a damaged one is a bad row, not another image.
        options = {"row_group_size": ROW_GROUP, "write_page_checksum": True}
        _replace(self.path / name, lambda file: pq.write_table(table, file, **options))
        self._shards[name] = len(self._pending)
        self._pending, self._bytes = [], 0

    def __enter__(self) -> PreferenceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is not None:
            return
        self.flush()
        # Counted from the files, since an earlier writer may have written some of them.
        digest, sources, on_policy = hashlib.sha256(), Counter(), 0
        names = ["id", "share", "source", "chosen_on_policy", "rejected_on_policy"]
        for shard in self._shards:
            for row in pq.read_table(self.path / shard, columns=names).to_pylist():
                digest.update(f"{row['id']} {row['share']!r}\n".encode())
                sources[row["source"]] += 1
                on_policy += row["chosen_on_policy"] or row["rejected_on_policy"]
        counts = {"rows": self.written, "sources": dict(sources), "on_policy": on_policy}
        files = {"shards": self._shards, "fingerprint": digest.hexdigest()}
        card = json.dumps({**self.card, "version": VERSION, **counts, **files}, indent=1, ensure_ascii=False)
        # Tells `datasets` which files hold rows; otherwise it would guess, and preferences.json is none of them.
        readme = '---\nconfigs:\n- config_name: default\n  data_files: "*.parquet"\n---\n'
        readme += f"{counted(self.written, 'preference pair')}.\n"
        _replace(self.path / README, lambda file: file.write(readme.encode()))
        # Last: a set with a card is finished.
        _replace(self.path / CARD, lambda file: file.write(f"{card}\n".encode()))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _replace(path: Path, write: Any) -> None:
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            write(file)
    except OSError as error:
        reason = "no space left; free some, then go on" if is_full(error) else f"cannot be written: {error.strerror}"
        raise UserError(f"{path}: {reason}") from error
