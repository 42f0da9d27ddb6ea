"""Pairs for the prompt expander: what captions say, what is kept and dropped, and a command that was killed goes on."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from posttrain import cli
from posttrain.errors import UserError
from posttrain.expander.config import ExpanderDataConfig, WriterConfig
from posttrain.expander.data import CANDIDATES, make
from posttrain.nano.world import scenes
from posttrain.nano.world.captions import REGISTERS, reworded, statements
from posttrain.nano.world.expander_pairs import heldout
from tests.helpers import fake_writer


def rows(folder: Path, part: str = "train") -> list[dict]:
    return pq.read_table(folder / f"{part}.parquet").to_pylist()


def both(folder: Path) -> list[dict]:
    return rows(folder) + rows(folder, "heldout")


def test_statements_of_a_caption_are_those_it_was_described_with():
    rng = np.random.default_rng(0)
    for _ in range(400):
        said = scenes.describe(scenes.random_scene(rng), rng, float(rng.choice([0, 0.5, 1])))
        assert statements(said.prompt) == set(said.requirements), said.prompt


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a red circle, flat style, dark style",
        "an red circle",
        "two red circle",
        "a red circle and a blue square",
        'the word "CAT"',
        "a red circle left of",
        "a red circle, a red circle and a blue star",
        "Here is a caption: a red circle",
    ],
)
def test_what_is_no_caption_of_the_world_says_nothing(text):
    assert statements(text) is None


def test_registers():
    rng = np.random.default_rng(0)
    said = 'the word "AT" and an orange star at the left, flat style'
    assert reworded(said, "keywords", rng) == 'word "AT" and orange star at left, flat style'
    assert reworded(said, "request", rng).endswith(said) and len(reworded(said, "request", rng)) > len(said)
    assert {reworded(said, r, rng) for r in REGISTERS} >= {said}


def nano(tmp_path: Path, name: str = "data", **changes) -> ExpanderDataConfig:
    return ExpanderDataConfig(
        **{
            "output": str(tmp_path / name),
            "captions": "posttrain.nano.world.expander_pairs:candidates",
            "count": 150,
            "seed": 3,
            **changes,
        }
    )


def test_nano_pairs_are_faithful_and_counted(tmp_path):
    make(nano(tmp_path, heldout=0.2))
    found = both(tmp_path / "data")
    counts = json.loads((tmp_path / "data" / "expander_data.json").read_text())
    assert counts["candidates"] == len(found) + sum(counts["dropped"].values())
    assert counts["kinds"]["quoted"] > 20 and counts["kinds"]["long"] > 10 and counts["kinds"]["short"] > 50
    assert {r["completion"] for r in rows(tmp_path / "data")}.isdisjoint(
        r["completion"] for r in rows(tmp_path / "data", "heldout")
    )
    for row in found:
        said = statements(row["completion"])
        assert said is not None and row["prompt"] not in heldout()
        if row["register"] == "caption":
            assert statements(row["prompt"]) <= said
        if row["kind"] == "long":
            assert row["prompt"] == row["completion"]
        if row["kind"] == "quoted":
            word = row["prompt"].split('"')[1]
            assert f'"{word}"' in row["completion"]
    import datasets

    assert datasets.load_dataset("parquet", data_files=str(tmp_path / "data" / "train.parquet"), split="train")[0]


def test_a_command_that_was_killed_goes_on_to_the_same_pairs(tmp_path):
    make(nano(tmp_path, "whole"))
    make(nano(tmp_path, "cut"))
    cut = tmp_path / "cut"
    lines = (cut / CANDIDATES).read_text().splitlines(keepends=True)
    for file in cut.glob("*.parquet"):
        file.unlink()
    (cut / "expander_data.json").unlink()
    (cut / CANDIDATES).write_text("".join(lines[:70]) + lines[70][:40])
    with pytest.raises(UserError, match="add --resume"):
        make(nano(tmp_path, "cut"))
    with pytest.raises(UserError, match=r"seed: differs from .*recipe.yaml, with which .* began; restore it"):
        make(nano(tmp_path, "cut", seed=4), resume=True)
    make(nano(tmp_path, "cut"), resume=True)
    assert both(cut) == both(tmp_path / "whole")


CAPTIONS = [
    "a red cube, on a wooden shelf",
    'a sign that says "OPEN", at night in the rain',
    "a heron, in fog",
    "a green boat, at sea",
]


def written(tmp_path: Path, url: str, captions: list[str], **changes) -> ExpanderDataConfig:
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({"caption": c}) + "\n" for c in captions))
    settings = {"lengths": ["short"], "registers": ["plain", "keywords"], "long_share": 0.0, "heldout": 0.5, **changes}
    writer = WriterConfig("m", url, concurrency=2, timeout=5)
    return ExpanderDataConfig(str(tmp_path / "out"), str(file), "caption", writer=writer, **settings)


def test_a_writer_that_invents_is_caught(tmp_path, capsys):
    with fake_writer.serving() as url:
        make(written(tmp_path, url, CAPTIONS))
    found = sorted((r["prompt"], r["completion"], r["kind"]) for r in both(tmp_path / "out"))
    assert found == sorted((c.partition(",")[0], c, "quoted" if '"' in c else "short") for c in CAPTIONS)
    counts = json.loads((tmp_path / "out" / "expander_data.json").read_text())
    # "a dragon" is in no caption; two of the invented prompts are longer than theirs and are not asked about.
    assert counts["dropped"] == {"not in the caption": 2, "longer than the caption": 2}
    assert "dropped: 2 not in the caption, 2 longer" in capsys.readouterr().out


def test_a_writer_under_an_alias(tmp_path):
    """Whoever answers is named by `answers_as`; without it the request has failed, with what to set."""
    with fake_writer.serving("gpt-4o-2024-08-06") as url:
        config = written(tmp_path, url, CAPTIONS)
        with pytest.raises(UserError, match=r"the model m, gpt-4o-2024-08-06 answered: .* set answers_as: gpt"):
            make(config)
        assert config.writer is not None
        config.writer.answers_as, config.output = "gpt-4o", str(tmp_path / "again")
        make(config)
    assert len(both(tmp_path / "again")) == len(CAPTIONS)


def test_a_caption_whose_request_fails_is_missing_and_counted(tmp_path):
    with fake_writer.serving() as url:
        make(written(tmp_path, url, [*CAPTIONS, "a broken cup, on the floor"], max_failures=0.2))
        assert json.loads((tmp_path / "out" / "expander_data.json").read_text())["failed"] == 1
        again = written(tmp_path, url, [*CAPTIONS, "a broken cup, on the floor"], max_failures=0.1)
        again.output = str(tmp_path / "again")
        with pytest.raises(UserError, match=r"1 of 5 captions failed.*not the JSON that was asked for"):
            make(again)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--column", "text"], "column: {file} has no column text; it has caption"),
        (["--writer", "null"], "writer: is null: name the model that writes"),
        (["--captions", "{dir}/none.jsonl"], "none.jsonl: no such file"),
        (["--captions", "posttrain.nano.world.expander_pairs:candidates"], "count: is null"),
        (["--per_caption", "99"], "per_caption: is 99, more than"),
        (["--writer.base_urls", "[server://x]"], "writer.base_urls: no server 'x': the recipe's servers are: none"),
        (["--writer.base_urls", "server://x"], "writer.base_urls: no server 'x': the recipe's servers are: none"),
    ],
)
def test_mistakes(tmp_path, capsys, changes, says):
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"caption": "a red cube, on a shelf"}) + "\n")
    recipe = tmp_path / "data.yaml"
    recipe.write_text(
        f"output: {tmp_path}/out\ncaptions: {file}\ncolumn: caption\nwriter: {{model: m, base_urls: 'http://127.0.0.1:9/v1'}}\n"
    )
    changes = [c.format(dir=tmp_path) for c in changes]
    assert cli.main(["expander", "data", "--config", str(recipe), *changes]) == 2
    error = capsys.readouterr().err
    assert says.format(file=file) in error and error.count("\n") == 1


def test_an_empty_source_is_a_mistake(tmp_path, capsys):
    (tmp_path / "captions.jsonl").write_text("\n")
    writer = ["--writer.model", "m", "--writer.base_urls", "http://127.0.0.1:9/v1"]
    paths = ["--output", str(tmp_path / "out"), "--captions", str(tmp_path / "captions.jsonl")]
    assert cli.main(["expander", "data", *paths, *writer]) == 2
    assert capsys.readouterr().err.count("\n") == 1
