"""Flat groups make room for groups of other prompts: which, until when, and what the pool learns."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.config.types import ConfigError
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.grpo import train as grpo
from posttrain.model.k2 import K2
from posttrain.training import advantages
from posttrain.training.policy import POLICY, add_policy
from posttrain.training.prompt_source import PromptSource
from posttrain.training.stepper import Stepper
from prompts.pool import Pool, PoolConfig
from prompts.records import PromptRecord, read_prompts
from rewards.background import ScoreQueue
from rewards.base import RewardSpec
from rewards.load import load_rewards
from tests.distributed.test_sharding import FSDP2, compared
from tests.helpers import runs, tiny
from tests.helpers.settings import validate


def is_flat(prompt: str) -> bool:
    """Two thirds of the prompts teach nothing."""
    return int(prompt.rpartition(" ")[2]) % 3 > 0


def some(images, prompts):
    """Alike for most prompts, brightness for the others."""
    bright = runs.brightness(images, prompts)
    return [0.5 if is_flat(prompt) else value for prompt, value in zip(prompts, bright)]


def alike(images, prompts):
    return [0.5] * len(images)


def none(images, prompts):
    return [None] * len(images)


@pytest.fixture
def config(tmp_path, model):
    made = runs.config(tmp_path, model)
    rows = [json.dumps({"prompt": f"{tiny.PROMPTS[i % 4]}, {i}"}) for i in range(20)]
    Path(made.prompts.train).write_text("\n".join(rows[:18]))
    Path(made.prompts.heldout).write_text("\n".join(rows[18:]))
    made.rewards = [RewardSpec("some", "tests.grpo.test_refill:some")]
    made.groups.prompts_per_step, made.groups.refill, made.pool.kind = 3, 4, "adaptive"
    made.pool.prune_after, made.pool.cooldown = 3, 2
    return made


def steps_of(run) -> list[dict]:
    return [row for row in runs.rows(run) if "missing" in row]


@pytest.fixture
def reported(monkeypatch):
    """What the pool is told: step, prompts and (P, G) scores of each update."""
    told, update = [], Pool.update

    def noted(self, step, rows, values_PGK, *rest):
        told.append((step, [int(key) for key in self.keys[rows]], values_PGK[..., 0].copy()))
        return update(self, step, rows, values_PGK, *rest)

    monkeypatch.setattr(Pool, "update", noted)
    return told


@pytest.fixture
def trained(monkeypatch):
    """The groups that each update follows, and their advantages."""
    seen, optimise = [], grpo.optimise

    def noted(k2, config, groups, advantages_PG, *rest):
        seen.append((groups, advantages_PG))
        return optimise(k2, config, groups, advantages_PG, *rest)

    monkeypatch.setattr(grpo, "optimise", noted)
    return seen


def test_flat_groups_make_room(config, reported, trained):
    """A step draws until no group of its batch is flat or the limit is reached; what the pool is told is what was
    drawn, each prompt once; the images are counted."""
    config.steps = 6
    grpo.train(config)
    rows, images = steps_of(config.output), 0
    assert len(rows) == len(reported) == 6
    by_key = {}
    for prompt in read_prompts(config.prompts.train):
        pool = Pool([prompt], {"some": 1.0}, config.pool, 1, 0)
        by_key[int(pool.keys[0])] = prompt.prompt
    refilled = []
    for row, (step, keys, scores_PG) in zip(rows, reported):
        prompts = [by_key[key] for key in keys]
        flat = [is_flat(prompt) for prompt in prompts]
        refilled.append(row["refilled_groups"])
        images += 4 * len(keys)
        assert row["step"] == step and len(set(keys)) == len(keys) == 3 + row["refilled_groups"] <= 7
        assert row["images"] == images and row["flat_groups"] == pytest.approx(np.mean(flat))
        for is_alike, scores_G in zip(flat, scores_PG):
            assert (np.ptp(scores_G) == 0) == is_alike
        # No more were drawn than needed: before the last attempt something was missing.
        teaching = len(flat) - sum(flat)
        assert teaching == 3 or row["refilled_groups"] == 4
    assert min(refilled) < max(refilled) == 4
    for (groups, advantages_PG), (_, keys, _) in zip(trained, reported):
        prompts = [group.record.prompt for group in groups]
        left = {by_key[key] for key in keys if not is_flat(by_key[key])}
        assert set(prompts) == left and len(prompts) == min(3, len(left))
        for group in groups:
            assert advantages_PG.shape == (3, 4) and advantages_PG[group.index].any()
    summary = json.loads((Path(config.output) / "summary.json").read_text())
    assert summary["images"] == images
    runs.assert_metrics_are_defined(config.output, "some")


def test_equals_a_loop_written_out(config, model):
    """Bit for bit: places keep their size, further groups are seeded by place + attempt P, and the loss is a mean over
    the P groups of the batch."""
    config.steps, config.sampling.sizes = 3, [[32, 32], [16, 48]]
    grpo.train(config)

    k2, procs = K2.load(model), Processes()
    add_policy(k2, config.lora, config.seed, reference=True)
    stepper = Stepper(k2.train_role(POLICY), config.optim)
    source = PromptSource(config, read_prompts(config.prompts.train))
    pool = source.pool
    assert pool is not None
    refilled = []
    for step in range(1, 4):
        with ScoreQueue(load_rewards(config.rewards), config.groups.group_size) as queue:
            rows = list(pool.draw(step))
            indices, batch, waiting = [0, 1, 2], [], [0, 1, 2]
            values_PG = np.empty((0, 4))
            for attempt in itertools.count():
                if attempt:
                    more = pool.redraw(step, attempt, np.array(rows), min(len(waiting), 7 - len(rows)))
                    indices, rows = [place + 3 * attempt for place in waiting][: len(more)], [*rows, *more]
                records = {i: source.records[pool.places[row]] for i, row in zip(indices, rows[-len(indices) :])}
                groups = grpo.sample(k2, config, step, source, queue, procs, 4, records)
                found_PG = queue.gather().values_NK.reshape(len(groups), 4)
                order = np.argsort([group.index for group in groups])
                values_PG = np.concatenate([values_PG, found_PG[order]])
                for group, scores_G in zip(groups, found_PG):
                    assert group.size == ((32, 32), (16, 48))[(3 * (step - 1) + group.index % 3) % 2]
                    if np.ptp(scores_G):
                        batch.append((replace(group, index=group.index % 3), scores_G))
                waiting = sorted({0, 1, 2} - {group.index for group, _ in batch})
                if not waiting or len(rows) == 7:
                    break
        valid = np.ones((len(rows), 4, 1), bool)
        pool.update(step, np.array(rows), values_PG[..., None], valid)
        batch_PGK = torch.full((3, 4, 1), 0.5, dtype=torch.float64)  # flat where nothing better came
        for group, scores_G in batch:
            batch_PGK[group.index, :, 0] = torch.from_numpy(scores_G)
        advantages_PG = advantages.gdpo(batch_PGK, torch.ones(3, 4, 1, dtype=torch.bool), torch.ones(1)).float()
        grpo.optimise(k2, config, [group for group, _ in batch], advantages_PG, stepper, procs, 4)
        refilled.append(len(rows) - 3)
    assert [row["refilled_groups"] for row in steps_of(config.output)] == refilled and max(refilled) > 0
    runs.assert_equal(runs.latest(config.output).tensors["adapter"], k2.role_state_dict(POLICY))


def test_without_a_limit_of_more_nothing_changes(config, tmp_path):
    """Where no group is flat, a run that may refill is one that may not, but for the count."""
    config.rewards = [RewardSpec("brightness", "tests.helpers.runs:brightness")]
    outputs = []
    for more in (0, 4):
        config.groups.refill, config.output = more, str(tmp_path / f"run-{more}")
        grpo.train(config)
        outputs.append(config.output)
    plain, refilling = map(runs.untimed, outputs)
    assert [row.pop("refilled_groups") for row in refilling if "missing" in row] == [0, 0]
    assert plain == refilling
    for name, tensors in runs.latest(outputs[0]).tensors.items():
        runs.assert_equal(tensors, runs.latest(outputs[1]).tensors[name])


@pytest.mark.parametrize(("reward", "expected"), [("alike", [4, 4]), ("none", [0, 0])])
def test_it_ends_at_the_limit_and_without_judges(config, trained, reward, expected):
    """Where every group is flat; where nothing is scored a judge is out of order, and would not score more."""
    config.rewards = [RewardSpec(reward, f"tests.grpo.test_refill:{reward}")]
    config.rewards.append(RewardSpec("some", "tests.grpo.test_refill:some", heldout_only=True))
    if reward == "none":
        with pytest.raises(UserError, match="not one image of 2 steps could be scored"):
            grpo.train(config)
    else:
        grpo.train(config)
    rows = steps_of(config.output)
    assert [row["refilled_groups"] for row in rows] == expected and not trained
    assert [row["missing"] for row in rows] == [float(reward == "none")] * 2 and rows[-1]["flat_groups"] == 1


def test_it_ends_where_all_prompts_were_drawn(config, reported):
    config.rewards = [RewardSpec("alike", "tests.grpo.test_refill:alike")]
    config.groups.prompts_per_step, config.groups.refill, config.steps = 16, 9, 1
    grpo.train(config)
    assert steps_of(config.output)[0]["refilled_groups"] == 2 and len(set(reported[0][1])) == 18


@pytest.mark.parametrize("flat", ["skip", "kl"])
def test_what_stays_flat_is_trained_on_by_kl_alone_if_asked(config, trained, flat):
    config.groups.flat, config.groups.refill, config.loss.kl = flat, 1, 0.1
    grpo.train(config)
    for groups, advantages_PG in trained:
        assert sorted(group.index for group in groups) == [
            place for place in range(3) if flat == "kl" or advantages_PG[place].any()
        ]
    assert any(not advantages_PG.any(1).all() for _, advantages_PG in trained)


@pytest.mark.long
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path):
    """Killed in step 4, after it was refilled; the last checkpoint is that of step 2."""
    config.steps, config.checkpoint.every = 5, 2
    grpo.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")
    optimise = grpo.optimise

    def killed(*arguments):
        if len(steps_of(config.output)) == 3:
            raise RuntimeError("killed")
        return optimise(*arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(grpo, "optimise", killed)
        grpo.train(config)
    assert runs.latest(config.output).step == 2
    grpo.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.step == b.step == 5 and a.state["pool"] == b.state["pool"]
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert runs.untimed(whole) == runs.untimed(config.output)
    assert any(row["refilled_groups"] for row in steps_of(whole)[3:])


def test_without_memory_for_an_update_the_same_is_drawn_again(config, monkeypatch, tmp_path, reported):
    grpo.train(config)
    whole, config.output, optimise, sizes = config.output, str(tmp_path / "halved"), grpo.optimise, []

    def optimised(*arguments):
        sizes.append(arguments[-1])
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return optimise(*arguments)

    monkeypatch.setattr(grpo, "optimise", optimised)
    grpo.train(config)
    assert sizes == [4, 4, 2]
    first, again = reported[:2], reported[2:]
    assert [(step, keys) for step, keys, _ in first] == [(step, keys) for step, keys, _ in again]
    a, b = (runs.flat(runs.latest(run).tensors["adapter"]) for run in (whole, config.output))
    assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.long
def test_processes_equal_one(command, config, tmp_path):
    """Also where the second half of the run goes on in another number of them."""
    config.sampling.sizes, config.checkpoint.every, config.optim.eps = [[32, 32], [16, 48]], 2, 1e-8
    outputs = []
    for first, then in ((1, 1), (2, 2), (3, 1)):
        config.output = str(tmp_path / f"run-{first}-{then}")
        for steps, processes, resume in ((2, first, []), (4, then, ["--resume"])):
            config.steps = steps
            path = runs.recipe(config, tmp_path / "recipe.yaml")
            result = command("grpo", "--config", path, *resume, processes=processes)
            assert result.returncode == 0, result.stderr[-3000:]
        outputs.append(config.output)
    one, *others = outputs
    assert max(row["refilled_groups"] for row in steps_of(one)) == 4
    for other in others:
        for a, b in zip(runs.untimed(one), runs.untimed(other), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        for a, b in zip(steps_of(one), steps_of(other)):
            assert (a["refilled_groups"], a["images"]) == (b["refilled_groups"], b["images"])
        a, b = (runs.latest(run) for run in (one, other))
        assert all(np.array_equal(a.tensors["pool"][name], b.tensors["pool"][name]) for name in ("keys", "visits"))
        trained, again = (runs.flat(saved.tensors["adapter"]) for saved in (a, b))
        assert (trained - again).norm() < 1e-3 * trained.norm()


@pytest.mark.long
def test_sharded_processes_equal_one(command, config, tmp_path):
    """They go through the model together, also for further groups of which one of them has none."""
    config.lora, config.optim.lr, config.sampling.sizes = None, 1e-4, [[32, 32], [16, 48]]
    outputs = []
    for processes, engine in ((1, {}), (2, FSDP2)):
        config.output = str(tmp_path / f"run-{processes}")
        result = command("grpo", "--config", runs.recipe(config, tmp_path / "r.yaml"), processes=processes, **engine)
        assert result.returncode == 0, result.stderr[-3000:]
        outputs.append(config.output)
    one, sharded = (compared(run) for run in outputs)
    for a, b in zip(one, sharded, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert max(row["refilled_groups"] for row in steps_of(outputs[0])) > 0


def test_refused(config):
    for change, says in (
        ({"pool.kind": "uniform"}, "draws from the prompt pool; set pool.kind: adaptive, or groups.refill: 0"),
        ({"rollout.ahead": 1}, "needs a step's scores before its update begins; set rollout.ahead: 0"),
        ({"groups.refill": -1}, "is -1; use 0 or more"),
    ):
        ((field, value),) = change.items()
        section, name = field.split(".")
        before = getattr(getattr(config, section), name)
        setattr(getattr(config, section), name, value)
        with pytest.raises(ConfigError, match=says) as told:
            validate(config)
        assert told.value.field == "groups.refill"
        setattr(getattr(config, section), name, before)
    config.groups.prompts_per_step = 18
    says = r"groups\.refill: is 4, but each step draws all of prompts\.train \(18 prompts\); add prompts or set it to 0"
    with pytest.raises(UserError, match=says):
        grpo.train(config)
    assert not Path(config.output).exists()


def test_a_draw_of_more():
    """Other prompts, awake ones, the same again for the same attempt, by quota, and nothing is marked."""
    records = [PromptRecord(f"prompt {i}", tags=["text"] * (i % 2)) for i in range(40)]
    pool = Pool(records, {"r": 1.0}, PoolConfig("adaptive", quotas={"text": 0.25}), 8, 0)
    first = pool.draw(1)
    others = np.setdiff1d(np.arange(40), first)
    pool.returns[others[:10]] = 50
    state = {name: getattr(pool, name).copy() for name in ("visits", "drawn", "streak", "returns")}
    more = pool.redraw(1, 1, first, 8)
    assert len(set(more)) == 8 and not set(more) & {*first, *others[:10]}
    assert more.tolist() == pool.redraw(1, 1, first, 8).tolist() != pool.redraw(1, 2, first, 8).tolist()
    assert sum("text" in records[place].tags for place in pool.places[more]) == 2
    assert set(pool.redraw(1, 1, first, 99)) == {*others[10:]}
    for name, before in state.items():
        assert np.array_equal(getattr(pool, name), before)
    pool.drawn[more[0]] = 2  # a later step has drawn it already
    rows = np.concatenate([first, more])
    pool.update(1, rows, np.full((16, 2, 1), 0.5), np.ones((16, 2, 1), bool))
    assert pool.drawn[rows].tolist() == [1] * 8 + [2] + [1] * 7 and pool.visits[rows].tolist() == [1] * 16
