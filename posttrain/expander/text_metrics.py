"""Format checks of an expansion, and text metrics of a group of expansions.

The format check returns every cause that applies:

| cause | the expansion |
|---|---|
| empty | has no letter or digit |
| truncated | ended at the length limit, without the model's end token |
| language | is mostly in a script that the prompt does not use |
| leaked | contains a tag of the chat template, or a passage of the template's own text |
| paragraphs | has more than one paragraph |
| thinking | is not the end of an answer with at most one thought, at its start, of a bounded length (thinking.py) |

Only the script is compared: an English answer to a French prompt passes. Han characters and kana count as one script,
because a short Japanese prompt may have no kana. Text in quotation marks is ignored on both sides, since it is copied.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

CAUSES = ("empty", "truncated", "language", "leaked", "paragraphs", "thinking")
SHINGLE = 8
"""So many consecutive words of the template count as leaked; shorter passages occur in any caption."""
TAG = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?(?:s|think|system|user|assistant|tool_call)>|\[/?INST\]|<<SYS>>", re.IGNORECASE
)
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」')
KANA = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")


def causes(
    prompt: str, expansion: str, ended: bool, template: str, special: Sequence[str] = (), thought_ok: bool = True
) -> list[str]:
    """The CAUSES that apply. `special` are special tokens that the model wrote before its end token, `thought_ok` says
    whether what stood before the expansion has the form of a thought."""
    applies = {
        "empty": not any(c.isalnum() for c in expansion),
        "truncated": not ended,
        "language": not same_script(prompt, expansion),
        "leaked": bool(special) or leaked(prompt, expansion, template),
        "paragraphs": re.search(r"\n\s*\n", expansion.strip()) is not None,
        "thinking": not thought_ok,
    }
    return [cause for cause in CAUSES if applies[cause]]


def same_script(prompt: str, expansion: str) -> bool:
    """Whether most letters of the expansion are in the scripts of the prompt; True where either has no letters."""
    # a caption may quote a foreign sign
    wanted, written = scripts(QUOTED.sub(" ", prompt)), scripts(QUOTED.sub(" ", expansion))
    if not wanted or not written:
        return True
    matching = sum(written[script] for script in wanted)
    return 2 * matching > written.total()


def scripts(text: str) -> Counter[str]:
    """Number of letters by script, as Unicode names it: LATIN, CYRILLIC, ...; kana count as CJK."""
    counts: Counter[str] = Counter()
    for letter in filter(str.isalpha, text):
        script = unicodedata.name(letter, "?").split()[0]  # "LATIN SMALL LETTER A"
        counts["CJK" if script in KANA else script] += 1
    return counts


def leaked(prompt: str, expansion: str, template: str) -> bool:
    """Whether the expansion contains a tag of a chat template, or SHINGLE consecutive words of the template.

    Text of the prompt itself may be repeated.
    """
    if TAG.search(expansion) and not TAG.search(prompt):
        return True
    forbidden = set(_shingles(template)) - set(_shingles(prompt))
    return not forbidden.isdisjoint(_shingles(expansion))


def quoted(prompt: str) -> list[str]:
    """The texts in quotation marks."""
    # one group of the pattern for each kind of quotation mark, all but one of them empty
    return [next(filter(None, match)) for match in QUOTED.findall(prompt)]


def verbatim(texts: Sequence[str], expansion: str) -> bool | None:
    """Whether the expansion contains all these texts exactly; None if there are none."""
    return all(text in expansion for text in texts) if texts else None


def distinct(expansions: Sequence[str], n: int) -> float | None:
    """Share of distinct word n-grams among all n-grams of a group of expansions, in (0, 1]; None if there are none."""
    grams: list[tuple[str, ...]] = []
    for text in expansions:
        grams += _grams(_words(text), n)
    return len(set(grams)) / len(grams) if grams else None


def _shingles(text: str) -> Iterator[tuple[str, ...]]:
    words = _words(text)
    # a template of up to three words would forbid common phrases
    return _grams(words, min(SHINGLE, len(words))) if len(words) > 3 else iter(())


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
