"""Pairs from prompts: the plan and the choice by hand, and whole sets from the tiny pipeline."""

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import checkpoint, pair_plan, pair_quality, pairs, sampler
from posttrain.cli import load_config
from posttrain.config import ModelConfig, RewardSpec
from posttrain.drawing import Drawer
from posttrain.k2 import K2
from posttrain.pair_choice import Judgement, Rules, best_and_worst, decide_groups, decide_pairs, degrade, verdict
from posttrain.pairs_config import DeltaConfig, DrawConfig, JudgedConfig, PairsConfig, PairSource
from posttrain.policy import POLICY, described, load_model, saved_tensors
from posttrain.preferences import Preference, read_preferences
from posttrain.ranges import ConfigError
from posttrain.report import write_report
from posttrain.validate import validate
from prompts.errors import UserError
from rewards.base import Failure, Reward, score_all
from tests import runs, tiny
from tests.gullible import GULLED, RAISED

GUIDED = DeltaConfig(DrawConfig(guidance=2.0), DrawConfig())


def recipe(folder: Path, model: Path, **changes) -> PairsConfig:
    """Twelve pairs of 32 x 32 or 16 x 48 pixels in shards of five, half by guidance and half by brightness."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS))
    made = PairsConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(model), dtype="float32"),
        prompts=str(folder / "prompts.jsonl"),
        sources=[
            PairSource("guidance", delta=dataclasses.replace(GUIDED, screen=False)),
            PairSource("judged", judged=JudgedConfig(group_size=3)),
        ],
        rewards=[RewardSpec("brightness", "tests.runs:brightness")],
        pairs=12,
        min_margin=0.001,
        min_distance=0.001,
        sizes=[[32, 32], [16, 48]],
        steps=2,
        max_tokens=64,
        block=3,
        micro_batch=4,
        shard=5,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """An uninterrupted run."""
    config = recipe(tmp_path_factory.mktemp("whole"), model)
    pairs.make(config)
    return config


def made(run: str | Path) -> dict[str, bytes]:
    """Every file whose content does not say when and where it was made."""
    names = ("shard-*.parquet", "preferences.json", "candidates.jsonl", "quality.json", "pairs.png")
    return {path.name: path.read_bytes() for name in names for path in Path(run).glob(name)}


# ---- the plan ---------------------------------------------------------------------------------------------


def test_quotas():
    share = pair_plan.quotas
    assert share(10, [1, 1], [True, False], 0.0) == [5, 5]
    assert share(10, [1, 1], [True, False], 0.6) == [6, 4]  # lifted to the least share
    assert share(10, [3, 1], [True, False], 0.6) == [8, 2]  # 7.5 is above it already
    assert share(11, [1, 1, 2], [True, True, False], 0.6) == [4, 3, 4]  # ceil(6.6) = 7 for two
    assert share(7, [1, 1], [True, True], 0.6) == [4, 3] and share(7, [1], [False], 0.6) == [7]
    assert pair_plan.largest_remainder(10, [1, 1, 1]) == [4, 3, 3]
    assert pair_plan.largest_remainder(10, [0.26, 0.26, 0.48]) == [3, 2, 5]  # 2.6, 2.6, 4.8


def test_plan_draws_more_for_what_was_dropped(tmp_path):
    config = recipe(tmp_path, Path("k2"), tries=3.0)
    plan = pair_plan.Plan(config)
    first = plan.generation()
    assert [(b.source, b.first, b.count) for b in first] == [(0, 0, 3), (0, 3, 3), (1, 0, 3), (1, 3, 3)]
    assert [b.index for b in first] == [0, 1, 2, 3] and [b.size for b in first] == [(32, 32), (16, 48)] * 2
    assert [plan.prompt(b, 0) for b in first] == [0, 6, 1, 7]  # sources take turns, so none has another's prompt
    for block, kept in zip(first, (3, 3, 1, 1)):
        plan.take(block, kept)
    again = plan.generation()
    # Of six candidates two were kept, so four more pairs take twelve; three times the six pairs are the most.
    assert [(b.index, b.source, b.first, b.count) for b in again] == [(4 + i, 1, 6 + 3 * i, 3) for i in range(4)]
    for block in again:
        plan.take(block, 0)
    assert plan.generation() == [] and (plan.kept, plan.made) == ([6, 2], [6, 18])


def test_on_policy_is_the_policys_own_way(tmp_path):
    config = recipe(tmp_path, Path("k2"))
    for draw in (DrawConfig(), DrawConfig("base"), DrawConfig(steps=2)):
        assert pair_plan.is_policy(config, draw)
    for change in ({"guidance": 0.5}, {"steps": 3}, {"drop": 0.5}, {"noise": 0.5}, {"checkpoint": "runs/a"}):
        assert not pair_plan.is_policy(config, DrawConfig(**change))
    config.policy = "runs/a"
    assert not pair_plan.is_policy(config, DrawConfig("base"))
    assert pair_plan.is_policy(config, DrawConfig("policy")) and pair_plan.is_policy(config, DrawConfig("runs/a"))


# ---- the choice -------------------------------------------------------------------------------------------


def judged(columns: dict[str, list], *specs: RewardSpec):
    """Scores and the specs: a reward of weight 1 for each column that no spec names."""
    named = {spec.name: spec for spec in specs}
    full = [named.get(name, RewardSpec(name, "f")) for name in columns]
    asked = [
        Reward(dataclasses.replace(spec, max_failures=1), lambda *_, column=column: column, set(), False)
        for spec, column in zip(full, columns.values())
    ]
    images = [Image.new("RGB", (16, 16))] * len(next(iter(columns.values())))
    return asyncio.run(score_all(asked, images, [""] * len(images))), full


def test_best_and_worst_by_rewards_normalised_in_the_group():
    """The second reward spans a tenth of the first; each counts in its own standard deviations."""
    scores, specs = judged({"a": [0.0, 0.5, 1.0], "b": [0.2, 0.3, 0.1]})
    # a: -1, 0, 1; b: 0, 1, -1; together -1, 1, 0
    assert best_and_worst(Judgement.of(scores, specs), 3) == [(1, 0)]
    specs[1].weight = 0.4  # -1, 0.4, 0.6
    assert best_and_worst(Judgement.of(scores, specs), 3) == [(2, 0)]


def test_missing_scores_are_no_numbers():
    scores, specs = judged({"a": [0.9, None, 0.1, 0.5, None, Failure("x")]})
    assert best_and_worst(Judgement.of(scores, specs), 3) == [(0, 2), None]


def test_gates_flag_winners_and_never_losers():
    gate = RewardSpec("clean", "f", gate="mask", threshold=0.5)
    columns = {"a": [0.9, 0.5, 0.1], "clean": [0.4, 0.6, 0.0]}
    scores, specs = judged(columns, gate)
    judgement = Judgement.of(scores, specs)
    assert judgement.weights_K.tolist() == [1.0] and judgement.flagged_N.tolist() == [True, False, True]
    assert best_and_worst(judgement, 3) == [(1, 2)]  # the best of those that may win; the flagged one may lose
    unsure = Judgement.of(*judged({"a": [0.9, 0.1], "clean": [Failure("x"), None]}, gate))
    assert unsure.unsure_N.tolist() == [True, False] and not unsure.flagged_N.any()
    factor = RewardSpec("clean", "f", gate="multiply")
    assert Judgement.of(*judged(columns, factor)).values_NK[:, 0].tolist() == pytest.approx([0.36, 0.3, 0.0])


RULES = Rules(min_margin=0.1, tolerance=0.02, min_distance=0.05)


@pytest.mark.parametrize(
    ("columns", "distance", "ranked", "fate", "margin"),
    [
        ({"a": [0.6, 0.2], "b": [0.5, 0.5]}, 0.1, True, "kept", 0.2),  # (0.4 + 0) / 2
        ({"a": [0.6, 0.2], "b": [0.5, 0.5]}, 0.04, True, "near-duplicate", 0.2),
        ({"a": [0.6, 0.2], "b": [0.50, 0.51]}, 0.1, True, "kept", 0.195),  # within the tolerance
        ({"a": [0.9, 0.2], "b": [0.40, 0.45]}, 0.1, True, "disagreement", 0.325),
        ({"a": [0.6, 0.45], "b": [0.5, 0.5]}, 0.1, True, "small margin", 0.075),
        ({"a": [0.6, 0.2], "b": [0.5, None]}, 0.1, True, "kept", 0.4),  # b has nothing to say
        ({"a": [0.6, None], "b": [None, 0.5]}, 0.1, True, "unscored", None),
        ({"a": [0.6, None], "b": [None, 0.5]}, 0.1, False, "kept", None),  # the order is known without them
        ({"a": [0.6, 0.2], "gate": [0.3, 0.9]}, 0.1, True, "flagged", 0.4),
        ({"a": [0.6, 0.2], "gate": [0.3, 0.9]}, 0.1, False, "flagged", 0.4),
        ({"a": [0.6, 0.2], "gate": [0.9, 0.3]}, 0.1, True, "kept", 0.4),
        ({"a": [0.6, 0.2], "gate": [Failure("x"), 0.9]}, 0.1, True, "unscored", 0.4),
        ({"a": [0.6, 0.2], "gate": [Failure("x"), 0.9]}, 0.1, False, "kept", 0.4),
        ({"a": [0.2, 0.6]}, 0.1, False, "disagreement", -0.4),
    ],
)
def test_verdict(columns, distance, ranked, fate, margin):
    judgement = Judgement.of(*judged(columns, RewardSpec("gate", "f", gate="mask", threshold=0.5)))
    said = verdict(judgement, 0, 1, distance, RULES, ranked, screen=True)
    assert said == (fate, margin if margin is None else pytest.approx(margin))


def test_rewards_that_only_report():
    judgement = Judgement.of(*judged({"a": [0.2, 0.6]}))
    assert verdict(judgement, 0, 1, 0.1, RULES, ranked=False, screen=False) == ("kept", pytest.approx(-0.4))
    assert verdict(None, 0, 1, 0.1, RULES, ranked=False, screen=True) == ("kept", None)
    no_rules = Rules(0, 0, 0)
    assert verdict(None, 0, 1, 0.0, no_rules, ranked=False, screen=True) == ("near-duplicate", None)
    assert verdict(Judgement.of(*judged({"a": [0.5, 0.5]})), 0, 1, 0.1, no_rules, True, True)[0] == "small margin"


def test_degrade():
    prompt = 'white background, flat style, the word "SALT AND, PEPPER" and a small star'
    parts = ["white background", "flat style", 'the word "SALT AND, PEPPER"', "a small star"]
    for seed in range(20):
        left = [part for part in parts if part in degrade(prompt, 0.5, seed)]
        assert len(left) == 2 and degrade(prompt, 0.5, seed) == ", ".join(left)
    assert {degrade(prompt, 0.01, seed) for seed in range(40)} == {
        ", ".join(parts[:i] + parts[i + 1 :]) for i in range(4)
    }
    assert {degrade("a red circle", 0.99, seed) for seed in range(40)} == {"a", "red", "circle"}
    assert degrade("circle", 0.5, 0) == "circle"


def test_near_duplicates_and_fates_of_a_block():
    """Pictures of 16 x 16 are their own small versions: 5 of 255 everywhere is a distance of 0.0196."""
    dark = np.zeros((16, 16, 3), np.uint8)
    images = np.stack([dark + 100, dark + 100, dark + 105, dark + 200])
    decision = decide_pairs(images, None, [], Rules(0, 0, 0.02), screen=True)
    assert decision.pairs == [(0, 2), (1, 3)] and decision.fates == ["near-duplicate", "kept"]
    assert decision.distances == pytest.approx([5 / 255, 100 / 255]) and decision.margins == [None, None]
    scores, specs = judged({"a": [0.1, 0.2, 0.3, 0.9]})
    grouped = decide_groups(images, scores, specs, Rules(0, 0, 0.02), 2)
    assert grouped.pairs == [(1, 0), (3, 2)] and grouped.fates == ["near-duplicate", "kept"]
    assert grouped.entry()["differences"] == {"a": pytest.approx([0.1, 0.6])}


# ---- the report -------------------------------------------------------------------------------------------


def entry(source: str, fates: list[str], differences: list[float | None], margins: list[float | None]) -> dict:
    return {"source": source, "fates": fates, "margins": margins, "distances": [0.1, 0.2, 0.3][: len(fates)],
            "prompts": [0, 1, 2][: len(fates)], "cut": 1, "images": 2 * len(fates), "missing": {"brightness": 1},
            "failed": {"brightness": 0}, "differences": {"brightness": differences}}  # fmt: skip


def test_quality_by_hand(tmp_path):
    config = recipe(tmp_path, Path("k2"))
    config.sources.append(PairSource("prompt", delta=DeltaConfig(DrawConfig(guidance=1), DrawConfig(drop=0.5))))
    config.sources[2].delta = DeltaConfig(DrawConfig(guidance=1), DrawConfig(guidance=1, drop=0.5))
    entries = [
        entry("guidance", ["kept", "kept", "disagreement"], [0.2, 0.0, -0.1], [0.25, None, -0.1]),
        entry("guidance", ["kept", "surplus"], [-0.3, None], [-1.7, 0.1]),
        entry("prompt", ["kept"], [0.4], [0.4]),
    ]
    found = pair_quality.quality(config, entries)
    assert (found["pairs"], found["candidates"], found["on_policy_share"]) == (4, 6, 0.75)
    assert found["dropped"] == {"disagreement": 1, "surplus": 1}
    guidance = found["sources"]["guidance"]
    assert (guidance["pairs"], guidance["share"], guidance["on_policy"]) == (3, 0.75, True)
    assert found["sources"]["prompt"]["on_policy"] is False and found["sources"]["judged"]["pairs"] == 0
    # Of five candidates one agrees, two disagree, one is a tie, one has no score; of the three kept, one and one.
    assert guidance["agreement"]["brightness"] == {
        "agree": 1, "disagree": 2, "tie": 1, "missing": 1, "share": pytest.approx(1 / 3), "share_of_kept": 0.5,
    }  # fmt: skip
    counts = dict(zip(found["margin_edges"], guidance["margin"]["counts"]))
    assert {low: n for low, n in counts.items() if n} == {-1.0: 1, 0.2: 1} and guidance["margin"]["unknown"] == 1
    assert guidance["distance"]["median"] == pytest.approx(0.2)  # of 0.1, 0.2, 0.3, 0.1, 0.2
    assert found["scores"] == {"brightness": {"images": 12, "missing": 3, "failed": 0}}
    assert found["prompts"] == {"used": 2, "most_pairs": 3, "cut": 3}
    lines = "\n".join(pair_quality.in_words(found))
    assert "4 pairs of 6 candidates; 75% hold a picture of the policy" in lines
    assert "warning: 3 prompts were longer than max_tokens" in lines
    assert "guidance: 3 pairs (75%, on-policy); dropped: 1 disagreement, 1 surplus" in lines


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
        pairs.make(config, resume=True)
        assert made(run) == made(whole.output), (shards, text)


def test_killed_and_resumed_in_a_process(whole, tmp_path):
    commands = runs.Commands(tmp_path)
    try:
        config = dataclasses.replace(whole, output=str(tmp_path / "run"))
        path, run = runs.recipe(config, tmp_path / "recipe.yaml"), tmp_path / "run"  # type: ignore[arg-type]
        (process,), began = commands.start("pairs", "--config", path), time.monotonic()
        while not (run / "candidates.jsonl").exists() or not (run / "candidates.jsonl").read_bytes():
            assert time.monotonic() - began < 120
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert commands.wait().returncode == -signal.SIGKILL and not (run / "preferences.json").exists()
        refused = commands("pairs", "--config", path, "--resume", "--min_margin", 0.5)
        assert refused.returncode == 2 and "min_margin: is not what" in refused.stderr
        again = commands("pairs", "--config", path)
        assert again.returncode == 2 and "add --resume or choose another" in again.stderr
        result = commands("pairs", "--config", path, "--resume")
        assert result.returncode == 0 and "12 pairs of" in result.stdout, result.stderr
        assert made(run) == made(whole.output)
        (run / "quality.json").unlink()
        assert commands("pairs", "--config", path, "--resume").returncode == 0  # finished: the report alone
        assert made(run) == made(whole.output)
    finally:
        commands.close()


def test_what_an_order_to_the_judge_is_worth_is_measured_once(tmp_path, model, capsys):
    rewards = [RewardSpec("brightness", "tests.runs:brightness"), RewardSpec("gulled", GULLED, heldout_only=True)]
    config = recipe(tmp_path, model, rewards=rewards, pairs=2)
    pairs.make(config)
    worth = {"injection/picture/gulled": pytest.approx(RAISED), "injection/prompt/gulled": None}
    assert runs.rows(config.output)[0].items() >= {"step": 0, "repeatability/gullible": 0, **worth}.items()
    warning = "reward gulled: text that tells the judge what to answer raises it in a picture by 0.70"
    assert warning in capsys.readouterr().err
    assert "injection" in write_report(Path(config.output)).read_text()
    (tmp_path / "run/preferences.json").unlink()
    pairs.make(dataclasses.replace(config), resume=True)
    assert "reward gulled" not in capsys.readouterr().err
    assert sum("injection/picture/gulled" in row for row in runs.rows(config.output)) == 1


def test_two_processes_make_the_same_set(whole, tmp_path):
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    path = runs.recipe(config, tmp_path / "recipe.yaml")  # type: ignore[arg-type]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "posttrain.cli", "pairs", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("12 pairs of") == 1
    assert made(config.output) == made(whole.output)


def test_too_many_drops_end_it_with_the_reasons(tmp_path, model, capsys):
    """Of the on-policy source nothing is kept, so what is left holds too little of the policy; nothing is lost."""
    config = recipe(tmp_path, model, tries=2.0, pairs=5, min_margin=2.0)
    config.sources[0].delta = DeltaConfig(DrawConfig(guidance=2.0), DrawConfig(guidance=0.5), screen=False)
    with pytest.raises(UserError, match=r"on_policy_share: 0 of 2 pairs hold a picture of the policy, and 0.6 of"):
        pairs.make(config)
    assert "source judged: 0 of 3 pairs after 6 candidates (tries 2)" in capsys.readouterr().err
    quality = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert quality["dropped"] == {"small margin": 6} and quality["pairs"] == 2
    with pytest.raises(UserError, match="is unfinished"):
        read_preferences(config.output)
    config.sources, config.output = config.sources[1:], str(tmp_path / "none")
    with pytest.raises(UserError, match="pairs: not one candidate was kept"):
        pairs.make(config)


# ---- ways to draw -----------------------------------------------------------------------------------------


def trained(model: Path, run: Path, seed: int, lora: bool = True, **state) -> Path:
    """A run directory with an adapter (or weights) that changes what is drawn."""
    k2 = K2.load(model)
    if lora:
        k2.add_role(POLICY, 4, 8.0, seed=seed)
    else:
        k2.add_full_role(POLICY)
    torch.manual_seed(seed)
    for parameter in k2.role_parameters(POLICY):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return checkpoint.save(run / "checkpoints", 1, saved_tensors(k2), {"lora": described(k2), **state}, 1)


def drawn(config: PairsConfig, *draws: DrawConfig) -> tuple[list[torch.Tensor], dict[str, int]]:
    """One picture of the longest prompt in each way, by the same noise; and the model's work."""
    drawer, found = Drawer(config, torch.device("cpu")), []
    drawer.begin()
    for draw in draws:
        drawer.draw(draw, [tiny.PROMPTS[3]], [7], (32, 32), lambda rows, pictures: found.append(pictures[0]))
    return found, dict(drawer.end(measure=False)[0].images)


