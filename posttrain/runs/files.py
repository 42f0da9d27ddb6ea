"""Atomic writes: after a crash or a power cut a file or a directory is the old one or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

UMASK = os.umask(0o077)
"""Of this process. It can only be read by setting it, which is safe while there are no other threads."""
os.umask(UMASK)


def sync(path: Path) -> None:
    """Returns when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems write the names in a directory at once, and refuse to be asked.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def apply_umask(path: Path) -> None:
    """Gives a file, or all files in a directory, the mode of any new file: 0666 less the umask.

    safetensors makes files that only their owner can read, whatever the umask.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_symlink() or not file.is_file():
            continue
        mode = stat.S_IMODE(file.stat().st_mode)
        wanted = mode | (0o666 & ~UMASK)
        if mode != wanted:
            with contextlib.suppress(PermissionError):  # a file system without modes, where all files are alike
                file.chmod(wanted)


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` if the block ends without an error, and is removed if not.

    `shared`: several processes may write the same file at once, each beside it under a name of its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield temporary
        apply_umask(temporary)
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
        apply_umask(temporary)
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
