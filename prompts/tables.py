"""Rows that people bring, of prompts, pairs or captions: JSONL, JSON, CSV, parquet, datasets on disk or on the hub.

`open_table` opens any of them. Rows are read by number, and those of JSONL, parquet and datasets do not stay in memory.
A table has `len`, `table[i]` (a row as a dict; ValueError with the reason if it cannot be read), `name(i)` for
messages, `columns`, `folder`, to which paths of images are relative, and `fingerprint`, which changes with the content;
of files it hashes names, sizes and modification times.
"""

from __future__ import annotations

import bisect
import csv
import hashlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError, counted
from prompts.parse import parse_json

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` of a dataset or of several splits writes."""
NOTATION = "write it as hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"


class JsonLines:
    """One object a line; images are paths."""

    def __init__(self, path: Path):
        self.path, self.folder = path, path.parent
        # Where each row begins in the file, and its line number: 16 bytes a row, so millions of rows fit.
        self._starts, self._lines = array("q"), array("q")
        place = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(place)
                    self._lines.append(number)
                place += len(line)
        try:
            self.columns = list(self[0]) if len(self) else []
        except ValueError as error:
            raise UserError(f"{self.name(0)}: {error}; write one object a line") from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._starts[i])
            line = file.readline()
        row = parse_json(line)
        if not isinstance(row, dict):
            raise ValueError("is not an object")
        return row

    def name(self, i: int) -> str:
        return f"{self.path}:{self._lines[i]}"

    def fingerprint(self, images: Sequence[str]) -> str:
        return _fingerprint(self, images)


class Rows:
    """Rows in memory: of a CSV file, all as text and None where a cell is empty, or of a list in a JSON file."""

    def __init__(self, path: Path, columns: Sequence[str], rows: Sequence[Any], names: Sequence[str]):
        self.path, self.folder, self.columns = path, path.parent, list(columns)
        self._rows, self._names = rows, names

    @classmethod
    def of_csv(cls, path: Path) -> Rows:
        """A file with a header, in UTF-8, separated by commas; by tabs if it is a .tsv."""
        rows, names, line = [], [], 1
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                # Strict, as a quote that is never closed would otherwise swallow all rows behind it.
                reader = csv.reader(file, delimiter=SEPARATORS[path.suffix.lower()], strict=True)
                header = next(reader, [])
                line = reader.line_num + 1
                # A row with a line break within quotes takes several lines, and is named by its first.
                for cells in reader:
                    if cells:
                        rows.append(cells)
                        names.append(f"{path}:{line}")
                    line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: is not CSV: {error}; put double quotes around texts") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise UserError(f"{path}:1: needs a header that names each column once")
        return cls(path, header, rows, names)

    @classmethod
    def of_json(cls, path: Path) -> Rows:
        try:
            rows = parse_json(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: {error}; write a list of objects, or one object a line") from None
        columns = rows[0] if rows and isinstance(rows[0], dict) else []
        return cls(path, list(columns), rows, [f"{path} row {i}" for i in range(len(rows))])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._rows[i]
        if isinstance(row, dict):
            return dict(row)
        if self.path.suffix.lower() not in SEPARATORS:
            raise ValueError("is not an object")
        if len(row) != len(self.columns):
            raise ValueError(f"has {counted(len(row), 'cell')}, and the header {len(self.columns)}")
        return {name: cell or None for name, cell in zip(self.columns, row)}

    def name(self, i: int) -> str:
        return self._names[i]

    def fingerprint(self, images: Sequence[str]) -> str:
        return _fingerprint(self, images)


class Parquet:
    """Parquet files as one table. The last row group that was read stays in memory."""

    def __init__(self, folder: Path, files: Sequence[Path], fingerprint: str | None = None):
        import pyarrow.parquet as pq

        self.folder, self.files = folder, list(files)
        self._groups: list[tuple[int, int]] = []
        """(index of the file, index of the row group in it)"""
        self._starts, self._firsts = [0], [0]
        """The first row of each row group and of each file; the last entry is the number of all rows."""
        for index, file in enumerate(self.files):
            try:
                meta = pq.read_metadata(file)
            except (OSError, ValueError) as error:
                raise UserError(f"{file}: is not a whole parquet file: {error}; copy or make it again") from None
            for group in range(meta.num_row_groups):
                self._groups.append((index, group))
                self._starts.append(self._starts[-1] + meta.row_group(group).num_rows)
            self._firsts.append(self._starts[-1])
        self.columns = pq.read_schema(self.files[0]).names
        self._cached: tuple[int, pa.Table] | None = None
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        # Rows are mostly read in order, and a row group can only be read whole.
        g = bisect.bisect_right(self._starts, i) - 1
        if self._cached is None or self._cached[0] != g:
            import pyarrow.parquet as pq

            file, group = self._groups[g]
            try:
                self._cached = (
                    g,
                    pq.ParquetFile(self.files[file], page_checksum_verification=True).read_row_group(group),
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot be read: {error}") from None
        return self._cached[1].slice(i - self._starts[g], 1).to_pylist()[0]

    def name(self, i: int) -> str:
        file = bisect.bisect_right(self._firsts, i) - 1
        return f"{self.files[file]} row {i - self._firsts[file]}"

    def fingerprint(self, images: Sequence[str]) -> str:
        return self._fingerprint or stamp(self.files)


class HubDataset:
    """A dataset that the `datasets` library has loaded."""

    def __init__(self, name: str, rows: datasets.Dataset):
        from datasets import Image, List

        self._fingerprint = rows._fingerprint  # as it was loaded: the casts below would change it
        # Images stay encoded, so that a damaged one is a bad row instead of an exception of the library.
        for column, feature in rows.features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(column, Image(decode=False))
            elif isinstance(feature, List) and isinstance(feature.feature, Image):
                rows = rows.cast_column(column, List(Image(decode=False)))
        self._name, self._rows = name, rows
        self.folder, self.columns = Path(), rows.column_names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        # A damaged Arrow file has offsets that lead anywhere, and reading there ends the process.
        if self._rows._indices is None:
            self._rows.data.slice(i, 1).validate(full=True)
        return self._rows[i]

    def name(self, i: int) -> str:
        return f"{self._name} row {i}"

    def fingerprint(self, images: Sequence[str]) -> str:
        return self._fingerprint


Table = JsonLines | Rows | Parquet | HubDataset


def open_table(source: str) -> Table:
    """A file (JSONL, a list in .json, .csv, .tsv, .parquet), a directory of parquet files or of `save_to_disk`, or
    hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, where NAME is a dataset of the hub or any path.

    SPLIT is train if it is not given and NAME is of the hub. Raises UserError for what is missing or cannot be read,
    and for a path with several splits of which none is named.
    """
    if source.startswith("hf:"):
        return _dataset(source)
    if os.path.isfile(source):  # not Path.is_file, which raises for names that no file can have
        return _open_file(source)
    if not os.path.isdir(source):
        raise UserError(f"{source}: no such file or directory; give a file, a directory or hf:NAME")
    if _is_saved(source):
        return _saved(source, source, None)
    files = sorted(Path(source).glob("**/*.parquet"))
    if not files:
        raise UserError(f"{source}: is a directory without a parquet file or a saved dataset; give a file or hf:NAME")
    _only_split(source, source, None)  # refuses files of several splits, which one table would mix
    return Parquet(Path(source), files)


def row_texts(table: Table, i: int, *names: str) -> list[str]:
    """The texts of a row in these columns. Raises UserError with the row for one that is missing, empty or not text."""
    texts = []
    for name in names:
        try:
            value = table[i][name]
        except (ValueError, KeyError) as error:
            raise UserError(f"{table.name(i)}: {name}: cannot be read: {error}") from None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{table.name(i)}: {name}: is empty or not text; fix or remove the row")
        texts.append(value.strip())
    return texts


def is_lines(path: Path) -> bool:
    """Whether a file is read as JSONL. Raises OSError if it cannot be read."""
    suffix = path.suffix.lower()
    if suffix == ".json":  # a list, or lines like any other file's
        with path.open("rb") as file:
            # A byte order mark and white space may come before the bracket.
            return not file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return suffix != ".parquet" and suffix not in SEPARATORS


def _open_file(source: str) -> Table:
    path = Path(source)
    try:
        if is_lines(path):
            return JsonLines(path)
        if path.suffix.lower() == ".json":
            return Rows.of_json(path)
        return Parquet(path.parent, [path]) if path.suffix.lower() == ".parquet" else Rows.of_csv(path)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None


def _dataset(source: str) -> Table:
    """The table of hf:NAME[[:CONFIG]:SPLIT]."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, config, split = _parts(source)
    if os.path.isfile(name) and split is None:
        return _open_file(name)
    if _is_saved(name):
        return _saved(source, name, split)
    if split is None:
        split = _only_split(source, name, config) if os.path.exists(name) else "train"
    try:
        return HubDataset(source, datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"{source}: cannot be loaded: {' '.join(str(error).split())}; {NOTATION}") from None


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and split of hf:NAME[[:CONFIG]:SPLIT]."""
    rest = source.removeprefix("hf:")
    if os.path.exists(rest):
        return rest, None, None
    name, _, rest = rest.partition(":")
    if not name:
        raise UserError(f"{source}: names no dataset; {NOTATION}")
    first, colon, second = rest.partition(":")
    if colon and "[" not in first:  # the colon of train[:100] is within the split
        return name, first, second or None
    return name, None, rest or None


def _is_saved(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in SAVED)


def _saved(source: str, path: str, split: str | None) -> Table:
    """A directory of `save_to_disk`."""
    import datasets
    from datasets.exceptions import DatasetsError

    # A damaged directory raises whatever the library stumbles over first.
    try:
        loaded = datasets.load_from_disk(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, DatasetsError) as error:
        raise UserError(f"{source}: cannot be loaded: {' '.join(str(error).split())}; save it again") from None
    if isinstance(loaded, datasets.Dataset):
        if split not in (None, str(loaded.split)):
            raise UserError(f"{source}: is saved without splits; write it as hf:{path}")
        return HubDataset(source, loaded)
    known = list(map(str, loaded))
    split = _chosen(source, path, known) if split is None else split
    if split not in loaded:
        raise UserError(f"{source}: has no split {split}; it has {', '.join(known)}")
    return HubDataset(source, loaded[split])


def _only_split(source: str, path: str, config: str | None) -> str:
    """The split of a directory of files, as `datasets` tells splits by their names and by README.md."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        known = datasets.get_dataset_split_names(path, config)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"{source}: cannot be loaded: {' '.join(str(error).split())}; {NOTATION}") from None
    return _chosen(source, f"{path}:{config}" if config else path, known)


def _chosen(source: str, path: str, splits: Sequence[str]) -> str:
    if len(splits) != 1:
        raise UserError(f"{source}: has the splits {', '.join(splits)}; name one, such as hf:{path}:{splits[0]}")
    return splits[0]


def _fingerprint(table: JsonLines | Rows, images: Sequence[str]) -> str:
    """A hash of a table's file and of the files that its columns `images` name."""
    digest = hashlib.sha256(stamp([table.path]).encode())
    for i in range(len(table)):
        try:
            row = table[i]
        except ValueError:
            continue
        files: list[Path] = []
        for name in images:
            value = row.get(name)
            paths = value if isinstance(value, list) else [value]
            files += [table.folder / path for path in paths if isinstance(path, str)]
        digest.update(stamp([file for file in files if os.path.isfile(file)]).encode())
    return digest.hexdigest()


def stamp(files: Sequence[Path]) -> str:
    """A hash of names, sizes and modification times: hashing the images of a large set would take hours."""
    facts = []
    for file in files:
        try:
            status = file.stat()
        except OSError:  # a link to nothing, which is a bad row when it is read
            facts.append(f"{file.name} missing")
            continue
        facts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
