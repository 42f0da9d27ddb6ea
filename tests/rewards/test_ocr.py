"""Rendered text: the golden numbers, and what must hold for every reading."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from rewards import ocr
from rewards.ocr import EXTRA, MAX_TEXTS, MISSING, assign, edit_distances, score_text, words


def edit_distance(a: str, b: str) -> int:
    """By the usual programme, letter by letter."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def join(words: Sequence[str], other: str) -> float:
    """Cost of several words for one, .1 and what is misread, if lengths are alike and it is at most a quarter."""
    joined = "".join(words)
    wrong = sum(map(str.__ne__, joined, other)) / len(other) if len(joined) == len(other) else 1.0
    return 0.1 + wrong if wrong <= 0.25 else math.inf


def align(target: Sequence[str], found: Sequence[str]) -> float:
    """Cost of the cheapest monotone alignment, word by word."""
    costs = {(0, 0): 0.0}
    for i, j in itertools.product(range(len(target) + 1), range(len(found) + 1)):
        ways = [costs[i - 1, j] + MISSING] if i else []
        ways += [costs[i, j - 1] + EXTRA] if j else []
        if i and j:
            word, other = target[i - 1], found[j - 1]
            ways.append(costs[i - 1, j - 1] + edit_distance(word, other) / max(len(word), len(other)))
            ways += [costs[i - k, j - 1] + join(target[i - k : i], other) for k in range(2, min(i, 4) + 1)]
            ways += [costs[i - 1, j - k] + join(found[j - k : j], word) for k in range(2, min(j, 4) + 1)]
        costs[i, j] = min(ways, default=0.0)
    return costs[len(target), len(found)]


def best_assignment(targets: list[list[str]], lines: list[list[str]]) -> float:
    """Cost of the cheapest assignment: every run of lines is tried for every target."""
    best = [{0: 0.0}]
    for stop in range(1, len(lines) + 1):
        here = {placed: cost + EXTRA * len(lines[stop - 1]) for placed, cost in best[-1].items()}
        for start, i in itertools.product(range(stop), range(len(targets))):
            run = align(targets[i], [word for line in lines[start:stop] for word in line])
            for placed, cost in best[start].items():
                if not placed >> i & 1:
                    here[placed | 1 << i] = min(here.get(placed | 1 << i, math.inf), cost + run)
        best.append(here)
    absent = {s: sum(len(t) for i, t in enumerate(targets) if not s >> i & 1) for s in best[-1]}
    return min(cost + MISSING * absent[placed] for placed, cost in best[-1].items())


def score(texts: list[str], lines: list[str]) -> float:
    result = score_text(texts, lines)
    assert result is not None
    return result.score


@pytest.mark.parametrize(
    "found, expected",
    [
        ("Grand Opening!", 1.0),
        ("grand openning", 0.9375),  # 1 edit in 8 letters, one of two words: 1 - (1/8)/2
        ("opening grand", 0.25),  # one word kept, one missing, one extra: 1 - (1 + 0.5)/2
        ("grand", 0.5),  # one missing: 1 - 1/2
        ("grand opening sale", 0.75),  # one extra: 1 - 0.5/2
        ("", 0.0),
    ],
)
def test_golden(found, expected):
    assert score(["grand opening"], [found]) == pytest.approx(expected)


def test_breakdown():
    result = score_text(["grand opening"], ["opening grand"])
    assert result is not None
    assert (result.missing, result.extra) == (1, 1)
    assert result.order_free == 1  # nothing but the order is wrong


def test_separate_texts_in_any_order_but_words_in_order():
    assert score(["open late", "cafe"], ["CAFE", "Open Late"]) == 1
    assert score(["open late", "cafe"], ["cafe", "late open"]) == pytest.approx(0.5)  # (1 + 0.5) of 3 words


def test_text_broken_over_lines():
    assert score(["grand opening"], ["grand", "opening"]) == 1
    assert score(["grand opening", "half price"], ["half", "price", "grand", "opening"]) == 1


