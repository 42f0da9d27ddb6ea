"""Images that are drawn a step ahead, against loops written out, over kills, lack of memory and processes."""

import json
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.config.sections import OptimConfig
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.grpo import train as grpo
from posttrain.model.k2 import K2
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, add_policy
from posttrain.training.prompt_source import PromptSource
from posttrain.training.stepper import Clock, Stepper
from prompts.records import read_prompts
from rewards.background import ScoreQueue
from rewards.base import RewardSpec
from rewards.load import load_rewards
from tests.helpers import runs


def rank(images, prompts):
    """The process that has drawn them."""
    return [float(os.environ["RANK"])] * len(images)


@pytest.fixture
def config(tmp_path, model):
    made = runs.config(tmp_path, model)
    made.steps, made.rollout.ahead = 4, 1
    return made


@pytest.mark.parametrize("ahead", [0, 1])
def test_equals_a_loop_written_out(config, ahead, model):
    """Bit for bit: of 0 each step is drawn, scored and trained on; of 1 the next one is drawn before the update."""
    config.rollout.ahead = ahead
    grpo.train(config)

    k2, procs = K2.load(model), Processes()
    add_policy(k2, config.lora, config.seed, reference=True)
    stepper = Stepper(k2.train_role(POLICY), config.optim)
    source = PromptSource(config, read_prompts(config.prompts.train))
    drawn, errors = {}, []
    with ScoreQueue(load_rewards(config.rewards), config.groups.group_size) as queue:

        def draw(step):
            groups = grpo.sample(k2, config, step, source, queue, procs, 4)
            drawn[step] = groups, grpo.score(config, queue.gather())[0]

        if ahead:
            draw(1)
        for step in range(1, config.steps + 1):
            if step + ahead <= config.steps:
                draw(step + ahead)
            groups, advantages_PG = drawn[step]
            metrics = grpo.optimise(k2, config, groups, advantages_PG, stepper, procs, 4)
            errors.append(metrics["ratio_error"])
    runs.assert_equal(k2.role_state_dict(POLICY), runs.latest(config.output).tensors["adapter"])
    rows = runs.training_rows(config.output)
    assert [row["ratio_error"] for row in rows] == errors
    assert [row["policy_age"] for row in rows] == ([0, 1, 1, 1] if ahead else [0] * 4)
    assert errors[0] <= 1e-5 and all((error > 1e-5) == bool(ahead) for error in errors[1:])
    assert ("previous" in runs.latest(config.output).tensors) == bool(ahead)


def test_ratios_are_to_the_policy_that_drew(config):
    """Where the policy stays as it is they are 1, though the images are a step old; else they leave 1 with it."""
    spreads = []
    for name, rate in (("still", 1e-12), ("slow", 1e-4), ("fast", 1e-3)):
        config.output, config.optim.lr, config.optim.warmup_steps = config.output + name, rate, 0
        grpo.train(config)
        rows = runs.training_rows(config.output)
        assert [row["policy_age"] for row in rows] == [0, 1, 1, 1]
        spreads.append(np.mean([row["log_ratio_std"] for row in rows[1:]]))
    assert spreads[0] < 1e-6 < 5 * spreads[1] < spreads[2]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_is_judged_while_the_one_before_trains(config, monkeypatch, model, ahead):
    """A judge answers for a step only when the update before it has begun: ahead, it was asked before that."""
    config.rollout.ahead, config.groups.prompts_per_step = ahead, 1
    begun, submitted, asked, judged = threading.Condition(), [], [], []

    def waiting(images, prompts):
        judged.append(1)
        with begun:
            assert begun.wait_for(lambda: len(asked) >= len(judged) - 1, timeout=20)
        return runs.brightness(images, prompts)

    def submitting(self, *arguments, submit=ScoreQueue.submit):
        submitted.append(1)
        submit(self, *arguments)

    def optimised(*arguments, optimise=grpo.optimise):
        with begun:
            asked.append(len(submitted))
            begun.notify_all()
        return optimise(*arguments)

    monkeypatch.setattr(ScoreQueue, "submit", submitting)
    monkeypatch.setattr(grpo, "optimise", optimised)
    k2, procs = K2.load(model), Processes()
    add_policy(k2, config.lora, config.seed, reference=True)
    stepper = Stepper(k2.train_role(POLICY), config.optim, previous=bool(ahead))
    source = PromptSource(config, read_prompts(config.prompts.train))
    micro_batch = MicroBatch(4, "groups.micro_batch", procs)
    with ScoreQueue(load_rewards([RewardSpec("brightness", waiting)]), config.groups.group_size) as queue:
        steps = grpo.updates(k2, config, source, queue, stepper, range(1, 5), procs, {}, micro_batch, Clock())
        waits = [metrics["score_wait"] or 0.0 for _, metrics, _ in steps]
    assert asked == ([2, 3, 4, 4] if ahead else [1, 2, 3, 4])
    assert all(0 <= wait < 20 for wait in waits)


