"""Pairs from prompts: whole sets from the tiny pipeline, the ways to draw them, and their recipes."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config.load import load_config
from posttrain.config.types import ConfigError
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.pairs import make
from posttrain.pairs.config import DeltaConfig, DrawConfig, PairsConfig, PairSource
from posttrain.preferences.dataset import Preference, read_preferences
from posttrain.report.page import write_report
from rewards.base import RewardSpec
from tests.helpers import runs, tiny
from tests.helpers.gullible import GULLED, RAISED
from tests.helpers.pair_runs import GUIDED, recipe
from tests.helpers.settings import validate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """An uninterrupted run."""
    config = recipe(tmp_path_factory.mktemp("whole"), model)
    make.make(config)
    return config


def made(run: str | Path) -> dict[str, bytes]:
    """Every file whose content does not say when and where it was made."""
    names = ("shard-*.parquet", "preferences.json", "candidates.jsonl", "quality.json", "pairs.png")
    return {path.name: path.read_bytes() for name in names for path in Path(run).glob(name)}


# ---- whole sets -------------------------------------------------------------------------------------------


def test_a_set_is_what_the_recipe_says(whole, model):
    """Shares, labels and order; each picture is the one that the model draws from the seed of its pair."""
    found = list(read_preferences(whole.output))
    assert len(found) == 12 and {pair.source for pair in found} == {"synthetic"}
    by_guidance = [pair for pair in found if not pair.chosen_on_policy]
    ranked = [pair for pair in found if pair.chosen_on_policy]
    assert len(by_guidance) == len(ranked) == 6 and all(pair.rejected_on_policy for pair in found)
    assert {pair.chosen_policy for pair in by_guidance} == {f"{model}, guidance 2"}
    assert {p.rejected_policy for p in found} == {p.chosen_policy for p in ranked} == {str(model)}
    assert Counter(pair.prompt for pair in found) == dict.fromkeys(tiny.PROMPTS, 3)
    quality = json.loads((Path(whole.output) / "quality.json").read_text())
    assert quality["on_policy_share"] == 1.0 and quality["pairs"] == 12
    assert quality["sources"]["judged"]["agreement"]["brightness"]["share"] == 1.0
    for pair in ranked:
        bright, dark = runs.brightness([pair.chosen, pair.rejected], [])
        assert pair.margin == pytest.approx(bright - dark) and pair.margin >= whole.min_margin
    assert {pair.chosen.size for pair in found} == {(32, 32), (48, 16)}

    k2 = K2.load(model)
    for pair in by_guidance[:2]:
        width, height = pair.chosen.size
        assert pair.seed is not None
        noise = sampler.noise([pair.seed], (k2.image_tokens(height, width), k2.latent_channels))
        for image, guidance in ((pair.chosen, 2.0), (pair.rejected, 0.0)):
            latents = k2.sample(k2.text([pair.prompt]), noise, 2, height, width, guidance, k2.text([""]))
            drawn = k2.decode(latents, height, width)[0].numpy().astype(int)
            assert np.abs(drawn - np.asarray(image, int)).max() <= 1  # another batch, so other rounding


def test_cost_is_counted(whole):
    summary = json.loads((Path(whole.output) / "summary.json").read_text())
    fates = [json.loads(line) for line in (Path(whole.output) / "candidates.jsonl").read_text().splitlines()]
    drawn = {name: sum(len(e["fates"]) for e in fates if e["source"] == name) for name in ("guidance", "judged")}
    # Two steps: guidance takes four forwards for one picture and two for the other, a group two for each of three.
    assert summary["images"] == {
        "forward": 6 * drawn["guidance"] + 6 * drawn["judged"],
        "decode": 2 * drawn["guidance"] + 3 * drawn["judged"],
    }
    units, images = summary["unit_seconds"], summary["images"]
    counted = images["forward"] * units["forward"] + images["decode"] * units["decode"]
    assert summary["counted_seconds"] == pytest.approx(counted)
    assert summary["overhead"] == pytest.approx(summary["drawing_seconds"] / counted)
    parts = summary["part_seconds"]
    assert set(parts) >= {"text", "sample", "decode", "show", "measure", "waiting", "rest"}
    assert sum(parts.values()) == pytest.approx(summary["drawing_seconds"]) and summary["compile_seconds"] == 0


def test_the_report_counts_pairs(whole, tmp_path):
    assert "12 of 12 pairs" in write_report(Path(whole.output), tmp_path / "report.html").read_text()


def test_any_state_that_a_kill_leaves_is_gone_on_from(whole, tmp_path):
    """Shards may be ahead of the journal or behind it, and its last line may be cut off."""
    journal = (Path(whole.output) / "candidates.jsonl").read_bytes()
    lines = journal.splitlines(keepends=True)
    states = [
        (0, b""),
        (0, journal),
        (1, lines[0]),
        (1, journal),
        (2, b"".join(lines[:3]) + lines[3][:9]),
        (3, journal),
    ]
    for n, (shards, text) in enumerate(states):
        config = dataclasses.replace(whole, output=str(tmp_path / str(n)))
        run = Path(shutil.copytree(whole.output, config.output))
        for name in ("preferences.json", "README.md", "quality.json", "pairs.png"):
            (run / name).unlink()
        for path in sorted(run.glob("shard-*"))[shards:]:
            path.unlink()
        (run / "candidates.jsonl").write_bytes(text)
        make.make(config, resume=True)
        assert made(run) == made(whole.output), (shards, text)


def test_prompts_that_were_replaced_are_noticed(whole, tmp_path):
    """Their pairs would be of other prompts than those that are written already."""
    shutil.copytree(whole.output, tmp_path / "run")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(Path(whole.prompts).read_text().replace("a", "o"))
    recipe = (tmp_path / "run/recipe.yaml").read_text()
    (tmp_path / "run/recipe.yaml").write_text(recipe.replace(whole.prompts, str(prompts)))
    config = dataclasses.replace(whole, output=str(tmp_path / "run"), prompts=str(prompts))
    with pytest.raises(UserError, match=r"prompts: .*prompts\.jsonl holds other prompts than when .*run began"):
        make.make(config, resume=True)


def test_killed_and_resumed_in_a_process(command, whole, tmp_path):
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    path, run = runs.recipe(config, tmp_path / "recipe.yaml"), tmp_path / "run"  # type: ignore[arg-type]
    (process,), began = command.start("pairs", "--config", path), time.monotonic()
    while not (run / "candidates.jsonl").exists() or not (run / "candidates.jsonl").read_bytes():
        assert time.monotonic() - began < 120
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    assert command.wait().returncode == -signal.SIGKILL and not (run / "preferences.json").exists()
    refused = command("pairs", "--config", path, "--resume", "--min_margin", 0.5)
    differs = f"min_margin: differs from {run}/recipe.yaml, with which {run} began, so the pairs would not fit"
    remedy = "together; restore it or choose another output"
    assert refused.returncode == 2 and f"{differs} {remedy}" in refused.stderr
    again = command("pairs", "--config", path)
    assert again.returncode == 2 and "add --resume or choose another" in again.stderr
    result = command("pairs", "--config", path, "--resume")
    assert result.returncode == 0 and "12 pairs of" in result.stdout, result.stderr
    assert made(run) == made(whole.output)
    (run / "quality.json").unlink()
    assert command("pairs", "--config", path, "--resume").returncode == 0  # finished: the report alone
    assert made(run) == made(whole.output)


def test_what_an_order_to_the_judge_is_worth_is_measured_once(tmp_path, model, capsys):
    rewards = [
        RewardSpec("brightness", "tests.helpers.runs:brightness"),
        RewardSpec("gulled", GULLED, heldout_only=True),
    ]
    config = recipe(tmp_path, model, rewards=rewards, pairs=2)
    make.make(config)
    worth = {"injection/image/gulled": pytest.approx(RAISED), "injection/prompt/gulled": None}
    assert runs.rows(config.output)[0].items() >= {"step": 0, "repeatability/gullible": 0, **worth}.items()
    runs.assert_metrics_are_defined(config.output)
    warning = "reward gulled: text that tells the judge what to answer raises it in an image by 0.70"
    assert warning in capsys.readouterr().err
    assert "injection" in write_report(Path(config.output)).read_text()
    (tmp_path / "run/preferences.json").unlink()
    make.make(dataclasses.replace(config), resume=True)
    assert "reward gulled" not in capsys.readouterr().err
    assert sum("injection/image/gulled" in row for row in runs.rows(config.output)) == 1


def test_no_block_is_written_after_one_that_could_not_be():
    """A disk that is full for a moment: blocks are known by the places of their lines in the journal."""

    class Disk:
        def __init__(self):
            self.held, self.full = [], False

        def add_row(self, row):
            if self.full:
                raise UserError("shard: no space left")
            self.held.append(row["id"])

        def add(self, entry):
            self.held.append(entry["block"])

    disk: Any = Disk()
    output = make.Output(disk, disk, written=1)
    output.add(0, {"block": 0}, [{"id": "in a shard already"}, {"id": "a"}])
    disk.full = True
    with pytest.raises(UserError, match="no space"):
        output.add(2, {"block": 1}, [{"id": "b"}])
    disk.full = False
    output.add(3, {"block": 2}, [])
    assert disk.held == ["a", 0]


def test_the_main_process_holds_little_that_waits_for_the_disk(whole, tmp_path, model, monkeypatch):
    written, received = [], []
    add, deliver = make.Output.add, Processes.deliver

    def slow(self, first, entry, rows):
        time.sleep(0.05)
        add(self, first, entry, rows)
        written.append(len(rows))

    def watched(self, parcels):
        assert sum(written) == sum(received)  # before the next block comes
        found = deliver(self, parcels)
        received.append(len(found.get(0, [])))
        return found

    monkeypatch.setattr(make, "BACKLOG", 0)
    monkeypatch.setattr(make.Output, "add", slow)
    monkeypatch.setattr(Processes, "deliver", watched)
    config = recipe(tmp_path, model)
    make.make(config)
    assert sum(received) == 12 and made(config.output) == made(whole.output)


def test_two_processes_make_the_same_set(command, whole, tmp_path):
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    path = runs.recipe(config, tmp_path / "recipe.yaml")  # type: ignore[arg-type]
    result = command("pairs", "--config", path, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("12 pairs of") == 1
    assert made(config.output) == made(whole.output)


def test_too_many_drops_end_it_with_the_reasons(tmp_path, model, capsys):
    """Of the on-policy source nothing is kept, so what is left holds too little of the policy; nothing is lost."""
    config = recipe(tmp_path, model, tries=2.0, pairs=5, min_margin=2.0)
    config.sources[0].delta = DeltaConfig(DrawConfig(guidance=2.0), DrawConfig(guidance=0.5), screen=False)
    with pytest.raises(UserError, match=r"on_policy_share: 0 of 2 pairs with an image of the policy, and 0.6 of"):
        make.make(config)
    assert "source judged: 0 of 3 pairs after 6 candidates (tries 2)" in capsys.readouterr().err
    quality = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert quality["dropped"] == {"small margin": 6} and quality["pairs"] == 2
    with pytest.raises(UserError, match="is unfinished"):
        read_preferences(config.output)
    config.sources, config.output = config.sources[1:], str(tmp_path / "none")
    with pytest.raises(UserError, match="pairs: not one candidate was kept"):
        make.make(config)


# ---- recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": []}, "sources: is empty"),
        ({"sources": [PairSource("a", delta=GUIDED), PairSource("a", delta=GUIDED)]}, r"sources\[1\].name: is 'a'"),
        ({"sources": [{"name": "a"}]}, r"sources\[0\]: 'a' needs either delta or judged"),
        ({"sources": [{"name": "a", "delta": GUIDED, "judged": {}}]}, "needs either delta or judged"),
        ({"sources": [{"name": "a", "share": 0.0, "delta": GUIDED}]}, r"sources\[0\].share: is 0"),
        ({"sources": [{"name": "a", "judged": {"group_size": 1}}]}, "judged.group_size: is 1, but the best"),
        (
            {"sources": [{"name": "a", "delta": {"stronger": {}, "weaker": {"checkpoint": "base", "steps": 2}}}]},
            r"sources\[0\].delta: stronger and weaker draw alike",
        ),
        ({"sources": [{"name": "a", "delta": {"stronger": {"guidance": -1}, "weaker": {}}}]}, "guidance: is -1"),
        ({"sources": [{"name": "a", "delta": {"stronger": {}, "weaker": {"drop": 1.0}}}]}, "weaker.drop: is 1"),
        ({"sources": [{"name": "a", "delta": {"stronger": {}, "weaker": {"noise": 1.0}}}]}, "weaker.noise: is 1"),
        ({"sources": [{"name": "a", "delta": {"stronger": {}, "weaker": {"steps": 0}}}]}, "weaker.steps: is 0"),
        (
            {"sources": [PairSource("a", delta=DeltaConfig(DrawConfig(guidance=1), DrawConfig(drop=0.5)))]},
            "on_policy_share: is 0.6, and no source draws as the policy does",
        ),
        ({"rewards": []}, "rewards: hold none that ranks for source judged"),
        ({"rewards": [RewardSpec("a", "m:f", heldout_only=True)]}, "rewards: hold none that ranks"),
        ({"rewards": [RewardSpec("a", "m:f", group=True)]}, r"rewards\[0\].group: 'a' sees whole groups"),
        ({"pairs": 0}, "pairs: is 0; use 1 or more"),
        ({"tries": 0.5}, "tries: is 0.5"),
        ({"min_margin": -0.1}, "min_margin: is -0.1"),
        ({"min_distance": 2.0}, "min_distance: is 2.0; use 0 to 1"),
        ({"on_policy_share": 1.1}, "on_policy_share: is 1.1"),
        ({"sizes": [[32, 33]]}, r"sizes\[0\]: 33 pixels is not a multiple of 16"),
        ({"sizes": []}, "sizes: is empty"),
        ({"prompts": " "}, "prompts: is empty"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, change, says):
    config = recipe(tmp_path, Path("k2"))
    validate(config)
    with pytest.raises(ConfigError, match=says):
        validate(dataclasses.replace(config, **change))


@pytest.mark.parametrize("name", ["pairs", "pair_sources", "style_pairs"])
def test_shipped_recipes_are_valid(name):
    config, resume = load_config("pairs", ["--config", str(runs.ROOT / f"recipes/nano/{name}.yaml")])
    assert isinstance(config, PairsConfig) and not resume
    oracles = [r for r in config.rewards if isinstance(r.function, str) and ".nano.world." in r.function]
    assert all(reward.heldout_only for reward in oracles)  # they measure, and never choose


def test_pairs_are_preferences(whole, tmp_path):
    """The first row as `datasets` hands it on; the pairs' own reader is tested with the record."""
    import datasets

    row = datasets.load_dataset(whole.output, split="train", cache_dir=str(tmp_path))[0]
    assert set(row) == {field.name for field in dataclasses.fields(Preference)}
