"""Pairs with references: kept in a set, drawn by `posttrain pairs`, and trained on by `posttrain stpo`."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from posttrain import cli
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model.k2 import K2
from posttrain.pairs import make
from posttrain.preferences.dataset import CARD, Preference, Reference, Skipped, read_preferences
from posttrain.preferences.writer import PreferenceWriter
from posttrain.stpo import train as stpo
from posttrain.stpo.latent_cache import Job, encode_pairs, noised
from tests.helpers import pair_runs, runs, tiny
from tests.helpers.style_runs import image


def pair(i: int, shown: list[Reference]) -> Preference:
    return Preference(tiny.PROMPTS[i % 4], image(2 * i), image(2 * i + 1), "synthetic", references=shown)


@pytest.fixture
def pairs(tmp_path):
    """Twelve, with none, one or two references in turns."""
    shown = [Reference(image(100), 1.0), Reference(image(101), 0.5)]
    with PreferenceWriter(tmp_path / "pairs") as writer:
        for i in range(12):
            writer.add(pair(i, shown[: i % 3]))
    return tmp_path / "pairs"


@pytest.fixture
def config(tmp_path, model, pairs):
    made = runs.stpo_config(tmp_path, model)
    made.pairs.train, made.batch, made.micro_batch = str(pairs), 6, 4
    return made


def test_a_set_keeps_references(pairs):
    read = list(read_preferences(pairs))
    assert [[shown.strength for shown in one.references] for one in read[:3]] == [[], [1.0], [1.0, 0.5]]
    assert read[1].references[0].image.tobytes() == image(100).tobytes()
    assert read[1].id == pair(1, [Reference(image(100))]).id != pair(1, [Reference(image(100), 0.5)]).id


def test_sets_without_the_column_are_read(pairs):
    """As earlier versions wrote them."""
    (file,) = pairs.glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns("references"), file)
    assert [one.references for one in read_preferences(pairs)] == [[]] * 12
    pq.write_table(pq.read_table(file).drop_columns("seed"), file)
    with pytest.raises(UserError, match="has other columns than it was written with"):
        read_preferences(pairs)
    assert CARD == "preferences.json"


def test_stpo_shows_the_same_references_on_both_sides(config):
    """Each pair's own, in micro-batches that have as many; without what is shown the velocity is another one."""
    k2 = K2.load(config.model.path)
    k2.add_role("policy", 4, 4.0)
    encoded = encode_pairs(k2, read_preferences(config.pairs.train), config.pairs, Processes())
    jobs = [Job(i, 0.0, i, False) for i in range(12)]
    batches = noised(k2, encoded, jobs, 4, 0.0, 1.0)
    assert sorted(j for batch in batches for j in batch.jobs) == list(range(12))
    for batch in batches:
        assert {len(encoded[j].references) for j in batch.jobs} == {len(batch.shown.latents) if batch.shown else 0}
        if batch.shown is None:
            continue
        v_w, v_l = stpo._velocities(k2, batch)
        assert torch.allclose(v_w, stpo._velocity(k2, batch, 0), atol=1e-5)
        assert torch.allclose(v_l, stpo._velocity(k2, batch, 1), atol=1e-5)
        plain = k2.velocity(batch.x_w, batch.t, batch.text.first(len(v_w)), *batch.size)
        assert (v_w - plain).abs().max() > 1e-4
        expected = [1.0, 0.25][: len(batch.shown.latents)]
        if len(expected) == 2:
            assert batch.shown.strength.tolist() == [expected] * len(v_w)  # the square of what a user gives
        latents = k2.encode_images([image(100)])
        assert torch.allclose(batch.shown.latents[0], latents.expand(len(v_w), -1, -1), atol=1e-5)


