"""JSON that someone else wrote: a value, or in a few words why it is none."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, which raises ValueError alone, with a reason that a message can end in.

    Refused besides what is no JSON, or no UTF-8, is what is nested too deeply to be read, an integer of thousands of
    digits, and text with half a character in it (a lone surrogate), which no file or server takes.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
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
