"""Rendered text: the golden numbers, and what must hold for every reading."""

import itertools
import random

import pytest

from rewards.ocr import EXTRA, MAX_TEXTS, MISSING, align, assign, edit_distance, score_text, words


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
    assert score_text(["!?"], ["sale"]) is None


def test_normalisation():
    assert words("Ｆｕｌｌ “Width”, don't  STRAẞE") == ["full", "width", "dont", "strasse"]
    assert words("営業中 OPEN") == ["営", "業", "中", "open"]
    assert score(["営業中"], ["営業"]) == pytest.approx(2 / 3)


def test_too_many_texts_is_said():
    with pytest.raises(ValueError, match="at most 10"):
        score_text(["a"] * (MAX_TEXTS + 1), ["a"])


def test_assignment_equals_brute_force():
    """One target a line, every way to choose them, where no text is broken over lines."""
    rng = random.Random(0)
    for _ in range(60):
        texts = [[rng.choice("ab") * rng.randint(1, 3)] for _ in range(rng.randint(1, 3))]
        lines = [[rng.choice("abc") * rng.randint(1, 3)] for _ in range(rng.randint(1, 3))]
        best = float("inf")
        slots = [*range(len(lines)), *[None] * len(texts)]
        for places in set(itertools.permutations(slots, len(texts))):
            cost = sum(
                MISSING * len(text) if place is None else align(text, lines[place])[0]
                for text, place in zip(texts, places)
            )
            cost += sum(EXTRA * len(line) for j, line in enumerate(lines) if j not in places)
            best = min(best, cost)
        assert assign(texts, lines)[0] == pytest.approx(best)


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
        words_in = [sum(len(words(t)) for t in group) for group in (texts, lines)]
        assert words_in[0] - result.missing == words_in[1] - result.extra  # what is left is paired


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3


def test_extra_words_cost_the_same_before_the_target_as_behind_it():
    """Half a word of two: 1 - .5 / 2 = .75."""
    for line in ("sale grand opening", "grand sale opening", "grand opening sale"):
        scored = score_text(["grand opening"], [line])
        assert scored is not None and scored.score == 0.75 and (scored.missing, scored.extra) == (0, 1)
