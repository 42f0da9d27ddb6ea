"""Scores of rendered text: the words that an image should carry against the lines that were read in it.

Words are `folded` and freed of punctuation, but for marks that belong to a number ($3.50, 10:30, -5, 50 %) and texts
that are nothing else ("!?"); in scripts written without spaces each character is a word. C is the cost of the cheapest
monotone alignment: a substitution costs the edit distance over the longer length, a missing word 1, an extra word 0.5,
words that only a space or a hyphen divides otherwise 0.1 (ICE-CREAM, ICE CREAM); the score is max(0, 1 - C / |T|).

Several target strings may stand in the image in any order: each is assigned to one run of neighbouring
lines (a text may be broken over lines), no line to two texts, at the least total cost; a line that is left
over is extra text. Word order inside a text counts. The assignment is exact, and takes one step for each word
that was read, however many lines there are.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from posttrain.errors import UserError

MISSING = 1.0
EXTRA = 0.5
JOINED = 0.1
"""Cost of two to four words that are written as one, or of one that is written as so many."""
LONGEST_JOIN = 4
MISREAD = 0.25  # share of letters in which joined words may differ from what was read, at the same length
MAX_TEXTS = 10  # the exact assignment keeps a cost for every subset of the texts

QUOTATION_MARK = re.compile('["\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f]')
"""Straight and curly quotes, guillemets, and East Asian corner brackets."""

# Han, kana, Thai, Lao, Burmese, Khmer and the supplementary ideographs
UNSPACED = re.compile("[\u2e80-\u2fdf\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                      "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\U00020000-\U0003ffff]")  # fmt: skip

# What is not seen, or that a reader takes for the same: vowel marks of Hebrew and Arabic, tatweel, variation selectors
UNSEEN = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670"
                    "\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # fmt: skip
APOSTROPHES = str.maketrans(dict.fromkeys("`\u00b4\u2018\u2019\u2032\u02bc\uff07", "'"))
SIGNS = "@#%&\u2030"
"""Punctuation to Unicode, but read as words are."""
IN_NUMBERS = re.compile(r"(?<=\d)[^\w\s](?=\d)|(?<![\w-])[-.](?=\d)")
"""The marks of 3.50, 10:30, 24/7, 555-1234; of -5 and .5."""


@dataclass(frozen=True)
class TextScore:
    score: float
    order_free: float  # the same costs with every order of words allowed: the gap to `score` is order errors
    missing: int  # target words without a partner
    extra: int  # words in the image without a partner


def folded(text: str) -> str:
    """One form of all that looks alike: NFKC, casefolded, without invisible and vowel marks, with ASCII digits, hyphens
    and apostrophes."""
    text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).casefold()
    # casefolding can leave a compatibility form behind, so normalise again
    text = unicodedata.normalize("NFKC", text)
    text = text.replace("i\u0307", "i").replace("\u0131", "i")  # both of Turkish: casefolding does not know them
    return UNSEEN.sub("", "".join(map(_plain, text)))


def _plain(c: str) -> str:
    match unicodedata.category(c):
        case "Nd":
            return str(unicodedata.digit(c))
        case "Cf":  # zero-width spaces and joiners, soft hyphens, marks of direction, byte-order marks
            return ""
        case "Pd":
            return "-"
    return "-" if c == "\u2212" else c  # the minus sign


def words(text: str) -> list[str]:
    """The words that count, as they are compared; none of a text of nothing but punctuation."""
    text = re.sub(r"(?<=\d)\s+(?=[%\u2030])", "", folded(text))  # 50 % and 50%
    kept = {match.start() for match in IN_NUMBERS.finditer(text)}
    letters = []
    for i, c in enumerate(text):
        if i in kept or c in SIGNS or not unicodedata.category(c).startswith("P"):
            letters.append(c)
    return UNSPACED.sub(lambda match: f" {match.group()} ", "".join(letters)).split()


def edit_distances(word: str, others: Sequence[str]) -> np.ndarray:
    """(len(others),) int64: the edit distance of `word` to each of them."""
    lengths = np.array(list(map(len, others)), np.int64)
    # All rows of the usual dynamic programme lie one behind the other: len + 1 entries for each other word.
    ends = np.cumsum(lengths + 1) - 1
    starts = ends - lengths
    place = np.arange(ends[-1] + 1) - np.repeat(starts, lengths + 1)
    letters = np.array(list(map(ord, "\0" + "\0".join(others))))  # entry 0 of a row stands before its first letter
    # A running minimum over all of them must not pass from one word to the next, so each lies far below the last.
    below = np.repeat(np.arange(len(others)), lengths + 1) * -4 * (len(word) + int(lengths.max()) + 1)
    row = place.copy()
    for letter in word:
        replaced = row[:-1] + (letters[1:] != ord(letter))
        row = row + 1
        inside = place[1:] > 0
        row[1:][inside] = np.minimum(row[1:], replaced)[inside]
        shift = below - place
        row = np.minimum.accumulate(row + shift) - shift
    return row[ends]


def substitutions(target: Sequence[str], found: Sequence[str]) -> np.ndarray:
    """(T, O) float64: what each target word costs where each found word stands instead, in [0, 1]."""
    if not found:
        return np.zeros((len(target), 0))
    # A page repeats its words, so each pair of different words is compared once.
    distinct = list(dict.fromkeys(found))
    lengths = np.array(list(map(len, distinct)))
    place_of = dict(zip(distinct, range(len(distinct))))
    columns = [place_of[word] for word in found]
    rows: dict[str, np.ndarray] = {}
    for word in target:
        if word not in rows:
            rows[word] = edit_distances(word, distinct) / np.maximum(len(word), lengths)
    return np.stack([rows[word][columns] for word in target])


def joins(words: Sequence[str], others: Sequence[str]) -> Iterator[tuple[int, int, int, float]]:
    """(first, number, other, cost) where two to four neighbours of `words`, written as one, are one of `others`, with
    or without its hyphens. Lengths are alike, so that no missing letter is taken for a missing space."""
    by_length: dict[int, list[tuple[int, str]]] = {}
    for place, other in enumerate(others):
        for form in {other, other.replace("-", "")}:
            by_length.setdefault(len(form), []).append((place, form))
    for number in range(2, LONGEST_JOIN + 1):
        for first in range(len(words) - number + 1):
            joined = "".join(words[first : first + number])
            for place, other in by_length.get(len(joined), []):
                wrong = sum(a != b for a, b in zip(joined, other)) / len(joined)
                if wrong <= MISREAD:
                    yield first, number, place, JOINED + wrong


def assign(
    targets: Sequence[Sequence[str]], lines: Sequence[Sequence[str]], costs: np.ndarray | None = None
) -> tuple[float, int, int]:
    """(cost, missing, extra) of the cheapest assignment of each target to its own run of neighbouring lines; of those
    that cost the same, the one that misses fewest words and has the fewest too many.

    `costs` is `substitutions` of all target words and all found words. Lines are read once, word by word, for all
    subsets S of the targets together: `placed[S]` is the cheapest reading of the lines so far in which just the
    targets of S were found, and `running[i, j, S]` one in which target i, not of S, is being read and its first j
    words are done. A cost and its numbers of missing and of extra words are one integer, the cost in its upper bits.
    """
    total, read = sum(map(len, targets)), sum(map(len, lines))
    if costs is None:
        costs = substitutions(list(chain(*targets)), list(chain(*lines)))
    extra_bits = read.bit_length()
    bits = total.bit_length() + extra_bits
    unit = 1 << (60 - bits - (total + read).bit_length())  # a cost of 1
    never = np.int64(1) << 61  # above every cost, and far enough below 2^63 that costs can be added to it
    missing, extra = (int(MISSING * unit) << bits) + (1 << extra_bits), (int(EXTRA * unit) << bits) + 1

    n, subsets = len(targets), np.arange(1 << len(targets))
    without = [subsets[subsets >> i & 1 == 0] for i in range(n)]
    substituted = _by_target(np.rint(costs * unit).astype(np.int64) << bits, targets, int(never))
    flat = list(chain(*lines))
    ends_with: dict[int, list[tuple[int, int, int, int, int]]] = {}
    """Last word read -> joins that end there: (target, its words before, its words after, words read, cost)."""
    for i, target in enumerate(targets):
        for first, number, column, cost in joins(target, flat):
            ends_with.setdefault(column, []).append((i, first, first + number, 1, round(cost * unit) << bits))
        for column, number, j, cost in joins(flat, target):
            ends_with.setdefault(column + number - 1, []).append((i, j, j + 1, number, round(cost * unit) << bits))
    skipped = np.arange(substituted.shape[1] + 1)[:, None] * missing

    placed = np.full(1 << n, never)
    placed[0] = 0  # before the first line no target has been found
    running = np.full((n, len(skipped), 1 << n), never)
    column = 0
    before: deque[np.ndarray] = deque(maxlen=LONGEST_JOIN)
    """`running` before each of the last words; the last is the newest."""
    for line in lines:
        for i in range(n):  # a run may begin at any line
            begun = placed[without[i]] + skipped
            running[i][:, without[i]] = np.minimum(running[i][:, without[i]], begun)
        for _ in line:
            before.append(running)
            running = _with_word(running, substituted[:, :, column, None], missing, extra, skipped)
            for i, start, end, number, cost in ends_with.get(column, ()):
                # After the join any number of the target's words may be missing.
                later = before[-number][i, start] + cost + skipped[: len(skipped) - end]
                running[i, end:] = np.minimum(running[i, end:], later)
            column += 1
        placed = placed + extra * len(line)  # a line that no target takes is extra text
        for i, target in enumerate(targets):  # and end after any
            ends = without[i] | 1 << i
            placed[ends] = np.minimum(placed[ends], running[i, len(target), without[i]])

    absent = np.zeros(1 << n, np.int64)  # words of the targets that a subset leaves out
    for i, target in enumerate(targets):
        absent[without[i]] += len(target)
    best = int((placed + absent * missing).min())
    too_many = best & ((1 << extra_bits) - 1)
    return (best >> bits) / unit, (best & ((1 << bits) - 1)) >> extra_bits, too_many


def _by_target(costs: np.ndarray, targets: Sequence[Sequence[str]], never: int) -> np.ndarray:
    """(n, longest target, O) of (T, O); what is beyond a target's end is `never`."""
    longest = max(map(len, targets))
    padded = np.full((len(targets), longest, costs.shape[1]), never)
    first = 0
    for i, target in enumerate(targets):
        padded[i, : len(target)] = costs[first : first + len(target)]
        first += len(target)
    return padded


