"""Mining of prompts: which are kept, how many of each failure class, and the pool that draws them in GDPO."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from posttrain import cli
from posttrain.config.load import load_config
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.expander import gdpo
from posttrain.expander.callbacks import failures
from posttrain.expander.mining import mine, quotas
from posttrain.expander.mining.config import CandidatesConfig, ExpanderMineConfig
from posttrain.expander.mining.quotas import composites, moments, shares, slots, verdict
from posttrain.expander.pooled import PooledPrompts
from posttrain.expander.score import Scored
from prompts.parse import read_lines
from prompts.pool import Pool, PoolConfig
from prompts.records import PromptRecord, read_prompts
from rewards.base import RewardSpec
from tests.helpers import chat, expander_runs, runs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


# ---- arithmetic


@pytest.mark.parametrize(
    ("scores", "mean", "std", "expected"),
    [
        ((0.2, 0.5, 0.9, 0.4, 0.1, 0.8, 0.6, 0.3), 0.475, 0.2816, "kept"),
        ((0, 0, 0, 0, 0, 0, 0, 0.2), 0.025, 0.0707, "hopeless"),
        ((0.9, 0.95, 1, 0.9, 1, 0.95, 0.9, 1), 0.95, 0.0463, "easy"),
        ((0.49, 0.51, 0.5, 0.505, 0.495, 0.51, 0.5, 0.51), 0.5025, 0.0076, "flat"),
        ((0, 0, 0.8, 0.8), 0.4, 0.4619, "kept"),  # two of four are gated
    ],
)
def test_hard_but_not_hopeless(scores, mean, std, expected):
    found = moments(np.array(scores, float))
    assert found == pytest.approx((mean, std), abs=5e-5)
    assert verdict(*found, safe=0.5) == expected


def test_too_few_safe_expansions_and_too_few_scores():
    assert verdict(0.4, 0.4, safe=0.24) == "unsafe" and verdict(0.4, 0.4, safe=0.25) == "kept"
    assert moments(np.array([0.5, np.nan])) == (0.5, None) and verdict(0.5, None, 1.0) == "unscored"
    assert moments(np.array([np.nan])) == (None, None)


def test_rounds_together_are_as_one():
    """Also where scores are missing, and where there are too few."""
    rounds = [np.array([0.2, 0.5, np.nan]), np.array([0.9, 0.4, 0.6]), np.array([np.nan] * 3)]
    parts = [(int((~np.isnan(own)).sum()), *moments(own)) for own in rounds]
    assert quotas.pooled(parts) == pytest.approx(moments(np.concatenate(rounds)))
    assert quotas.pooled(parts[:1]) == pytest.approx(moments(rounds[0]))
    assert quotas.pooled([(1, 0.5, None)]) == (0.5, None) and quotas.pooled([(0, None, None)] * 2) == (None, None)
    assert quotas.pooled([(1, 0.25, None), (1, 0.75, None)]) == pytest.approx(moments(np.array([0.25, 0.75])))


def test_a_composite_is_over_the_rewards_that_have_a_score():
    """(1 * .8 + 3 * .4) / 4 = .5; without the second .8; without any none."""
    values = np.array([[0.8, 0.4], [0.8, 0.4], [0.8, 0.4]])
    valid = np.array([[True, True], [True, False], [False, False]])
    assert composites(values, valid, np.array([1.0, 3.0])).tolist() == pytest.approx([0.5, 0.8, np.nan], nan_ok=True)


def test_quotas():
    """By the root of the count: 30, 9.487 and 3.162 of 42.649."""
    share_of = shares({"text": 900, "count": 90, "hands": 10})
    assert list(share_of.values()) == pytest.approx([0.7034, 0.2224, 0.0741], abs=5e-5)
    counts = {"text": 900, "count": 90, "hands": 10}
    assert slots(share_of, counts, 100) == {"text": 70, "count": 22, "hands": 8}  # .41 is the largest remainder
    # 200 would be 141, 44 and 15; the 5 that are not there go to the others by their shares: 144.4 and 45.6.
    assert slots(share_of, counts, 200) == {"text": 144, "count": 46, "hands": 10}
    assert slots(share_of, counts, 1000) == counts
    assert shares({"a": 1, "none": 0}) == {"a": 1.0} and shares({}) == {}


def test_every_class_gets_its_floor():
    """100 : 1 : 1 would be .834, .083, .083; at a floor of .2 the first gives what the others lack."""
    assert shares({"a": 10_000, "b": 1, "c": 1}, 0.2) == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2})
    # What the small classes get takes the middle one below the floor: it is raised in its turn.
    share_of = shares({"a": 100, "b": 4, "c": 1}, 0.16)
    assert share_of == pytest.approx({"a": 0.68, "b": 0.16, "c": 0.16})
    assert shares({str(i): 1 for i in range(40)}, 0.05) == pytest.approx({str(i): 1 / 40 for i in range(40)})


@pytest.mark.parametrize("total", [1, 7, 99, 1000])
def test_slots_add_up_and_are_within_one_of_their_share(total):
    rng = np.random.default_rng(total)
    counts = {str(i): int(n) for i, n in enumerate(rng.integers(1, 500, 7))}
    share_of = shares(counts)
    total = min(total, sum(counts.values()))
    placed = slots(share_of, counts, total)
    assert sum(placed.values()) == total and sum(share_of.values()) == pytest.approx(1)
    assert all(placed[name] <= count for name, count in counts.items())
    if all(share * total < counts[name] for name, share in share_of.items()):
        assert all(abs(placed[name] - share * total) < 1 for name, share in share_of.items())


# ---- the command


@pytest.fixture(scope="module")
def parts(tmp_path_factory, model):
    return expander_runs.parts(tmp_path_factory.mktemp("parts"), model)


def made(folder, parts, **changes) -> ExpanderMineConfig:
    """A recipe over the prompts of `chat.USERS`, of two failure classes, and traffic."""
    base = expander_runs.config(folder, parts)
    rows = [{"prompt": user, "failure": "text" if '"' in user else "shape"} for user in chat.USERS]
    (folder / "downvoted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    (folder / "traffic.jsonl").write_text("".join(json.dumps({"prompt": f"a dog {i}"}) + "\n" for i in range(20)))
    shared = ("model", "renderer", "rewards", "safety", "diversity", "generation", "track")
    options = {
        "output": str(folder / "mined"), "candidates": [CandidatesConfig(str(folder / "downvoted.jsonl"))],
        "traffic": str(folder / "traffic.jsonl"), "group_size": 3, "batch": 2, "heldout": 0.0,
        "low": 0.0, "high": 1.0, "spread": 0.0,
    }  # fmt: skip
    return ExpanderMineConfig(**{name: getattr(base, name) for name in shared} | options | changes)


def test_a_run_writes_what_gdpo_reads(tmp_path, parts, capsys):
    config = made(tmp_path, parts)
    mine.mine(config)
    output = tmp_path / "mined"
    scores = read_lines(output / "scores.jsonl")
    assert [row["prompt"] for row in scores] == chat.USERS  # once each, though one was voted down twice
    assert all(0 <= row["mean"] <= 1 and row["std"] >= 0 and row["safe"] == 1 for row in scores)
    train = read_prompts(output / "train.jsonl")
    assert [record.tags for record in train] == [["mined/shape"]] * 2 + [["mined/text"]] + [["mined/shape"]] + [
        ["traffic"]
    ] * 4
    counts = json.loads((output / "mined.json").read_text())
    assert counts["verdicts"]["kept"] == 4 and counts["traffic"] == 4
    # 4 prompts in the ratio of root 3 to root 1: 2.54 and 1.46
    assert counts["mined"] == {"shape": 3, "text": 1} and counts["shares"] == {"shape": 0.634, "text": 0.366}
    pool = yaml.safe_load((output / "pool.yaml").read_text())
    assert pool["pool"]["quotas"] == {"mined/shape": 0.317, "mined/text": 0.183}
    assert "4 kept, 0 easy" in capsys.readouterr().out
    runs.assert_metrics_are_defined(output)

    recipe = runs.recipe(expander_runs.config(tmp_path, parts), tmp_path / "gdpo.yaml")
    loaded, _ = load_config("expander gdpo", ["--config", str(recipe), "--config", str(output / "pool.yaml")])
    assert loaded.pool.kind == "adaptive" and loaded.prompts.train == str(output / "train.jsonl")


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, parts):
    mine.mine(made(tmp_path, parts))
    file = tmp_path / "mined/scores.jsonl"
    whole, train = file.read_text(), (tmp_path / "mined/train.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:20])
    expander_runs.CALLS.clear()
    mine.mine(made(tmp_path, parts), resume=True)
    assert file.read_text() == whole and (tmp_path / "mined/train.jsonl").read_text() == train
    assert len(expander_runs.CALLS) == 1  # one batch of two
    # Other limits need no other scores; another expander does.
    with pytest.raises(UserError, match=r"candidates: no candidate is hard but not hopeless \(4 flat; see"):
        mine.mine(made(tmp_path, parts, spread=1.0), resume=True)
    assert len(expander_runs.CALLS) == 1
    with pytest.raises(UserError, match=r"group_size: differs from .*recipe\.yaml"):
        mine.mine(made(tmp_path, parts, group_size=4), resume=True)


def test_a_resumed_run_takes_the_failure_classes_as_they_are_now(tmp_path, parts):
    """Tags of train.jsonl and quotas of pool.yaml name the same classes, not those of the first run."""
    mine.mine(made(tmp_path, parts))
    candidates = [CandidatesConfig(str(tmp_path / "downvoted.jsonl"), failure="downvoted")]
    mine.mine(made(tmp_path, parts, candidates=candidates), resume=True)
    pool = yaml.safe_load((tmp_path / "mined/pool.yaml").read_text())
    assert pool["pool"]["quotas"] == {"mined/downvoted": 0.5}
    mined = read_prompts(tmp_path / "mined/train.jsonl")[:4]
    assert [record.tags for record in mined] == [["mined/downvoted"]] * 4


def test_a_second_round_scores_what_the_first_kept(tmp_path, parts):
    """With other expansions and noise. Raising `rounds` on resume scores nothing of the first round again."""
    mine.mine(made(tmp_path, parts))
    first = read_lines(tmp_path / "mined/scores.jsonl")
    middle = sorted(row["mean"] for row in first)[1:3]
    limits = {"low": middle[0], "high": middle[1]}
    expander_runs.CALLS.clear()
    with contextlib.suppress(UserError):  # so narrow are the limits that in the end none may be kept
        mine.mine(made(tmp_path, parts, rounds=2, **limits), resume=True)
    scores = read_lines(tmp_path / "mined/scores.jsonl")
    assert scores[:4] == first and {row["round"] for row in first} == {1}
    again = {row["prompt"]: row for row in scores[4:]}
    assert again.keys() == {row["prompt"] for row in first if row["mean"] in middle} and len(expander_runs.CALLS) == 1
    assert all(row["round"] == 2 and row["mean"] not in middle for row in again.values())
    whole = (tmp_path / "mined/scores.jsonl").read_text()
    shutil.rmtree(tmp_path / "mined")
    with contextlib.suppress(UserError):
        mine.mine(made(tmp_path, parts, rounds=2, **limits))
    assert (tmp_path / "mined/scores.jsonl").read_text() == whole


def test_the_nearest_to_the_middle_are_taken_and_quotas_hold(tmp_path, parts):
    config = made(tmp_path, parts, count=10, low=0.2, high=0.8, spread=0.1)
    rows = [{"failure": "a", "mean": 0.2 + 0.006 * i, "std": 0.2, "safe": 1.0} for i in range(100)]
    rows += [{"failure": "b", "mean": 0.5, "std": 0.2, "safe": 1.0}] * 25
    rows += [{"failure": "c", "mean": 0.5, "std": 0.01, "safe": 1.0}] * 25  # flat, so there is no class of them
    chosen, share_of = mine.select(config, rows)
    assert share_of == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert [rows[i]["failure"] for i in chosen] == ["a"] * 7 + ["b"] * 3
    assert max(abs(rows[i]["mean"] - 0.5) for i in chosen) < 0.022


def test_held_out_prompts_are_neither_scored_nor_trained_on(tmp_path, parts):
    config = made(tmp_path, parts, heldout=0.5)
    kept, heldout, traffic = mine.read_candidates(config)
    users = {record.prompt for record, _ in kept}
    others = {record.prompt for record, _ in heldout}
    assert users | (others & set(chat.USERS)) == set(chat.USERS) and 0 < len(users) < 4
    assert not others & {record.prompt for record in traffic} and len(traffic) + len(others) > 20 - 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"low": 0.8, "high": 0.8}, "low: is 0.8, not below high"),
        ({"candidates": []}, "candidates: .*name at least one file"),
        ({"traffic_share": 1.0}, "traffic_share"),
        ({"rewards": []}, "rewards: none is trained on"),
    ],
)
def test_settings_that_cannot_be(tmp_path, parts, changes, says):
    with pytest.raises(ConfigError, match=says):
        made(tmp_path, parts, **changes)


def test_a_mistake_ends_the_command_in_one_line(tmp_path, parts, capsys):
    config = made(tmp_path, parts)
    config.candidates[0].column = "reason"
    assert cli.main(["expander", "mine", "--config", str(runs.recipe(config, tmp_path / "r.yaml"))]) == 2
    error = capsys.readouterr().err
    assert "candidates[0].column: " in error and "'a red circle' has no failure class in 'reason'" in error


def test_scores_outside_0_and_1_are_refused(tmp_path, parts):
    config = made(tmp_path, parts)
    scored = Scored(
        ["brightness", "redness", "diversity"], np.array([[1.5, 0.0, 0.0]]), np.ones((1, 3), bool), [[]], [[]], [None],
        [False], None, [0], 0, {},
    )  # fmt: skip
    with pytest.raises(UserError, match="reward brightness: a score is outside"):
        mine.composite(config, scored)


# ---- the pool in GDPO


@pytest.fixture
def pooled(tmp_path, parts):
    config = expander_runs.config(tmp_path, parts)
    config.pool = PoolConfig("adaptive")
    return config


def test_the_pool_draws_a_steps_prompts_after_the_last_steps_scores(pooled, monkeypatch):
    """Each step's prompts are those that the pool draws once it has the scores of the step before."""
    events = []

    class Watched(PooledPrompts):
        def inputs(self, step):
            found = super().inputs(step)
            events.append(("draw", step, [row["row"] for row in found]))
            return found

        def update(self, step, scored):
            events.append(("update", step, list(scored.names)))
            return super().update(step, scored)

    monkeypatch.setattr(gdpo, "PooledPrompts", Watched)
    pooled.steps = 3
    gdpo.train(pooled)
    assert [event[:2] for event in events] == [(what, step) for step in (1, 2, 3) for what in ("draw", "update")]
    for _, _, rows in events[::2]:
        assert len(rows) == 8 and rows[:4] == [rows[0]] * 4 and rows[4:] == [rows[4]] * 4 and rows[0] != rows[4]
    steps = [row for row in runs.rows(runs.Path(pooled.output)) if "loss" in row]
    classes = ("new", "informative", "easy", "hard", "flat")
    assert all(sum(row[f"pool/{name}"] for name in classes) == 4 for row in steps)
    runs.assert_metrics_are_defined(runs.Path(pooled.output), "brightness", "redness", "diversity")
    assert "most informative" in (runs.Path(pooled.output) / "prompts.json").read_text()