def test_checkpoints_and_the_base_draw_differently(tmp_path, model):
    policy, earlier = (trained(model, tmp_path / name, seed) for seed, name in enumerate(("policy", "earlier")))
    config = recipe(tmp_path, model, policy=str(tmp_path / "policy"))
    ways = [DrawConfig(), DrawConfig("base"), DrawConfig(str(tmp_path / "earlier")), DrawConfig(str(policy))]
    config.sources = [PairSource("x", delta=DeltaConfig(ways[0], way)) for way in ways[1:3]]
    config.sources[1].delta = DeltaConfig(ways[3], ways[2])
    (own, base, other, same), _ = drawn(config, *ways)
    assert torch.equal(own, same)
    k2 = K2.load(model)
    noise = sampler.noise([7], (k2.image_tokens(32, 32), k2.latent_channels))
    for role, picture in ((None, base), ("policy", own), ("earlier", other)):
        if role is not None:
            k2.add_role(role, 4, 8.0)
            k2.load_role_state_dict(role, checkpoint.load(policy if role == "policy" else earlier).tensors["adapter"])
        with k2.role(role):
            expected = k2.decode(k2.sample(k2.text([tiny.PROMPTS[3]]), noise, 2, 32, 32), 32, 32)[0]
        assert torch.equal(picture, expected)
    assert not torch.equal(own, base) and not torch.equal(own, other)
    drawer = Drawer(config, torch.device("cpu"))
    assert drawer.describe(ways[0]) == str(policy) and drawer.describe(ways[1]) == str(model)
    assert drawer.describe(DrawConfig("base", 1.5, 3, 0.5)) == f"{model}, guidance 1.5, steps 3, drop 0.5"