def _with_word(running: np.ndarray, substituted: np.ndarray, missing: int, extra: int, skipped: np.ndarray):
    """`running` after one more word: it is extra, or stands for the next word of the target, after which any number of
    the target's words may be missing."""
    longer = running + extra
    longer[:, 1:] = np.minimum(longer[:, 1:], running[:, :-1] + substituted)
    return np.minimum.accumulate(longer - skipped, axis=1) + skipped


def order_free_cost(costs: np.ndarray) -> float:
    """The least cost over all pairings of words, of `substitutions`. Pairing never costs more than missing plus
    extra."""
    from scipy.optimize import linear_sum_assignment  # here: it takes a second, which dry runs need not wait for

    rows, columns = linear_sum_assignment(costs)
    unmatched = MISSING * (costs.shape[0] - len(rows)) + EXTRA * (costs.shape[1] - len(rows))
    return float(costs[rows, columns].sum()) + unmatched


def score_prompt(prompt: str, texts: Sequence[str], lines: Sequence[str]) -> TextScore | None:
    """`score_text` of a prompt's texts. Raises UserError, which names the prompt, for more texts than can be scored."""
    try:
        return score_text(texts, lines)
    except ValueError as error:
        raise UserError(f"prompt {prompt!r}: texts: {error}: join or drop some") from error


def score_text(texts: Sequence[str], lines: Sequence[str]) -> TextScore | None:
    """The score of the recognised `lines` against the target `texts`; None if the targets hold no word."""
    # A text of nothing but punctuation, such as "?!", is compared as it is, and then the lines' own is read as well.
    targets = list(filter(None, [words(text) or folded(text).split() for text in texts]))
    marks = not all(map(words, filter(str.strip, texts)))
    if not targets:
        return None
    if len(targets) > MAX_TEXTS:
        raise ValueError(f"{len(targets)} texts in one image, at most {MAX_TEXTS} can be scored")
    found = list(filter(None, [words(line) or (folded(line).split() if marks else []) for line in lines]))
    flat = list(chain(*targets))
    costs = substitutions(flat, list(chain(*found)))
    cost, missing, extra = assign(targets, found, costs)
    free = min(cost, order_free_cost(costs))  # which knows of no joined words
    return TextScore(max(0.0, 1 - cost / len(flat)), max(0.0, 1 - free / len(flat)), missing, extra)