@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_run_with_a_pool_equals_an_uninterrupted_one(pooled, done, no_pickle):
    pooled.steps, pooled.checkpoint.keep = 3, 3
    gdpo.train(pooled)
    run = runs.Path(pooled.output)
    whole, rows = load_file(run / "adapter/adapter_model.safetensors"), runs.untimed(run)
    expander_runs.plain_files(run / f"checkpoints/checkpoint-{done}")
    for step in range(done + 1, 4):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    gdpo.train(pooled, resume=True)
    runs.assert_equal(load_file(run / "adapter/adapter_model.safetensors"), whole)
    left_out = ("num_tokens",)  # TRL counts them from where it resumes
    again = [{k: v for k, v in row.items() if k not in left_out} for row in runs.untimed(run)]
    assert again == [{k: v for k, v in row.items() if k not in left_out} for row in rows]


def test_what_the_pool_learns_is_of_the_rewards_alone(pooled):
    """Diversity differs in nearly every group, so it says nothing of what a prompt teaches."""

    class Two:
        rank, size = 0, 1

        def local_indices(self, count):
            return range(count)

        def all_gather(self, value):
            return [value]

    pooled.rewards = [RewardSpec("brightness", "tests.helpers.expander_runs:brightness")]
    records = [PromptRecord(user) for user in chat.USERS]
    prompts = PooledPrompts(pooled, records, Two(), False)
    prompts.inputs(1)
    values = np.zeros((8, 2))
    values[:, 1] = np.arange(8) / 8  # diversity
    values[4:, 0] = (0, 1, 0, 1)
    scored = Scored(
        ["brightness", "diversity"], values, np.ones((8, 2), bool), [[]] * 8, [[]] * 8, [None] * 8, [True] * 8, None,
        [0] * 8, 8, {},
    )  # fmt: skip
    prompts.update(1, scored)
    pool = prompts.source.pool
    assert pool.rewards == ["brightness"]
    assert sorted(pool.variance_NK[pool.visits > 0, 0].tolist()) == pytest.approx([0, 1 / 3])


