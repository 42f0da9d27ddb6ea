"""Images with captions beside them, as tables: a folder of files, or tar files as webdataset writes them.

| beside `a/fox.jpg` (in a tar: with the same name up to the first dot) | becomes |
|---|---|
| `a/fox.txt` | the column `caption`: the whole file, in UTF-8 |
| `a/fox.json` | a column for each key of its object |

Both have the interface of the tables of prompts/tables.py. Rows are read when they are asked for.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import UserError, counted
from posttrain.image_reader import SUFFIXES
from prompts.parse import parse_json
from prompts.tables import SAVED, Table, open_table, stamp

TEXTS = (".txt", ".json")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Folder:
    """A directory of image files, also in directories below it, in the order of their paths."""

    def __init__(self, folder: Path):
        self.path, self.folder = folder, folder
        self._rows: list[dict[str, Path]] = []
        """By suffix, the files of an image."""
        images: list[Path] = []
        texts: dict[Path, Path] = {}
        for file in sorted(folder.rglob("*")):
            if file.name.startswith("."):  # what systems put beside files, such as ._fox.jpg
                continue
            if file.suffix.lower() in SUFFIXES and file.is_file():
                images.append(file)
            elif file.suffix.lower() in TEXTS:
                texts[file.with_suffix(file.suffix.lower())] = file
        for image in images:
            row = {"": image}
            for suffix in TEXTS:
                text = texts.get(image.with_suffix(suffix))
                if text is not None:
                    row[suffix] = text
            self._rows.append(row)
        self.columns = _columns(self, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._rows[i]
        texts = {suffix: _bytes_of(file) for suffix, file in row.items() if suffix in TEXTS}
        return _columns_of(texts) | {"image": str(row[""].relative_to(self.folder))}

    def name(self, i: int) -> str:
        return str(self._rows[i][""])

    def fingerprint(self, images: Sequence[str]) -> str:
        """Of the names, sizes and times of all files."""
        files: list[Path] = []
        for row in self._rows:
            files += row.values()
        # Relative, so that a folder may be moved without being encoded again.
        names = "\n".join(str(file.relative_to(self.folder)) for file in files)
        return hashlib.sha256((names + stamp(files)).encode()).hexdigest()


class Tars:
    """Uncompressed tar files, in which the files of an image have one name and stand in any order."""

    def __init__(self, folder: Path, files: Sequence[Path]):
        self.folder, self.files = folder, list(files)
        self._rows: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        """Index of the tar, name of the image, and by suffix where a file begins and how long it is."""
        for index, file in enumerate(self.files):
            samples: dict[str, dict[str, tuple[int, int]]] = {}
            for member in _members(file):
                # Webdataset's rule: the extension begins at the first dot of the file's name.
                directory, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if member.isreg() and stem:
                    place = (member.offset_data, member.size)
                    samples.setdefault(directory + slash + stem, {})[(dot + suffix).lower()] = place
            for name, parts in samples.items():
                self._rows.append((index, name, parts))
        self.columns = _columns(self, [parts.keys() for _, _, parts in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        index, _, parts = self._rows[i]
        try:
            # Read at its place, as opening a tar with tarfile would go through all its headers for each image.
            with self.files[index].open("rb") as file:
                read = {}
                for suffix, (start, size) in parts.items():
                    if suffix in (*TEXTS, *SUFFIXES):
                        file.seek(start)
                        read[suffix] = file.read(size)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        image = next((read[suffix] for suffix in SUFFIXES if suffix in read), None)
        return _columns_of(read) | {"image": image}

    def name(self, i: int) -> str:
        index, name, _ = self._rows[i]
        return f"{self.files[index]}: {name}"

    def fingerprint(self, images: Sequence[str]) -> str:
        return stamp(self.files)


Source = Table | Folder | Tars


def open_source(source: str) -> Source:
    """What a recipe names: a folder of images or of tar files, a tar file, or what `open_table` opens. A folder with
    parquet files or a saved dataset is that. Raises UserError for what is missing or cannot be read, and for a folder
    of images and tar files, which may be the same images or others."""
    path = Path(source)
    if source.lower().endswith(COMPRESSED):
        raise UserError(f"{source}: is compressed, so that no image of it can be read alone; unpack it to a .tar")
    if os.path.isfile(source) and path.suffix.lower() == ".tar":
        return Tars(path.parent, [path])
    if not os.path.isdir(source) or any((path / name).is_file() for name in SAVED) or any(path.rglob("*.parquet")):
        return open_table(source)
    folder = Folder(path)
    if tars := sorted(path.rglob("*.tar")):
        if len(folder):
            raise UserError(
                f"{source}: holds {counted(len(folder), 'image')} and {counted(len(tars), 'tar file')}, such as"
                f" {tars[0].name}; give a folder of the one or of the other"
            )
        return Tars(path, tars)
    if not len(folder):
        raise UserError(
            f"{source}: holds no image ({', '.join(SUFFIXES)}), no .tar, no parquet file and no saved dataset; give"
            " the folder of the images"
        )
    return folder


def _columns(table: Folder | Tars, kinds: Sequence[Container[str]]) -> list[str]:
    """The columns of a table, of which `kinds` hold the suffixes of each row's files."""
    columns: dict[str, None] = {"image": None}
    if any(".txt" in kind for kind in kinds):
        columns["caption"] = None
    # The keys of the first JSON that can be read: all are alike, or a row that is not says so itself.
    for i, kind in enumerate(kinds):
        if ".json" in kind:
            try:
                columns |= dict.fromkeys(table[i])
                break
            except ValueError:
                continue
    return list(columns)  # a dict keeps the order, and a key of a JSON may be `caption` too


def _columns_of(texts: Mapping[str, bytes]) -> dict[str, Any]:
    """Columns from the texts beside an image. Raises ValueError for one that cannot be read."""
    row: dict[str, Any] = {}
    if ".txt" in texts:
        try:
            row["caption"] = texts[".txt"].decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("its .txt is not UTF-8 text; save it as UTF-8") from None
    if ".json" in texts:
        try:
            value = parse_json(texts[".json"])
        except ValueError as error:
            raise ValueError(f"its .json: {error}") from None
        if not isinstance(value, dict):
            raise ValueError('its .json is not an object, such as {"caption": "a fox"}')
        row |= value
    return row


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file.name}: cannot be read: {error.strerror}") from None


def _members(file: Path) -> list[tarfile.TarInfo]:
    """Headers alone are read, not what is in the files. Raises UserError for a tar that is cut off."""
    try:
        with tarfile.open(file, "r:") as tar:
            members = tar.getmembers()
            last = members[-1] if members else None
            # Files are padded to whole blocks.
            end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if last else 0
        with file.open("rb") as data:
            data.seek(end)
            # A tar that is cut between two files has no empty block at its end, and tarfile does not mind.
            if any(data.read(tarfile.BLOCKSIZE)) or data.tell() != end + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
            return members
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file}: is not a whole, uncompressed tar file: {error}; copy or make it again") from None
