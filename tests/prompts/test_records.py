"""Prompt files: what is read, and what each kind of bad line is answered with."""

import hashlib
import json

import pytest

from posttrain.errors import UserError
from prompts.parse import json_line, read_lines, whole_lines
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
    assert (second.requirements, second.texts, second.columns) == (None, [], {"graph": None})


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
        ('{"prompt": "a", "id": 3.5}', "p.jsonl:1: id: is a number"),
        ('{"prompt": "a", "id": true}', "p.jsonl:1: id: is a boolean"),
        ('{"prompt": "a", "id": ""}', "p.jsonl:1: id: is empty text"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "p.jsonl:2: id 'x' was used at "),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}', "p.jsonl:1 (without an id it comes from the prompt)"),
    ],
)
def test_bad_files(jsonl, text, says):
    with pytest.raises(UserError) as error:
        read_prompts(jsonl(text))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A directory that `datasets` loads, with a train and a small split."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d").mkdir()
    rows = [{"prompt": f"a {c} cube", "tags": [c], "id": c, "n": i} for i, c in enumerate(["red", "blue", "grey"])]
    for name, part in (("train", rows), ("test", [{**rows[0], "tags": None}, rows[0]])):
        (tmp_path / "d" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"hf:{tmp_path / 'd'}"


def test_datasets(dataset, tmp_path):
    read = read_prompts(f"{dataset}:train")
    assert read == read_prompts(tmp_path / "d" / "train.jsonl") and read[1].columns == {"n": 1}
    assert [record.id for record in read_prompts(f"{dataset}:train[1:]")] == ["blue", "grey"]
    with pytest.raises(UserError, match=r"d:test row 1: id 'red' was used at .*d:test row 0"):
        read_prompts(f"{dataset}:test")
    with pytest.raises(UserError, match=r"cannot be loaded: .*; write it as hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG"):
        read_prompts(f"{dataset}:none")
    with pytest.raises(UserError, match="cannot be loaded"):
        read_prompts(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="hf:: names no dataset"):
        read_prompts("hf:")


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a directory without a parquet file or a saved dataset"):
        read_prompts(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "grün"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl:1: is not UTF-8 text"):
        read_prompts(tmp_path / "latin.jsonl")


def test_a_line_separator_within_a_text_ends_no_line(jsonl):
    """JSON leaves U+2028 and U+0085 as they are. The last line was cut off by a kill."""
    rows = [{"prompt": "a red\u2028cube"}, {"prompt": "two\x85lines"}]
    text = "".join(map(json_line, rows))
    assert read_lines(jsonl(text)) == rows
    assert list(map(json.loads, whole_lines(jsonl(text + '{"prompt": "a bl')))) == rows