def test_quotas_of_a_pool_are_exact_over_a_run(tmp_path):
    """In each step every class has its share of the prompts, rounded up or down, even when all its prompts are flat."""
    tags = {"traffic": 40, "mined/a": 20, "mined/b": 5}
    records = [PromptRecord(f"{tag} {i}", tags=[tag]) for tag, n in tags.items() for i in range(n)]
    quotas = {"mined/a": 0.35, "mined/b": 0.15}
    pool = Pool(records, {"r": 1.0}, PoolConfig("adaptive", audit=0, quotas=quotas, cooldown=10**6), 8, 0)
    drawn = dict.fromkeys(tags, 0)
    for step in range(1, 401):
        rows = pool.draw(step)
        counts = [records[i].tags[0] for i in pool.places[rows]]
        assert counts.count("mined/a") in (2, 3) and counts.count("mined/b") in (1, 2)
        for tag in counts:
            drawn[tag] += 1
        flat = np.array([tag != "traffic" for tag in counts])
        values = np.where(flat[:, None], 0.5, np.tile((0.0, 1.0), (8, 1)))[..., None]
        pool.update(step, rows, values, np.ones(values.shape, bool))
    assert {tag: n / 3200 for tag, n in drawn.items()} == pytest.approx(
        {"traffic": 0.5, "mined/a": 0.35, "mined/b": 0.15}, abs=0.01
    )
    assert np.count_nonzero(pool.returns) > 0  # others of the two classes do rest


