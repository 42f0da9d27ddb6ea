"""Prompt files: what is read, and what each kind of bad line is answered with."""

import hashlib

import pytest

from prompts.errors import UserError
from prompts.records import read_prompts


@pytest.fixture
def jsonl(tmp_path):
    def write(text: str):
        path = tmp_path / "p.jsonl"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_fields_columns_and_ids(jsonl):
    path = jsonl(
        '{"prompt": "a red cube", "requirements": ["there is a cube"], "texts": ["HI"], "tags": ["easy"],'
        ' "id": "p1", "graph": {"n": 1}}\n\n{"prompt": "ein grüner Würfel"}\n'
    )
    first, second = read_prompts(path)
    assert (first.prompt, first.requirements, first.texts) == ("a red cube", ["there is a cube"], ["HI"])
    assert (first.tags, first.id, first.columns) == (["easy"], "p1", {"graph": {"n": 1}})
    assert second.id == hashlib.sha1("ein grüner Würfel".encode()).hexdigest()
    assert (second.requirements, second.columns) == ([], {})


def test_line_separators_inside_a_prompt_do_not_split_the_line(jsonl):
    assert read_prompts(jsonl('{"prompt": "a\u2028b\u0085c"}\r\n'))[0].prompt == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "p.jsonl: holds no prompt"),
        ("\n  \n", "p.jsonl: holds no prompt"),
        ('{"prompt": "a"}\na red cube\n', "p.jsonl:2: not JSON (Expecting value at column 1)"),
        ('{"prompt": "a"', "p.jsonl:1: not JSON"),
        ('["a"]', "p.jsonl:1: is a list, not an object"),
        ('"a"', "p.jsonl:1: is text, not an object"),
        ('\n{"text": "a"}', "p.jsonl:2: prompt: missing"),
        ('{"prompt": null}', "p.jsonl:1: prompt: missing"),
        ('{"prompt": ""}', "p.jsonl:1: prompt: is empty"),
        ('{"prompt": "  "}', "p.jsonl:1: prompt: is empty"),
        ('{"prompt": 3}', "p.jsonl:1: prompt: is a number, not text"),
        ('{"prompt": "a", "texts": "HI"}', "p.jsonl:1: texts: is text, not a list"),
        ('{"prompt": "a", "tags": [1]}', "p.jsonl:1: tags: holds a number, not text"),
        ('{"prompt": "a", "requirements": {}}', "p.jsonl:1: requirements: is an object, not a list"),
        ('{"prompt": "a", "id": 3}', "p.jsonl:1: id: is a number"),
        ('{"prompt": "a", "id": ""}', "p.jsonl:1: id: is empty text"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "p.jsonl:2: id 'x' was used on line 1"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}', "was used on line 1"),
    ],
)
def test_bad_files(jsonl, text, says):
    with pytest.raises(UserError) as error:
        read_prompts(jsonl(text))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a directory"):
        read_prompts(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "grün"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")
