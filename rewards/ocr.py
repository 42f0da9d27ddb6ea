"""Scores of rendered text: the words that a picture should carry against the lines that were read in it.

Words are NFKC-normalised, casefolded and freed of punctuation; in scripts written without spaces each
character is a word. C is the cost of the cheapest monotone alignment: a substitution costs the edit distance
over the longer length, a missing word 1, an extra word 0.5; the score is max(0, 1 - C / |T|).

Several target strings may stand in the picture in any order: each is assigned to one run of neighbouring
lines (a text may be broken over lines), no line to two texts, at the least total cost; a line that is left
over is extra text. Word order inside a text counts. Lines and texts are few, so the assignment is exact.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

MISSING = 1.0
EXTRA = 0.5
MAX_TEXTS = 10  # the exact assignment visits every subset of the texts

# Han, kana, Thai, Lao, Burmese, Khmer and the supplementary ideographs
UNSPACED = re.compile("[\u2e80-\u2fdf\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                      "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\U00020000-\U0003ffff]")  # fmt: skip


@dataclass(frozen=True)
class TextScore:
    score: float
    order_free: float  # the same costs with every order of words allowed: the gap to `score` is order errors
    missing: int  # target words without a partner
    extra: int  # words in the picture without a partner


def words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).casefold()
    # casefolding can leave a compatibility form behind, so normalise again
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return UNSPACED.sub(lambda match: f" {match.group()} ", text).split()


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def substitution(a: str, b: str) -> float:
    return edit_distance(a, b) / max(len(a), len(b))


def align(target: Sequence[str], found: Sequence[str]) -> tuple[float, int, int]:
    """(cost, missing words, extra words) of the cheapest monotone alignment."""
    row = [(EXTRA * j, 0, j) for j in range(len(found) + 1)]
    for i, word in enumerate(target, 1):
        diagonal, row[0] = row[0], (MISSING * i, i, 0)
        for j, other in enumerate(found, 1):
            best = min(
                (diagonal[0] + substitution(word, other), diagonal[1], diagonal[2]),
                (row[j][0] + MISSING, row[j][1] + 1, row[j][2]),
                (row[j - 1][0] + EXTRA, row[j - 1][1], row[j - 1][2] + 1),
            )
            diagonal, row[j] = row[j], best
    return row[-1]


def assign(targets: Sequence[Sequence[str]], lines: Sequence[Sequence[str]]) -> tuple[float, int, int]:
    """(cost, missing, extra) of the cheapest assignment of each target to its own run of neighbouring lines.

    `best[placed]` is the cheapest reading of the lines so far with the targets of the bit set `placed` found.
    """
    worst = (math.inf, 0, 0)
    runs = {
        (start, stop, i): align(target, [word for line in lines[start:stop] for word in line])
        for start in range(len(lines))
        for stop in range(start + 1, len(lines) + 1)
        for i, target in enumerate(targets)
    }
    best = [{0: (0.0, 0, 0)}]
    for stop in range(1, len(lines) + 1):
        extra = len(lines[stop - 1])
        here = {placed: (c + EXTRA * extra, m, e + extra) for placed, (c, m, e) in best[stop - 1].items()}
        for start in range(stop):
            for placed, (c, m, e) in best[start].items():
                for i in range(len(targets)):
                    if placed >> i & 1:
                        continue
                    run = runs[start, stop, i]
                    total = (c + run[0], m + run[1], e + run[2])
                    here[placed | 1 << i] = min(here.get(placed | 1 << i, worst), total)
        best.append(here)
    return min(
        (c + MISSING * absent, m + absent, e)
        for placed, (c, m, e) in best[-1].items()
        for absent in [sum(len(target) for i, target in enumerate(targets) if not placed >> i & 1)]
    )


def order_free_cost(target: Sequence[str], found: Sequence[str]) -> float:
    """The least cost over all pairings of words. Pairing is never dearer than missing plus extra."""
    if not found:
        return MISSING * len(target)
    costs = np.array([[substitution(a, b) for b in found] for a in target])
    rows, columns = linear_sum_assignment(costs)
    unmatched = MISSING * (len(target) - len(rows)) + EXTRA * (len(found) - len(rows))
    return float(costs[rows, columns].sum()) + unmatched


def score_text(texts: Sequence[str], lines: Sequence[str]) -> TextScore | None:
    """The score of the recognised `lines` against the target `texts`; None if the targets hold no word."""
    targets = [target for text in texts if (target := words(text))]
    if not targets:
        return None
    if len(targets) > MAX_TEXTS:
        raise ValueError(f"{len(targets)} texts in one picture, at most {MAX_TEXTS} can be scored")
    found = [line for text in lines if (line := words(text))]
    cost, missing, extra = assign(targets, found)
    flat = [word for target in targets for word in target]
    free = order_free_cost(flat, [word for line in found for word in line])
    return TextScore(max(0.0, 1 - cost / len(flat)), max(0.0, 1 - free / len(flat)), missing, extra)
