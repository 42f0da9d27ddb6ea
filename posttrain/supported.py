"""Where this runs. It has to be read by older versions of Python too, as far as 3.8."""

from __future__ import annotations

PYTHON = (3, 11)


def problem(version: tuple[int, int], platform: str) -> str | None:
    """Why it cannot run with this version of Python or on this platform (sys.platform); None if it can."""
    if version < PYTHON:
        wanted, found = ".".join(map(str, PYTHON)), ".".join(map(str, version))
        return f"Python: is {found}, and {wanted} or later is needed: make a new environment with it, and install there"
    if platform == "win32":
        return "Windows: is not supported: install it within WSL 2 (learn.microsoft.com/windows/wsl)"
    return None