def test_noised_and_degraded(tmp_path, model):
    """Noised latents are (1 - t) x0 + t eps, and what comes before is drawn once for both."""
    config = recipe(tmp_path, model)
    (plain, noisy, degraded), work = drawn(config, DrawConfig(), DrawConfig(noise=0.4), DrawConfig(drop=0.5))
    assert work == {"forward": 2 + 0 + 2, "decode": 3}
    k2 = K2.load(model)
    shape, text = (k2.image_tokens(32, 32), k2.latent_channels), k2.text([tiny.PROMPTS[3]])
    x0 = k2.sample(text, sampler.noise([7], shape), 2, 32, 32)
    x = 0.6 * x0 + 0.4 * sampler.noise([sampler.seed_for(7, -1)], shape)
    short = k2.sample(k2.text([degrade(tiny.PROMPTS[3], 0.5, 7)]), sampler.noise([7], shape), 2, 32, 32)
    for picture, latents in ((plain, x0), (noisy, x), (degraded, short)):
        assert torch.equal(picture, k2.decode(latents, 32, 32)[0])
    assert len({picture.numpy().tobytes() for picture in (plain, noisy, degraded)}) == 3


def test_checkpoints_that_cannot_be_used(tmp_path, model):
    config = recipe(tmp_path, model, policy=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^policy: .*none: holds no whole checkpoint; give a run directory"):
        Drawer(config, torch.device("cpu"))
    trained(model, tmp_path / "full", 0, lora=False)
    config = recipe(tmp_path, model)
    full, adapter = tmp_path / "full", trained(model, tmp_path / "adapter", 1)
    config.sources[0].delta = DeltaConfig(DrawConfig(), DrawConfig(str(full)))
    with pytest.raises(UserError, match=r"^checkpoint: .*full has trained all weights, so nothing can be drawn beside"):
        Drawer(config, torch.device("cpu"))
    config.policy, config.sources = str(full), config.sources[1:]
    assert Drawer(config, torch.device("cpu")).names[config.policy].endswith("full/checkpoints/step-000001")

    saved = runs.latest(adapter)
    checkpoint.save(tmp_path / "turbo/checkpoints", 1, saved.tensors, saved.state | {"method": "tdm"}, keep=1)
    config.policy = str(tmp_path / "turbo")
    with pytest.raises(UserError, match=r"^policy: .*turbo: is a distilled student; pairs are for training Raw"):
        Drawer(config, torch.device("cpu"))

    config.policy, config.model.start = None, str(adapter)
    config.sources = [PairSource("x", delta=DeltaConfig(DrawConfig(), DrawConfig(str(adapter))))]
    with pytest.raises(UserError, match=r"^checkpoint: .* was trained on another base than what is drawn here"):
        Drawer(config, torch.device("cpu"))


def test_policy_that_goes_on_from_an_earlier_run(tmp_path, model):
    """Base is then what it began as: the model with the earlier run merged into it."""
    first = trained(model, tmp_path / "first", 0)
    k2 = load_model(ModelConfig(str(model), start=str(first), dtype="float32"), "cpu")
    second = trained(model, tmp_path / "second", 1, origin=k2.origin)
    config = recipe(tmp_path, model, policy=str(second))
    config.sources = [PairSource("x", delta=DeltaConfig(DrawConfig(), DrawConfig("base")))]
    (_, base), _ = drawn(config, DrawConfig(), DrawConfig("base"))
    config = recipe(tmp_path, model, policy=str(first))
    (first_policy,), _ = drawn(config, DrawConfig())
    assert (base.int() - first_policy.int()).abs().max() <= 1  # merged or beside the weights: only rounding differs


# ---- recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": []}, "sources: is empty"),
        ({"sources": [PairSource("a", delta=GUIDED), PairSource("a", delta=GUIDED)]}, r"sources\[1\].name: is 'a'"),
        ({"sources": [PairSource("a")]}, r"sources\[0\]: 'a' needs either delta or judged"),
        ({"sources": [PairSource("a", 1, GUIDED, JudgedConfig())]}, "needs either delta or judged"),
        ({"sources": [PairSource("a", 0.0, GUIDED)]}, r"sources\[0\].share: is 0"),
        ({"sources": [PairSource("a", judged=JudgedConfig(group_size=1))]}, "judged.group_size: is 1, but the best"),
        (
            {"sources": [PairSource("a", delta=DeltaConfig(DrawConfig(), DrawConfig("base", steps=2)))]},
            r"sources\[0\].delta: stronger and weaker draw alike",
        ),
        ({"sources": [PairSource("a", delta=DeltaConfig(DrawConfig(guidance=-1), DrawConfig()))]}, "guidance: is -1"),
        ({"sources": [PairSource("a", delta=DeltaConfig(DrawConfig(), DrawConfig(drop=1.0)))]}, "weaker.drop: is 1"),
        ({"sources": [PairSource("a", delta=DeltaConfig(DrawConfig(), DrawConfig(noise=1.0)))]}, "weaker.noise: is 1"),
        ({"sources": [PairSource("a", delta=DeltaConfig(DrawConfig(), DrawConfig(steps=0)))]}, "weaker.steps: is 0"),
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


@pytest.mark.parametrize("name", ["pairs", "pair_sources"])
def test_shipped_recipes_are_valid(name):
    config, resume = load_config("pairs", ["--config", str(runs.ROOT / f"recipes/nano/{name}.yaml")])
    assert isinstance(config, PairsConfig) and not resume
    oracles = [r for r in config.rewards if isinstance(r.function, str) and "oracles" in r.function]
    assert all(reward.heldout_only for reward in oracles)  # they measure, and never choose


def test_pairs_are_preferences(whole):
    """The first row as `datasets` hands it on; the pairs' own reader is tested with the record."""
    import datasets

    row = datasets.load_dataset(whole.output, split="train")[0]
    assert set(row) == {field.name for field in dataclasses.fields(Preference)}
