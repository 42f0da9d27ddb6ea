"""Tables of prompts and pairs as people have them: each is read, or refused with a line that says what to write."""

import json
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from posttrain.errors import UserError
from posttrain.judge.config import JudgeConfig
from posttrain.judge.records import read_records
from posttrain.preferences.config import ColumnMap
from posttrain.preferences.dataset import read_preferences
from prompts.records import read_prompts
from prompts.tables import open_table

ROWS = [{"prompt": "a cat", "id": 1}, {"prompt": 'a dog, "red"', "id": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def saved(rows, folder, **splits):
    """What `save_to_disk` writes, of one dataset or of several splits."""
    if splits:
        datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in splits}).save_to_disk(str(folder))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


def parquet(rows, *files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    return files[0]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain.jsonl", LINES),
        ("bom.jsonl", "\ufeff" + LINES),
        ("crlf.jsonl", LINES.replace("\n", "\r\n")),
        ("both.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("list.json", json.dumps(ROWS)),
        ("pretty.json", "\ufeff" + json.dumps(ROWS, indent=1)),
        ("lines.json", LINES),
        ("a.csv", 'prompt,id\na cat,1\n"a dog, ""red""",2\n'),
        ("bom.CSV", '\ufeffprompt,id\r\na cat,1\r\n\r\n"a dog, ""red""",2\r\n'),
        ("a.tsv", 'prompt\tid\na cat\t1\n"a dog, ""red"""\t2\n'),
    ],
)
def test_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data.encode())
    for source in (str(tmp_path / name), f"hf:{tmp_path / name}"):
        assert [(record.prompt, record.id) for record in read_prompts(source)] == [
            ("a cat", "1"), ('a dog, "red"', "2"),
        ]  # fmt: skip


def test_directories(tmp_path):
    """Of parquet, also with a space in the name, and of `save_to_disk`; with and without hf:."""
    expected = [row["prompt"] for row in ROWS]
    for folder in (parquet(ROWS, tmp_path / "my data/x.parquet").parent, saved(ROWS, tmp_path / "saved"),
                   saved(ROWS, tmp_path / "one", train=1)):  # fmt: skip
        for source in (str(folder), f"hf:{folder}"):
            assert [record.prompt for record in read_prompts(source)] == expected, source


def test_several_splits_are_asked_for(tmp_path):
    """Read together, held-out rows would be trained on; the line names what can be given, and that is read."""
    parquet(ROWS, *(tmp_path / f"files/data/{name}-00000-of-00001.parquet" for name in ("train", "test")))
    saved(ROWS, tmp_path / "saved", train=1, test=1)
    for folder in (tmp_path / "files", tmp_path / "saved"):
        for source in (str(folder), f"hf:{folder}"):
            with pytest.raises(UserError) as raised:
                read_prompts(source)
            assert str(raised.value) == f"{source}: has the splits train, test; name one, such as hf:{folder}:train"
        assert len(read_prompts(f"hf:{folder}:train")) == 2
        with pytest.raises(UserError, match=r"(no|Unknown) split .*validation"):
            read_prompts(f"hf:{folder}:validation")
    assert len(read_prompts(f"hf:{tmp_path / 'files'}:train[:1]")) == 1
    with pytest.raises(UserError, match="is saved without splits; write it as hf:"):
        read_prompts(f"hf:{saved(ROWS, tmp_path / 'whole')}:test")


