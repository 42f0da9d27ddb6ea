"""What a merge keeps of a run's gain: the ratio, its interval, and the measurement on runs' own held-out prompts."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from posttrain import cli
from posttrain.config.sections import EvalConfig, ModelConfig
from posttrain.distributed.processes import Processes
from posttrain.export.export import load_checkpoint
from posttrain.merge.evaluate import kept, table
from posttrain.training import checkpoint
from posttrain.training.evaluate import Evaluator
from posttrain.training.policy import POLICY
from prompts.records import read_prompts
from rewards.base import RewardSpec
from rewards.load import load_rewards
from tests.helpers import runs, tiny
from tests.training.test_stages import stage


def darkness(images, prompts):
    return [1 - value for value in runs.brightness(images, prompts)]


def test_the_share_of_a_gain():
    """Gains of .2, .4, .3 on average .3, of which the merge has .3, .4, .2 less .15: half."""
    base = np.array([0.1, 0.2, 0.3])
    run, merge = base + np.array([0.2, 0.4, 0.3]), base + np.array([0.15, 0.25, 0.05])
    row = kept(base, run, merge)
    assert (row["base"], row["run"], row["merge"]) == pytest.approx((0.2, 0.5, 0.35))
    assert row["gain"] == pytest.approx(0.3) and row["error"] == pytest.approx(0.1 / np.sqrt(3))
    assert row["kept"] == pytest.approx(0.5)
    low, high = row["interval"]
    assert low < 0.5 < high and low >= 0.05 / 0.3 - 1e-9 and high <= 0.75 + 1e-9


def test_what_cannot_be_said_is_missing():
    """Images that one of the three has no score of; a gain within three standard errors; none; a loss."""
    base, noise = np.zeros(6), np.array([0.1, -0.1, 0.2, -0.1, 0.1, 0.0])
    assert kept(base, noise, noise)["kept"] is None
    assert kept(base, base, base)["kept"] is None and kept(base, base - 0.3, base)["kept"] is None
    run = np.array([0.3, 0.3, np.nan, 0.3, 0.3, 0.3])
    merge = np.array([0.3, 0.3, 9.0, np.nan, 0.3, 0.3])
    row = kept(base, run, merge)
    assert row["kept"] == pytest.approx(1) and row["merge"] == pytest.approx(0.3)
    empty = kept(base, np.full(6, np.nan), base)
    assert set(empty.values()) == {None}
    rows = [
        {"parent": "a", "reward": "x", "loses": True, **kept(base, base + 0.2, base + 0.1)},
        {"parent": "a", "reward": "y", "loses": False, **empty},
    ]
    text = table(rows)
    assert "+0.200 ± 0.000" in text and "0.50  0.50 to 0.50" in text and text.splitlines()[1].endswith("loses")
    assert "too few scores" in text


@pytest.fixture(scope="module")
def recipes(model, tmp_path_factory):
    """Two adapters whose run directories have recipes of grpo: other held-out prompts, steps and rewards."""
    folder, made = tmp_path_factory.mktemp("runs"), []
    for seed, name in enumerate("ab", 1):
        stage(folder / name, ModelConfig(str(model), dtype="float32"), 2.0, seed)
        config = runs.config(folder / name, model)
        config.eval.prompts, config.eval.steps, config.eval.guidance = 4, 3 + seed, [0.0, 1.0]
        prompts = [*tiny.PROMPTS, *(f"{prompt}, {name}" for prompt in tiny.PROMPTS)]
        (folder / name / "heldout.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        config.rewards.append(RewardSpec("darkness", "tests.merge.test_kept:darkness", heldout_only=True))
        config.rewards.append(RewardSpec("contrast", "tests.helpers.runs:contrast", group=True))
        (folder / name / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
        made.append(folder / name)
    return made


def merge(*words) -> int:
    return cli.main(["merge", *map(str, words)])


def test_each_run_is_measured_by_its_own_recipe(recipes, tmp_path, capsys):
    """At weight 1 a run alone is itself, so it keeps all. Two runs are drawn and scored by a recipe each."""
    a, b = recipes
    assert merge(a, "--output", tmp_path / "one") == 0
    told = capsys.readouterr()
    whole = json.loads((tmp_path / "one/merge.json").read_text())["kept"]
    assert [row["reward"] for row in whole] == ["brightness", "darkness"]
    for row in whole:
        assert row["run"] == row["merge"] and row["kept"] in (None, 1.0) and not row["loses"] and row["images"] == 4
    assert whole[0]["gain"] == pytest.approx(-whole[1]["gain"]) and whole[0]["gain"] != 0
    assert "warning" not in told.err and "gain of the run" in told.out

    assert merge(f"{a}:0.3", f"{b}:0.7", "--output", tmp_path / "two", "--images", 8) == 0
    rows = json.loads((tmp_path / "two/merge.json").read_text())["kept"]
    assert [(Path(row["parent"]).name, row["images"]) for row in rows] == [("a", 8), ("a", 8), ("b", 8), ("b", 8)]
    assert rows[0]["base"] != rows[2]["base"]  # other prompts and steps

    # As the training's evaluator draws and scores them.
    k2 = load_checkpoint(checkpoint.load(checkpoint.find(a)))
    records = read_prompts(a / "heldout.jsonl")
    rewards = load_rewards([RewardSpec("brightness", runs.brightness)])
    settings = EvalConfig(prompts=4, steps=4, groups=0)
    evaluator = Evaluator(k2, records, rewards, settings, (32, 32), 3, 64, Processes())
    with torch.no_grad():
        assert evaluator().metrics["brightness"] == pytest.approx(whole[0]["base"], abs=1e-6)
        with k2.role(POLICY):
            assert evaluator().metrics["brightness"] == pytest.approx(whole[0]["run"], abs=1e-6)


def test_what_is_lost_is_warned_of(recipes, tmp_path, capsys):
    """A tenth of a change keeps a part of the gain, less than all."""
    b = recipes[1]
    assert merge(f"{b}:0.1", "--output", tmp_path / "m", "--keep", 0.99) == 0
    said = capsys.readouterr()
    (lost,) = [row for row in json.loads((tmp_path / "m/merge.json").read_text())["kept"] if row["loses"]]
    assert lost["kept"] < 0.9
    assert f"keeps {lost['kept']:.2f} of what {b} gained in {lost['reward']}, less than keep (0.99)" in said.err
    assert "loses\n" in said.out


def test_whole_models_are_measured_too(recipes, tmp_path):
    """TIES of one run at density 1 is that run."""
    assert merge(recipes[0], "--method", "ties", "--density", 1, "--output", tmp_path / "m") == 0
    for row in json.loads((tmp_path / "m/merge.json").read_text())["kept"]:
        assert row["merge"] == pytest.approx(row["run"], abs=2e-3)
        assert abs(row["merge"] - row["run"]) < 0.1 * abs(row["gain"])


def fails(images, prompts):
    raise ValueError("no connection")


def test_a_reward_that_fails_leaves_the_merge(recipes, tmp_path, capsys):
    run, recipe = tmp_path / "run", yaml.safe_load((recipes[0] / "recipe.yaml").read_text())
    shutil.copytree(recipes[0], run)
    rewards = [{"name": "r", "function": "tests.merge.test_kept:fails"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"rewards": rewards}))
    assert merge(run, "--output", tmp_path / "m") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"{tmp_path}/m is written, but what it keeps cannot be measured: " in line and "no connection" in line
    assert "kept" not in json.loads((tmp_path / "m/merge.json").read_text())


def test_parents_without_a_recipe_or_rewards_are_left_out(recipes, tmp_path, model, capsys):
    bare = stage(tmp_path / "bare", ModelConfig(str(model), dtype="float32"), 0.1, 7)
    silent = stage(tmp_path / "silent", ModelConfig(str(model), dtype="float32"), 0.1, 8)
    recipe = yaml.safe_load((recipes[0] / "recipe.yaml").read_text())
    (tmp_path / "silent/recipe.yaml").write_text(yaml.safe_dump(recipe | {"rewards": recipe["rewards"][2:]}))
    assert merge(recipes[0], bare, silent, "--output", tmp_path / "m") == 0
    told = capsys.readouterr().err
    assert f"{bare} has no recipe of a run" in told and f"{silent} names no reward that sees one image" in told
    rows = json.loads((tmp_path / "m/merge.json").read_text())["kept"]
    assert {row["parent"] for row in rows} == {str(recipes[0])}