def test_a_run_of_stpo(config):
    """The policy begins as the reference, with what is shown too."""
    (Path(config.heldout).parent / "a.png").write_bytes(b"")
    image(100).save(Path(config.heldout).parent / "a.png")
    line = {"prompt": tiny.PROMPTS[2], "references": ["a.png"]}
    Path(config.heldout).write_text(json.dumps(line) + "\n")
    stpo.train(config)
    first, second = runs.training_rows(config.output)
    assert abs(first["z"]) < 1e-4 and second["grad_norm"] > 0


def test_references_that_cannot_be_shown_are_bad_rows(tmp_path, model):
    with PreferenceWriter(tmp_path / "pairs") as writer:
        writer.add(pair(0, [Reference(Image.new("RGB", (8, 8)))]))
        writer.add(pair(1, [Reference(image(1), 2.0)]))
        writer.add(pair(2, [Reference(image(3))]))
        writer.add(pair(3, []))
    config = runs.stpo_config(tmp_path, model)
    config.pairs.train, config.pairs.max_bad = str(tmp_path / "pairs"), 0.9
    read = read_preferences(config.pairs.train, max_bad=0.9)
    encoded = encode_pairs(K2.load(model), read, config.pairs, Processes())
    reasons = [row.reason for row in encoded.tally.bad]
    assert len(reasons) == 2 and "is 8 x 8 pixels; a reference has 32 or more" in reasons[0]
    assert "a strength of 2 by attention must lie in 0 to 1" in reasons[1]
    assert isinstance(encoded.tally.bad[0], Skipped)


def test_pairs_are_drawn_with_the_references_of_their_prompts(tmp_path, model):
    for name in ("a", "b"):
        image(ord(name)).save(tmp_path / f"{name}.png")
    config = pair_runs.recipe(tmp_path, model)
    lines = [{"prompt": p, "references": ["a.png", "b.png:0.5"][: i % 3]} for i, p in enumerate(tiny.PROMPTS)]
    Path(config.prompts).write_text("".join(json.dumps(line) + "\n" for line in lines))
    make.make(config)
    made = list(read_preferences(config.output))
    assert made
    for one in made:
        own = lines[[line["prompt"] for line in lines].index(one.prompt)]["references"]
        assert [shown.strength for shown in one.references] == [1.0, 0.5][: len(own)]
        assert not own or one.references[0].image.tobytes() == image(ord("a")).tobytes()


def test_what_is_shown_changes_what_is_drawn(tmp_path, model):
    config = pair_runs.recipe(tmp_path, model)
    image(7).save(tmp_path / "a.png")
    found = []
    for name, references in (("without", []), ("with", ["a.png"])):
        lines = [{"prompt": p, "references": references} for p in tiny.PROMPTS]
        Path(config.prompts).write_text("".join(json.dumps(line) + "\n" for line in lines))
        config.output = str(tmp_path / name)
        make.make(config)
        found.append({(one.prompt, one.seed): np.asarray(one.chosen, int) for one in read_preferences(config.output)})
    shared = found[0].keys() & found[1].keys()
    assert shared and any(np.abs(found[0][key] - found[1][key]).max() > 1 for key in shared)


def test_a_reference_that_is_not_there(tmp_path, model, capsys):
    config = pair_runs.recipe(tmp_path, model)
    Path(config.prompts).write_text(json.dumps({"prompt": "a fox", "references": ["none.png"]}) + "\n")
    path = runs.recipe(config, tmp_path / "recipe.yaml")
    assert cli.main(["pairs", "--config", str(path)]) == 2
    assert "none.png: no such file; correct the path" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["grpo", "tdm"])
def test_methods_that_draw_without_references_refuse_them(tmp_path, model, capsys, method):
    """They would be ignored, and the run would look as if they had been shown."""
    image(1).save(tmp_path / "a.png")
    config = {"grpo": runs.config, "tdm": runs.tdm_config}[method](tmp_path, model)
    line = {"prompt": "a fox", "references": ["a.png"]}
    Path(config.prompts.heldout).write_text(json.dumps(line) + "\n")
    assert cli.main([method, "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 2
    assert "heldout.jsonl:1: references: are drawn with by style, sample, pairs and stpo" in capsys.readouterr().err
