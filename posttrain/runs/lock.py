"""The lock that lets one command at a time write to a directory."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from posttrain.errors import UserError
from posttrain.log import log


def lock(folder: Path, holder: str = "another posttrain command") -> IO[str]:
    """The directory's lock, held until the file is closed or the process ends, however it ends.

    `holder` is who else may have it. Raises UserError if another process has it; where there are no locks, a
    warning says so.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"output: {folder}: {holder} is at work here; wait for it or stop it") from None
    except OSError as error:  # some network file systems have no locks, and a run there is better than none
        log.warning(f"{folder}: cannot be locked ({error.strerror}): let no other command write there")
    return file
