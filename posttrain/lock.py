"""One command at a time writes to a directory."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from prompts.errors import UserError


def lock(folder: Path, besides: str = "") -> IO[str]:
    """The directory's lock, held until the file is closed or the process ends, however it ends.

    `besides` is put into the message. Raises UserError if another process has it, OSError if there can be none.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"output: {folder}: another posttrain command, {besides}is at work here; wait for it or stop it"
        ) from None
    except OSError:
        file.close()
        raise
    return file
