"""The gate by words: whatever form a word comes in, and whatever wrote the file."""

import pytest

from posttrain.errors import UserError
from rewards.safety import Words


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("gun", "a GUN."), ("gun", "a g\u200bun"), ("gun", "the gun\u200bshop"), ("gun", "a ｇｕｎ"),
        ("gun", "g\u00adun"), ("gun", "a gun_shop"), ("gun", "gun2"), ("gun", "一把gun放"),
        ("枪", "桌子上有一把枪。"), ("銃", "机の上の銃です"), ("ปืน", "มีปืนบนโต๊ะ"), ("총", "탁자 위의 총이"),
        ("سلاح", "سِلاح"), ("سلاح", "السلاح"), ("café", "cafe\u0301"), ("İ", "i"), ("straße", "STRASSE"),
        ("оружие", "ОРУЖИЕ"), ("machine gun", "machine  gun"), ("machine gun", "machine\ngun"),
        ("machine gun", "Machine-Gun"), ("-gun-", "a gun"), ("c++", "in C++!"),
    ],
)  # fmt: skip
def test_found(word, text):
    assert Words([word])([text], [""]) == [0.0]


@pytest.mark.parametrize(("word", "text"), [("gun", "begun"), ("gun", "gunnery"), ("бом", "бомба"), ("88", "1885")])
def test_a_part_of_another_word_is_safe(word, text):
    assert Words([word])([text], [""]) == [1.0]


@pytest.mark.parametrize("data", [b"gun\nwar\n", b"\xef\xbb\xbfgun\nwar\n", b"gun\r\nwar\r\n", b"# listed\ngun"])
def test_every_word_of_a_file_counts(data, tmp_path):
    (tmp_path / "words.txt").write_bytes(data)
    assert Words(file=str(tmp_path / "words.txt"))(["a gun", "a cat"], ["", ""]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("gun\n".encode("utf-16"), "is not UTF-8"),
        ("café\n".encode("latin1"), r"is not UTF-8 \(byte 3\); save it"),
        (b"\n\xe2\x80\x8b\n", "no word is given"),  # a zero-width space
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_without_its_words_is_refused(data, words, tmp_path):
    if data is not None:
        (tmp_path / "words.txt").write_bytes(data)
    with pytest.raises(UserError, match=words):
        Words(file=str(tmp_path / "words.txt"))