# ---- failures of a run


def test_failure_classes_of_groups():
    """Half of the first group is truncated; in the second the rubric is low; the third has no score, the fourth is
    fine."""
    values = np.zeros((8, 2))
    values[2:4], values[6:] = (0.5, 0.1), (0.5, 0.4)
    valid = np.ones((8, 2), bool)
    valid[4:6] = False
    faults = [["truncated", "thinking"], []] + [[]] * 6
    scored = Scored(
        ["aesthetic", "rubric"], values, valid, faults, [[]] * 8, [None] * 8, [True] * 8, None, [0] * 8, 8, {}
    )
    assert failures(scored, 2, ["aesthetic", "rubric"]) == ["truncated", "low rubric", None, None]


def test_prompts_that_fail_in_a_run_can_be_mined(pooled, monkeypatch):
    """A row each, in a file that is a source of candidates; a resumed run does not repeat the rows."""
    monkeypatch.setattr("posttrain.expander.callbacks.LOW", 1.0)  # so that each prompt has failed
    pooled.pool = PoolConfig()
    pooled.steps = 2
    gdpo.train(pooled)
    run = runs.Path(pooled.output)
    rows = read_lines(run / "failures.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2] and {row["failure"] for row in rows} <= {
        "low brightness", "low redness",
    }  # fmt: skip
    assert {record.prompt for record in read_prompts(run / "failures.jsonl", repeats=True)} == set(chat.USERS)
    twice = run / "twice.jsonl"
    twice.write_text((run / "failures.jsonl").read_text() * 2)
    assert len(read_prompts(twice, repeats=True)) == 4
    with pytest.raises(UserError, match=r"twice\.jsonl:5: id '.*' was used at"):
        read_prompts(twice)
    shutil.rmtree(run / "checkpoints/checkpoint-2")
    gdpo.train(pooled, resume=True)
    assert read_lines(run / "failures.jsonl") == rows