def test_nothing_to_read():
    assert score_text([], ["sale"]) is None
    assert score_text([" ", ""], ["sale"]) is None


def test_texts_of_nothing_but_punctuation():
    assert score(["?"], ["?"]) == 1
    assert score(["!!!"], []) == score(["!?"], ["sale"]) == 0
    assert score(["open", "?"], ["OPEN", "?"]) == 1
    assert score(["open"], ["-", "OPEN", "..."]) == 1  # which is else not read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("3.50", "350"), ("$3.50", "$350"), ("10:30", "1030"), ("-5°", "5°"), ("50%", "50"), ("#1", "1"), ("C++", "C"),
        ("a@b.com", "abcom"), ("24/7", "247"), ("1,000", "1.000"), ("O2", "02"), ("營業中", "营业中"),
    ],
)  # fmt: skip
def test_marks_that_count(text, read):
    """One letter of at most seven; two of three in Chinese."""
    assert score([text], [read]) <= 6 / 7 and score([text], [text + "."]) == 1


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("OPEN LATE", "OPEN\u200b LATE"), ("שלום עולם", "\u200fשלום עולם\u200e"), ("مرحبا", "\u2067مرحبا\u2069"),
        ("مرحبا", "مرحـــبا"), ("محمد", "مُحَمَّد"), ("שלום", "שָׁלוֹם"), ("١٢٣", "123"), ("لا", "ﻻ"), ("OPEN", "\ufeffOPEN"),
        ("cooperate", "co\u00adoperate"), ("I ❤ NY", "I ❤\ufe0f NY"), ("👨\u200d👩", "👨👩"), ("ﬃce", "ffice"),
        ("ＯＰＥＮ", "OPEN"),
        ("İSTANBUL", "İstanbul"), ("IŞIK", "ışık"), ("STRASSE", "Straße"), ("ΟΔΟΣ", "οδος"), ("e-mail", "email"),
        ("안녕", "\u110b\u1161\u11ab\u1102\u1167\u11bc"), ("「営業中」", "営業中"), ("営業中", "営 業 中"),
        ("コーヒー", "ｺｰﾋｰ"), ("น้ำ", "น้ํา"), ("Phở", "Pho\u031b\u0309"), ("DON'T", "DON’T"), ("DON'T", "DON`T"),
        ("DON'T", "DON´T"), ("5'", "5′"), ("Ⅳ", "IV"), ("50 %", "50%"), ("−5", "-5"), ("2019–2024", "2019-2024"),
        ("• MILK", "MILK"),
    ],
)  # fmt: skip
def test_forms_that_are_the_same(text, read):
    assert score([text], [read]) == score([read], [text]) == 1


def test_joined_words():
    """A join costs .1: of one word, or of two; a letter of eight misread beside it .125."""
    for text, read in [("ICE-CREAM", "ICE CREAM"), ("AND/OR", "AND OR"), ("state-of-the-art", "state of the art")]:
        assert score([text], [read]) == pytest.approx(0.9)
    assert (
        score(["ice cream"], ["icecream"]) == score(["안녕하세요 여러분"], ["안녕하세요여러분"]) == pytest.approx(0.95)
    )
    assert score(["555-1234"], ["555 1234"]) == pytest.approx(0.9)
    assert score(["ice-cream"], ["ice", "creem"]) == pytest.approx(1 - 0.1 - 1 / 8)
    scored = score_text(["ice cream", "sale"], ["icecream", "sale", "now"])
    assert scored is not None and (scored.missing, scored.extra) == (0, 1)
    assert score(["a restaurant"], ["restaurant"]) == 0.5  # a word is missing, and not its space


def test_normalisation():
    assert words("Ｆｕｌｌ “Width”, don't  STRAẞE") == ["full", "width", "dont", "strasse"]
    assert words("営業中 OPEN") == ["営", "業", "中", "open"]
    assert score(["営業中"], ["営業"]) == pytest.approx(2 / 3)


