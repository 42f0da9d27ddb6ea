"""JSON from users and models: its value, or a short reason why it cannot be read."""

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, which raises ValueError alone, with a reason that a message can end in.

    Besides text that is not JSON or not UTF-8, it refuses nesting too deep to read, integers of thousands of digits,
    and text with half a character in it (a lone surrogate), which no file or server accepts.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")  # editors on Windows put a byte order mark first
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # an escape may be half of a surrogate pair; few texts have one
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON ({error.msg} at {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON to be read: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("not Unicode: it holds half of a surrogate pair") from None
    except ValueError:  # of int()
        raise ValueError("not JSON to be read: it holds a number of thousands of digits") from None
    return value


def json_line(row: Any) -> str:
    """A value as a line of a JSONL file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that a program wrote."""
    # Not splitlines, which also splits at characters that JSON leaves within a text, such as U+2028.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that only grows, without their ends; the last one is left out if a kill cut it off."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