def test_several_configs_are_asked_for(tmp_path):
    (tmp_path / "d").mkdir()
    card = "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n"
    (tmp_path / "d/README.md").write_text(card)
    for name in "ab":
        (tmp_path / f"d/{name}.jsonl").write_text(json.dumps({"prompt": f"prompt of {name}"}) + "\n")
    with pytest.raises(UserError, match=r"available configs: \['a', 'b'\].*write it as .* or hf:NAME:CONFIG:SPLIT"):
        read_prompts(f"hf:{tmp_path / 'd'}")
    assert [record.prompt for record in read_prompts(f"hf:{tmp_path / 'd'}:b:train")] == ["prompt of b"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("p.csv", b"prompt,id\na cat\n", "p.csv:2: has 1 cell, and the header 2"),
        ("p.csv", b'prompt\n"a cat\na dog\n', "p.csv:2: is not CSV: unexpected end of data; put double quotes"),
        ("p.csv", b"prompt,prompt\na,b\n", "p.csv:1: needs a header that names each column once"),
        ("p.csv", b"prompt,\na,b\n", "p.csv:1: needs a header"),
        ("p.csv", b"a cat\na dog\n", "p.csv:2: prompt: missing"),
        ("p.csv", b"prompt\ncaf\xe9\n", "p.csv: is not UTF-8 text; save it as UTF-8"),
        ("p.csv", b"", "p.csv: holds no prompt"),
        ("p.json", b'[{"prompt": "a"}, 3]', "p.json row 1: is not an object"),
        ("p.json", b'[{"prompt": "a"}', "p.json: not JSON"),
        ("p.parquet", b"PAR1", "p.parquet: is not a whole parquet file"),
        ("state.json", b'{"_data_files": 3}', ": cannot be loaded: "),
    ],
)
def test_refused(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as raised:
        read_prompts(tmp_path if name == "state.json" else tmp_path / name)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_lists_in_cells(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,texts,requirements\n[a] sign,"[""OPEN"", ""7""]",\n')
    (record,) = read_prompts(tmp_path / "p.csv")
    assert (record.prompt, record.texts, record.requirements) == ("[a] sign", ["OPEN", "7"], None)
    assert open_table(str(tmp_path / "p.csv")).name(0) == f"{tmp_path}/p.csv:2"


def test_pairs_and_judges_read_the_same_tables(tmp_path):
    """Pairs as CSV, as a list and saved to disk; cells of CSV are text, so numbers in texts count."""
    generator = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    rows = [
        {"prompt": "x", "chosen": "a.png", "rejected": "b.png", "share": 0.75, "seed": 7, "chosen_on_policy": True},
        {"prompt": "y", "chosen": "b.png", "rejected": "c.png", "share": None, "seed": None, "chosen_on_policy": False},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    header, *lines = [rows[0].keys(), *(["" if v is None else str(v) for v in row.values()] for row in rows)]
    (tmp_path / "pairs.csv").write_text("\n".join(map(",".join, [header, *lines])) + "\n")
    images = {name: {"bytes": (tmp_path / f"{name}.png").read_bytes(), "path": None} for name in "abc"}
    encoded = [row | {name: images[row[name][0]] for name in ("chosen", "rejected")} for row in rows]
    saved(encoded, tmp_path / "saved")
    for source in ("list.json", "pairs.csv", "saved"):
        pairs = list(read_preferences(tmp_path / source))
        assert [(p.prompt, p.share, p.seed, p.chosen_on_policy) for p in pairs] == [
            ("x", 0.75, 7, True), ("y", 1.0, None, False),
        ]  # fmt: skip
        assert len(read_records(JudgeConfig("o", "m", str(tmp_path / source), "preference"))) == 2
    labels = ColumnMap(first="chosen", second="rejected", label="l0", label_second="l1")
    (tmp_path / "labels.csv").write_text("prompt,chosen,rejected,l0,l1\nx,a.png,b.png,0.0,1.0\n")
    (pair,) = read_preferences(tmp_path / "labels.csv", labels)
    assert pair.share == 1 and pair.chosen.tobytes() == Image.open(tmp_path / "b.png").tobytes()
    before = read_preferences(tmp_path / "pairs.csv").fingerprint()
    shutil.copy(tmp_path / "c.png", tmp_path / "a.png")
    assert read_preferences(tmp_path / "pairs.csv").fingerprint() != before


def test_images_that_are_not_files(tmp_path):
    row = {"prompt": "x", "chosen": "data:image/png;base64,AAAA", "rejected": "https://example.com/a.png"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="chosen: is a URL, which is not fetched; write the images into files"):
        list(read_preferences(tmp_path / "p.jsonl"))