@pytest.mark.parametrize(
    ("ema", "lora", "kind", "passes"),
    [(0.0, True, "uniform", 1), (0.7, True, "adaptive", 2), (0.7, False, "uniform", 1)],
)
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path, ema, lora, kind, passes):
    """Killed in step 4, when step 5 was drawn and step 3 logged; the last checkpoint is that of step 2."""
    config.optim.ema, config.pool.kind, config.pool.staleness, config.optim.passes = ema, kind, 1, passes
    config.steps, config.checkpoint.every, config.groups.prompts_per_step = 5, 2, 1
    if not lora:
        config.lora, config.optim.lr = None, 3e-4
    grpo.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")
    optimise = grpo.optimise

    def killed(*arguments):
        if len(runs.training_rows(config.output)) == 3:
            raise RuntimeError("killed")
        return optimise(*arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(grpo, "optimise", killed)
        grpo.train(config)
    assert runs.latest(config.output).step == 2
    torch.manual_seed(99)
    np.random.seed(99)
    grpo.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.step == b.step == 5 and a.tensors.keys() == b.tensors.keys() > {"previous", "optimizer"}
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert a.state["counters"] == b.state["counters"] and a.state.get("pool") == b.state.get("pool")
    assert runs.untimed(whole) == runs.untimed(config.output)
    assert [row["policy_age"] for row in runs.training_rows(whole)] == [0, *[passes] * 4]


def test_a_run_that_begins_to_draw_ahead_or_ends_it_goes_on(config):
    """The checkpoint of a run that did not draw ahead holds no earlier policy; the other way round it has no use."""
    config.steps, config.rollout.ahead = 2, 0
    grpo.train(config)
    config.steps, config.rollout.ahead = 4, 1
    grpo.train(config, resume=True)
    config.steps, config.rollout.ahead = 6, 0
    grpo.train(config, resume=True)
    rows = runs.training_rows(config.output)
    assert [row["policy_age"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert [row["ratio_error"] > 1e-5 for row in rows] == [False, False, False, True, False, False]
    assert "previous" not in runs.latest(config.output).tensors


def test_a_longer_run_goes_on_as_if_it_had_been_longer(config, tmp_path):
    grpo.train(config)
    whole, config.output = config.output, str(tmp_path / "longer")
    config.steps = 2
    grpo.train(config)
    config.steps = 4
    grpo.train(config, resume=True)
    for name, tensors in runs.latest(whole).tensors.items():
        runs.assert_equal(tensors, runs.latest(config.output).tensors[name])


def test_without_memory_for_an_update_what_was_drawn_is_kept(config, monkeypatch, capsys, tmp_path):
    """The step that ran out of it draws nothing again, since the policy that drew its images is gone."""
    grpo.train(config)
    whole, config.output = config.output, str(tmp_path / "halved")
    sample, optimise, steps, sizes = grpo.sample, grpo.optimise, [], []

    def sampled(k2, config, step, *arguments):
        steps.append(step)
        return sample(k2, config, step, *arguments)

    def optimised(*arguments):
        sizes.append(arguments[-1])
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return optimise(*arguments)

    monkeypatch.setattr(grpo, "sample", sampled)
    monkeypatch.setattr(grpo, "optimise", optimised)
    grpo.train(config)
    assert steps == [1, 2, 3, 4] and sizes == [4, 4, 4, 2, 2]
    assert capsys.readouterr().err.count("is retried with 2") == 1
    a, b = (runs.flat(runs.latest(run).tensors["adapter"]) for run in (whole, config.output))
    assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.long
def test_two_processes_equal_one(command, config, tmp_path):
    """Three groups, which two do not divide; the second half of the run resumes in the other number of processes."""
    config.groups.prompts_per_step, config.pool.kind = 3, "adaptive"
    config.sampling.sizes, config.checkpoint.every = [[32, 32], [16, 48]], 2
    outputs = []
    for first, then in ((1, 1), (2, 2), (2, 1)):
        config.output = str(tmp_path / f"run-{first}-{then}")
        for steps, processes, resume in ((2, first, []), (4, then, ["--resume"])):
            config.steps = steps
            path = runs.recipe(config, tmp_path / "recipe.yaml")
            result = command("grpo", "--config", path, *resume, processes=processes)
            assert result.returncode == 0, result.stderr[-3000:]
        outputs.append(Path(config.output))
    one, *others = outputs
    for other in others:
        for a, b in zip(runs.untimed(one), runs.untimed(other), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        a, b = (runs.flat(runs.latest(run).tensors["adapter"]) for run in (one, other))
        assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.parametrize(("gpus", "processes"), [(1, 2), (2, 3), (1, 3)])
def test_processes_that_only_draw_equal_one_that_does_both(command, config, tmp_path, gpus, processes):
    """What is drawn and by which policy is the same; where one process trains, so is the order of its sums, and the
    weights are equal bit for bit. The second half of the run goes on with one process alone."""
    config.groups.prompts_per_step, config.pool.kind, config.optim.passes = 3, "adaptive", 2
    config.sampling.sizes, config.checkpoint.every = [[32, 32], [16, 48]], 2
    outputs = []
    for name, first in (("one", (0, 1)), ("apart", (gpus, processes))):
        config.output = str(tmp_path / name)
        for steps, (drawing, count), resume in ((2, first, []), (4, (0, 1), ["--resume"])):
            config.steps, config.rollout.gpus = steps, drawing
            path = runs.recipe(config, tmp_path / "recipe.yaml")
            result = command("grpo", "--config", path, *resume, processes=count)
            assert result.returncode == 0, result.stderr[-3000:]
        outputs.append(Path(config.output))
    one, apart = outputs
    for a, b in zip(runs.untimed(one), runs.untimed(apart), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    expected, got = (runs.flat(runs.latest(run).tensors["adapter"]) for run in outputs)
    assert (expected - got).norm() < 1e-3 * expected.norm()
    if processes == gpus + 1:
        assert torch.equal(expected, got)


def test_who_draws_draws_all_and_trains_nothing(command, config, tmp_path):
    config.rewards = [RewardSpec("by", "tests.grpo.test_ahead:rank")]
    config.rollout.gpus, config.steps = 1, 2
    result = command("grpo", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["reward/by"] for row in runs.rows(config.output) if "missing" in row] == [1, 1]


def test_too_many_that_only_draw(command, config, tmp_path):
    config.rollout.gpus = 2
    result = command("grpo", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), processes=2)
    assert result.returncode == 2 and "rollout.gpus: is 2 of 2 processes, which leaves none to train" in result.stderr
    assert "Traceback" not in result.stderr and not Path(config.output).exists()


def test_importance_weights(config):
    """They replace the clips; with a small cap some ratios are above it."""
    config.loss.max_weight = 1.0
    grpo.train(config)
    first, *others = runs.training_rows(config.output)
    assert first["truncated"] < 1 and all(0 < row["truncated"] < 1 for row in others)
    assert all("clip_high" not in row and row["grad_norm"] > 0 for row in (first, *others))
    runs.assert_metrics_are_defined(Path(config.output), "brightness")


def test_a_failing_judge_ends_the_run_at_the_step_it_failed_in(config, monkeypatch):
    """Not earlier, though it was asked a step before, and with the checkpoint of the steps that were good."""
    config.checkpoint.every = 1
    gather, steps = ScoreQueue.gather, []

    def failing(self, jobs=None):
        steps.append(1)
        if len(steps) == 3:
            job: Future = Future()
            job.set_exception(UserError("reward brightness: the judge is gone"))
            self._spans[job] = [0.0, 0.0]
            jobs = [job]
        return gather(self, jobs)

    monkeypatch.setattr(ScoreQueue, "gather", failing)
    with pytest.raises(UserError, match="the judge is gone"):
        grpo.train(config)
    assert runs.latest(config.output).step == 2


def test_prompts_drawn_ahead_are_kept_by_their_ids(config):
    """Also where the file was reordered; if one of them is gone the step is drawn again."""
    config.pool.kind = "adaptive"
    rows = [json.dumps({"prompt": f"prompt {i}"}) for i in range(8)]
    path = Path(config.prompts.train)
    path.write_text("\n".join(rows))
    source = PromptSource(config, read_prompts(path))
    source.draw(1)
    expected = [record.prompt for record in source.draw(2)]
    assert source.draw(2) == source.draw(2)
    tensors, state = source.state()
    assert state["drawn"].keys() == {"1", "2"}

    saved = Checkpoint(path, 1, tensors, json.loads(json.dumps(state)))
    path.write_text("\n".join(rows[::-1]))
    again = PromptSource(config, read_prompts(path))
    again.restore(saved)
    assert [record.prompt for record in again.draw(2)] == expected
    path.write_text("\n".join(row for row in rows if expected[0] not in row))
    fewer = PromptSource(config, read_prompts(path))
    fewer.restore(saved)
    assert expected[0] not in [record.prompt for record in fewer.draw(2)]


def test_remembered_parameters():
    parameter = torch.nn.Parameter(torch.ones(2))
    stepper = Stepper([parameter], OptimConfig(lr=0.5, weight_decay=0.0), previous=True)
    parameter.grad = torch.ones(2)
    stepper.step()
    moved = parameter.detach().clone()
    assert not moved.equal(torch.ones(2)) and (stepper.updates, stepper.previous_updates) == (1, 0)
    with stepper.previous():
        assert parameter.equal(torch.ones(2))
    assert parameter.equal(moved)
    stepper.remember()
    with stepper.previous():
        assert parameter.equal(moved)
    assert stepper.previous_updates == 1 and len(stepper.kept()) > 1
    plain = Stepper([parameter], OptimConfig())
    plain.remember()
    with plain.previous():
        assert parameter.equal(moved)
    assert not plain.remembers and "previous_updates" not in plain.counters()