def test_too_many_texts_is_said():
    with pytest.raises(ValueError, match="at most 10"):
        score_text(["a"] * (MAX_TEXTS + 1), ["a"])


def test_properties():
    rng = random.Random(1)
    vocabulary = ["ab", "abc", "b", "cab", "ccc", "acb"]
    for _ in range(200):
        texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 3))]
        lines = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 3))) for _ in range(rng.randint(0, 3))]
        result = score_text(texts, lines)
        assert result is not None
        assert 0 <= result.score <= result.order_free + 1e-9 <= 1 + 1e-9
        assert result == score_text([t.upper() + "!" for t in texts], lines)  # case, punctuation
        assert result.score == pytest.approx(score(rng.sample(texts, len(texts)), lines))  # order of texts
        assert score(texts, rng.sample(texts, len(texts))) == 1
        assert result.score >= score(texts, [*lines, "zzzz"]) - 1e-9  # extra text never helps


def test_edit_distances():
    others = ["sitting", "", "kit", "kitten", "営", "mitten"]
    assert edit_distances("kitten", others).tolist() == [3, 6, 3, 0, 6, 1]
    assert edit_distances("", others).tolist() == [7, 0, 3, 6, 1, 6]
    rng = random.Random(2)
    many = ["".join(rng.choices("abc", k=rng.randint(0, 9))) for _ in range(60)]
    for word in many[:20]:
        assert edit_distances(word, many).tolist() == [edit_distance(word, other) for other in many]


def test_assignment_equals_every_run_tried():
    """Texts that are broken over lines, with words missing, wrong and too many."""
    rng = random.Random(3)
    vocabulary = ["ab", "abc", "b", "cab", "abb", "bab", "grand", "gra", "nd", "bgrant"]
    for _ in range(150):
        targets = [rng.choices(vocabulary, k=rng.randint(1, 4)) for _ in range(rng.randint(1, 3))]
        lines = [rng.choices(vocabulary, k=rng.randint(1, 3)) for _ in range(rng.randint(0, 5))]
        cost, missing, extra = assign(targets, lines)
        assert cost == pytest.approx(best_assignment(targets, lines), abs=1e-12)
        # What neither misses nor is too many is paired, at a cost of 0 to 1 a pair; up to four words are one of a pair.
        paired, read = sum(map(len, targets)) - missing, sum(map(len, lines)) - extra
        assert paired <= 4 * read and read <= 4 * paired
        assert -1e-12 <= cost - MISSING * missing - EXTRA * extra <= min(paired, read) + 1e-12


def test_one_step_a_word(monkeypatch):
    """However many lines and texts there are. 120 lines took a hundred seconds where each run of lines was tried."""
    steps, distances = [], []
    with_word, edit = ocr._with_word, ocr.edit_distances

    def step(running, *arguments):
        steps.append(running.size)
        return with_word(running, *arguments)

    monkeypatch.setattr(ocr, "_with_word", step)
    monkeypatch.setattr(ocr, "edit_distances", lambda word, others: distances.append(word) or edit(word, others))
    lines = [f"line {i}" for i in range(60)]
    assert score(["line 7"], lines) == 0  # 118 words too many
    assert len(steps) == 120 and sum(steps) == 120 * 3 * 2 and sorted(distances) == ["7", "line"]
    steps.clear()
    result = score_text([f"text{i} here" for i in range(MAX_TEXTS)], [f"text{i}" for i in range(120)])
    assert result is not None and (result.missing, result.extra) == (0, 100)
    assert len(steps) == 120 and max(steps) == MAX_TEXTS * 3 * 2**MAX_TEXTS


def test_extra_words_cost_the_same_before_the_target_as_behind_it():
    """Half a word of two: 1 - .5 / 2 = .75."""
    for line in ("sale grand opening", "grand sale opening", "grand opening sale"):
        scored = score_text(["grand opening"], [line])
        assert scored is not None and scored.score == 0.75 and (scored.missing, scored.extra) == (0, 1)
