"""Atomic writes: after a crash or a power cut a file or a directory is the old one or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Returns when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` if the block ends without an error, and is removed if not.

    `shared`: several processes may write the same file at once, each beside it under a name of its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)  # without it a power cut could leave the new name with no content
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """An empty directory to write into, which takes the place of `path` as `replacing` does.

    What a process that was killed in such a block has left beside it is removed.
    """
    temporary, old = path.with_name(f".tmp-{path.name}"), path.with_name(f".tmp-old-{path.name}")
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():  # a directory cannot be renamed over one that is not empty
            os.rename(path, old)
        os.rename(temporary, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Returns when the line, which ends with a newline, is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
