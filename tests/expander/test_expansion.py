"""The format check of expansions, and figures of their text."""

import pytest

from posttrain.expander.chat_template import template
from posttrain.expander.evaluate import spread
from posttrain.expander.text_metrics import causes, distinct, quoted, same_script, verbatim

SYSTEM = template().system


@pytest.mark.parametrize(
    ("prompt", "expansion", "ended", "expected"),
    [
        ("a cat", "a grey cat asleep on a sunny windowsill, watercolour", True, []),
        ("a cat", "", True, ["empty"]),
        ("a cat", " ... \n", True, ["empty"]),
        ("a cat", "a grey cat asleep on a", False, ["truncated"]),
        ("a cat", "серая кошка спит на подоконнике", True, ["language"]),
        ("кошка", "a grey cat on a windowsill", True, ["language"]),
        ("кошка", "серая кошка, плакат со словом “HELLO WORLD AGAIN AND AGAIN”", True, []),
        ("猫", "陽だまりで眠る灰色の猫、水彩画", True, []),
        ("猫の絵", "a cat", True, ["language"]),
        ("고양이", "a cat on a roof", True, ["language"]),
        ("a cat", "a grey cat<|im_end|>", True, ["leaked"]),
        ("a cat", "<think>the user wants a cat</think> a grey cat", True, ["leaked"]),
        ("a cat", f"a grey cat. {' '.join(SYSTEM.split()[10:22]).upper()}", True, ["leaked"]),
        ("a sign that says </s>", "a wooden sign that says </s>", True, []),
        ("a cat", "<|im_start|>", False, ["truncated", "leaked"]),
        ("12:30", "часы показывают 12:30", True, []),
    ],
)
def test_causes(prompt, expansion, ended, expected):
    assert causes(prompt, expansion, ended, SYSTEM) == expected


def test_special_tokens_in_the_middle_are_a_leak():
    assert causes("a cat", "a cat", True, SYSTEM, special=["<|im_start|>"]) == ["leaked"]


def test_few_words_in_common_with_the_template_are_none():
    assert causes("a cat", " ".join(SYSTEM.split()[3:9]), True, SYSTEM) == []


def test_what_the_prompt_says_may_be_repeated():
    words = " ".join(SYSTEM.split()[10:22])
    assert causes(f"a poster: {words}", f"a red poster: {words}", True, SYSTEM) == []


def test_half_of_the_letters_decide_the_language():
    assert same_script("a cat", "aaaa кккк") is False
    assert same_script("a cat", "aaaaa кккк") is True


def test_quoted_texts_are_kept_or_not():
    assert quoted('a sign "OPEN" and “closed” near «там»') == ["OPEN", "closed", "там"]
    assert verbatim(["OPEN"], 'a neon sign "OPEN" at night') is True
    assert verbatim(["OPEN", "UP"], 'a neon sign "OPEN"') is False
    assert verbatim(["OPEN"], 'a neon sign "Open"') is False
    assert verbatim([], "a cat") is None


def test_distinct():
    assert distinct(["a red cat", "A red dog"], 1) == pytest.approx(4 / 6)  # a, red, cat, dog of six words
    assert distinct(["a red cat", "A red dog"], 2) == pytest.approx(3 / 4)  # "a red" twice
    assert distinct(["cat", ""], 2) is None


def test_spread_is_the_mean_distance_of_pairs():
    import torch

    assert spread(torch.eye(3)) == pytest.approx(1.0)
    assert spread(torch.ones(3, 2)) == pytest.approx(0.0, abs=1e-9)
    assert spread(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])) == pytest.approx(2 / 3)  # 0, 1, 1
