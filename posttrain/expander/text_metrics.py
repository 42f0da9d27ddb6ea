"""What an expansion may not be, and figures of a group of them. Texts in, plain numbers out.

The format check names every cause that applies:

| cause | the expansion |
|---|---|
| empty | has no letter or digit |
| truncated | ended without the model's end token: it ran into the length limit |
| language | is mostly in a script that the prompt is not written in |
| leaked | holds a tag of the chat template, or a stretch of the template's own text |

The language is told by its script alone, so English for a French prompt passes, and Han characters and kana are one
script, since a short Japanese prompt may have no kana. Text in quotation marks counts on neither side: it is copied.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

CAUSES = ("empty", "truncated", "language", "leaked")
SHINGLE = 8
"""Words in a row of the template that count as leaked; fewer are common in any caption."""
TAG = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?(?:s|think|system|user|assistant|tool_call)>|\[/?INST\]|<<SYS>>", re.IGNORECASE
)
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」')
KANA = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")


def causes(prompt: str, expansion: str, ended: bool, template: str, special: Sequence[str] = ()) -> list[str]:
    """Which of CAUSES apply. `special` are the tokenizer's special tokens that the model wrote before its end."""
    found = {
        "empty": not any(c.isalnum() for c in expansion),
        "truncated": not ended,
        "language": not same_script(prompt, expansion),
        "leaked": bool(special) or leaked(prompt, expansion, template),
    }
    return [cause for cause in CAUSES if found[cause]]


def same_script(prompt: str, expansion: str) -> bool:
    """Whether most letters of the expansion are in the scripts of the prompt; True where either has no letters."""
    wanted, written = scripts(QUOTED.sub(" ", prompt)), scripts(QUOTED.sub(" ", expansion))
    if not wanted or not written:
        return True
    return 2 * sum(count for script, count in written.items() if script in wanted) > sum(written.values())


def scripts(text: str) -> Counter[str]:
    """Letters by script, as Unicode names it: LATIN, CYRILLIC, ...; kana are among CJK."""
    names = (unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    return Counter("CJK" if name in KANA else name for name in names)


def leaked(prompt: str, expansion: str, template: str) -> bool:
    """Whether tags of a chat template, or SHINGLE words in a row of the template's text, are in the expansion.

    What the prompt itself says may be repeated.
    """
    if TAG.search(expansion) and not TAG.search(prompt):
        return True
    return bool((set(_shingles(template)) - set(_shingles(prompt))) & set(_shingles(expansion)))


def quoted(prompt: str) -> list[str]:
    """The texts that stand in quotation marks."""
    return [next(filter(None, match)) for match in QUOTED.findall(prompt)]


def verbatim(texts: Sequence[str], expansion: str) -> bool | None:
    """Whether the expansion holds all these texts exactly; None where there are none."""
    return all(text in expansion for text in texts) if texts else None


def distinct(expansions: Sequence[str], n: int) -> float | None:
    """Share of different n-grams of words among all in a group of expansions, in (0, 1]; None where there are none."""
    grams = [gram for text in expansions for gram in _grams(_words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def _shingles(text: str) -> Iterator[tuple[str, ...]]:
    words = _words(text)
    return _grams(words, min(SHINGLE, len(words))) if len(words) > 3 else iter(())


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
