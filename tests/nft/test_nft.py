"""NFT on a tiny real K2: whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain import cli
from posttrain.config.load import load_config
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.model.k2 import K2
from posttrain.nft import train as nft
from posttrain.nft.update import decay
from posttrain.training import checkpoint
from rewards.base import RewardSpec
from tests.distributed.test_sharding import ENGINES
from tests.helpers import runs
from tests.helpers.settings import validate


@pytest.fixture
def config(tmp_path, model):
    return runs.nft_config(tmp_path, model)


def test_run_directory(config, monkeypatch):
    """What is logged, the second number of steps of each evaluation, and that the base stays as it is."""
    seen = runs.watch_loading(nft, monkeypatch)
    config.eval.guidance, config.eval.every = [0.0, 1.5], 1
    config.eval.groups, config.eval.group_size = 1, 3
    config.rewards.append(RewardSpec("held", "tests.helpers.runs:constant", heldout_only=True))
    nft.train(config)
    run = Path(config.output)
    runs.assert_metrics_are_defined(run, "brightness", "held")
    first, second = runs.training_rows(run)
    for row in (first, second):
        assert row["grad_norm"] > 0 and row["kl"] >= 0 and 0 < row["reward"] < 1 and row["latent_norm"] > 0.1
        assert (row["missing"], row["flat_groups"], row["skipped_updates"], row["clipped_advantages"]) == (0, 0, 0, 0)
        assert any(name.startswith("velocity_error_t") for name in row)
    assert first["old_error"] == 0 and "old_error" not in second  # checked once, where both are the same
    assert "old_distance" not in first and second["old_distance"] > 0  # then the old policy lags
    assert second["toward_better"] != 0 and second["toward_worse"] != 0
    evaluations = [row for row in runs.rows(run) if "eval/brightness" in row]
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    summary = json.loads((run / "summary.json").read_text())
    look = [f"image/{name}" for name in ("brightness", "saturation", "high_frequency", "latent_norm", "diversity")]
    names = {name + at for name in ("brightness", "held", *look) for at in ("", "@1.5", "@4steps")}
    assert summary["before"].keys() == summary["after"].keys() == names == set(config.metric_names())
    assert summary["before"]["brightness@4steps"] != summary["before"]["brightness"]
    assert (summary["steps"], summary["images"]) == (2, 16)
    page = (run / "report.html").read_text()
    assert "brightness@4steps" in page and "velocity_error" in page and "old_distance" in page
    ((k2, base),) = seen
    runs.assert_equal(dict(k2.base_state_dict()), base)
    saved = runs.latest(run)
    assert saved.state["method"] == "nft" and saved.tensors.keys() == {"adapter", "optimizer", "old"}
    runs.assert_equal(saved.tensors["adapter"], k2.role_state_dict("policy"))
    runs.assert_equal(saved.tensors["old"], k2.role_state_dict("old"))
    assert not torch.equal(runs.flat(saved.tensors["old"]), runs.flat(saved.tensors["adapter"]))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", ["nft", "awm"])
def test_reward_rises(config, sign, form):
    """Brighter images, or darker ones where that is what is rewarded; in both numbers of steps."""
    config.rewards = [RewardSpec("light", "tests.helpers.runs:brightness", scale=sign)]
    config.steps, config.optim.lr, config.loss.kl, config.groups.group_size = 6, 1e-2, 0, 6
    config.old.max, config.loss.form = 0.0, form
    nft.train(config)
    summary = json.loads((Path(config.output) / "summary.json").read_text())
    for name in ("light", "light@4steps"):
        assert summary["after"][name] > summary["before"][name] + 0.004


@pytest.mark.parametrize(
    ("ema", "lora", "kind", "most"),
    [(0.0, True, "uniform", 0.5), (0.7, True, "adaptive", 0.0), (0.7, False, "uniform", 0.5)],
)
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path, ema, lora, kind, most):
    """Killed in step 4, after step 3 was logged and the last checkpoint was step 2's; compared bit for bit."""
    config.optim.ema, config.pool.kind, config.old.max = ema, kind, most
    config.eval.groups, config.eval.group_size, config.eval.best = 1, 2, "image/brightness"
    if not lora:
        config.lora, config.optim.lr = None, 3e-4
    config.steps, config.checkpoint.every, config.eval.every = 4, 2, 2
    config.optim.warmup_steps, config.groups.prompts_per_step = 6, 1
    nft.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")

    def killed(*arguments):
        if len(runs.training_rows(config.output)) == 3:
            raise RuntimeError("killed")
        return optimise(*arguments)

    optimise = nft.optimise
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(nft, "optimise", killed)
        nft.train(config)
    assert runs.latest(config.output).step == 2
    torch.manual_seed(99)
    np.random.seed(99)
    nft.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.tensors.keys() == b.tensors.keys() and ("old" in a.tensors) == (most > 0)
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert a.state["counters"] == b.state["counters"] and a.state.get("pool") == b.state.get("pool")
    assert a.state["history"]["training_reward"] == b.state["history"]["training_reward"]
    # A run that goes on where the old policy does not lag compares the two once more.
    rows = [runs.untimed(run) for run in (whole, config.output)]
    for row in rows[0] + rows[1]:
        row.pop("old_error", None)
    assert rows[0] == rows[1]


@pytest.mark.long
def test_two_processes_equal_one(command, config, tmp_path):
    """Three groups, which two do not divide; the second half of a run resumes in the other number of processes."""
    config.groups.prompts_per_step, config.pool.kind = 3, "adaptive"
    config.sampling.sizes, config.checkpoint.every = [[32, 32], [16, 48]], 2
    outputs = []
    for first, then in ((1, 1), (2, 2), (2, 1)):
        config.output = str(tmp_path / f"run-{first}-{then}")
        for steps, processes, resume in ((2, first, []), (4, then, ["--resume"])):
            config.steps = steps
            path = runs.recipe(config, tmp_path / "recipe.yaml")
            result = command("nft", "--config", path, *resume, processes=processes)
            assert result.returncode == 0, result.stderr[-3000:]
        outputs.append(Path(config.output))
    one, *others = outputs
    for other in others:
        for a, b in zip(runs.untimed(one), runs.untimed(other), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        for name in ("adapter", "old"):
            a, b = (runs.flat(runs.latest(run).tensors[name]) for run in (one, other))
            assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_sharded_processes_equal_one(command, config, tmp_path, engine):
    """All weights, and the old policy as a copy of them, divided between two processes."""
    config.lora, config.optim.lr, config.eval.prompts = None, 1e-4, 1
    config.groups.prompts_per_step, config.groups.group_size, config.steps = 3, 2, 3
    begun, found = K2.load(config.model.path).base_state_dict(), []
    for processes, variables in ((1, {}), (2, ENGINES[engine])):
        config.output = str(tmp_path / f"run-{processes}")
        path = runs.recipe(config, tmp_path / "recipe.yaml")
        result = command("nft", "--config", path, processes=processes, **variables)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(runs.latest(config.output))
    a, b = found
    assert a.tensors.keys() == b.tensors.keys() >= {"weights", "old"}
    for name in ("weights", "old"):
        one, two = a.tensors[name], b.tensors[name]
        first, second = (torch.cat([(state[key] - begun[key]).flatten() for key in one]) for state in (one, two))
        assert first.norm() > 0 and (first - second).norm() < 1e-2 * first.norm(), name


def test_all_weights_are_trained(config, monkeypatch):
    """Where `lora` is null: all but the text fusion's; the old policy is a copy of them that follows."""
    seen = runs.watch_loading(nft, monkeypatch)
    config.lora, config.optim.lr, config.loss.kl = None, 3e-4, 0.1
    nft.train(config)
    first, second = runs.training_rows(config.output)
    assert first["kl"] < 1e-12 < second["kl"] and second["old_distance"] > 0
    ((k2, base),) = seen
    saved = runs.latest(config.output)
    assert saved.tensors.keys() == {"weights", "optimizer", "old"}
    runs.assert_equal(saved.tensors["weights"], k2.role_state_dict("policy"))
    for key, value in k2.base_state_dict().items():
        assert torch.equal(value, base[key]) == key.startswith(("text_fusion.", "txt_in.")), key
    for key, value in saved.tensors["old"].items():  # after updates 1 and 2 it keeps .2 and .4 of itself
        assert not torch.equal(value, saved.tensors["weights"][key]), key


def test_the_old_policy_follows_by_the_schedule(config, monkeypatch):
    """Each time it is the average of itself and the policy; with ramp 0 the policy itself, to the bit."""
    states: list[tuple] = []

    def noted(k2, config, updates):
        before = {name: value.clone() for name, value in k2.role_state_dict("old").items()}
        follow(k2, config, updates)
        after = [{name: v.clone() for name, v in k2.role_state_dict(role).items()} for role in ("policy", "old")]
        states.append((updates, before, *after))

    follow = nft.follow
    monkeypatch.setattr(nft, "follow", noted)
    config.steps, config.old.flat = 3, 1
    nft.train(config)
    for updates, before, policy, old in states:
        kept = decay(config.old, updates)
        assert kept == pytest.approx(0.2 * (updates - 1))
        for name, value in old.items():
            torch.testing.assert_close(value, kept * before[name] + (1 - kept) * policy[name])
    runs.assert_equal(states[0][2], states[0][3])
    assert [row.get("old_distance", 0) > 0 for row in runs.training_rows(config.output)] == [False, False, True]


def test_the_old_policy_draws_the_images(config, monkeypatch):
    """Where it lags; before that both are the same, and the policy does."""
    roles, sampled = [], K2.sample

    def sample(self, *arguments, **options):
        roles.append(self.active)
        return sampled(self, *arguments, **options)

    monkeypatch.setattr(K2, "sample", sample)
    config.eval.prompts = 1
    nft.train(config)
    # Two evaluations in two settings each, around two steps of two groups.
    assert roles == ["policy"] * 2 + ["policy"] * 2 + ["old"] * 2 + ["policy"] * 2


def test_an_old_policy_that_is_not_the_policy_ends_the_run(config, monkeypatch):
    velocity = K2.velocity
    monkeypatch.setattr(K2, "velocity", lambda *args: velocity(*args) * (1 + 0.1 * torch.is_grad_enabled()))
    with pytest.raises(UserError, match=r"old: its velocity is 0\.091 of the policy's off although it is the policy"):
        nft.train(config)
    assert not (Path(config.output) / "checkpoints").exists()


@pytest.mark.parametrize("most", [0.0, 0.5])
def test_flat_rewards_move_nothing_while_the_old_policy_is_the_policy(tmp_path, model, most):
    config = runs.nft_config(tmp_path, model, "constant")
    config.old.max = most
    nft.train(config)
    rows = [row for row in runs.rows(config.output) if "missing" in row]
    assert all(row["flat_groups"] == 1 for row in rows) and runs.training_rows(config.output) == []
    fresh = K2.load(model)
    fresh.add_role("policy", 4, 8.0, seed=config.seed)
    runs.assert_equal(runs.latest(config.output).tensors["adapter"], fresh.role_state_dict("policy"))


def test_damage_is_warned_of(config, capsys):
    """The reward of training rises, what is held out falls by more than a twentieth; once without a rise nothing."""
    config.rewards = [
        RewardSpec("rising", {"class_path": "tests.helpers.warm.Script", "init_args": {"values": [0.5, 0.6, 0.7] * 9}}),
        RewardSpec("free", "tests.helpers.runs:constant", heldout_only=True),
    ]
    history = {"before": {"free": 0.5, "free@4steps": 0.5}}
    for reward in (0.5, None, 0.6):
        nft.count_reward(history, reward)
    assert history["training_reward"] == {"steps": 2, "first": pytest.approx(0.55), "now": pytest.approx(0.55)}
    assert nft.damage(config, history, {"free": 0.1, "free@4steps": 0.5}) is None
    for _ in range(7):
        nft.count_reward(history, 0.9)
    said = nft.damage(config, history, {"free": 0.47, "free@4steps": 0.476})
    assert said is not None and "free from 0.5 to 0.47;" in said and "4steps" not in said
    assert nft.damage(config, history, {"free": 0.48, "free@4steps": None}) is None


def test_a_run_warns_of_damage(config, capsys):
    """Held out scores are scripted for two settings at each of three evaluations."""
    config.rewards = [
        RewardSpec("light", "tests.helpers.runs:brightness"),
        runs.script("free", [0.8, 0.8, 0.8, 0.8, 0.8, 0.3]),
    ]
    config.steps, config.optim.lr, config.eval.every, config.loss.kl, config.old.max = 14, 1e-2, 7, 0, 0.0
    nft.train(config)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "what is held out fell" in line]
    assert "step 14: the reward of training rose from" in line and "free@4steps from 0.8 to 0.3" in line


def test_nothing_held_out_is_warned_of(config, capsys):
    nft.train(config)
    assert "rewards: none has heldout_only: true" in capsys.readouterr().err


def test_starts_from_an_earlier_run_and_is_exported(config, tmp_path, model):
    """A grpo run is the reference; the export draws what the policy draws (checked as it is written)."""
    (tmp_path / "first").mkdir()
    config.model.start, config.output = str(runs.trained(tmp_path / "first", model)), str(tmp_path / "second")
    nft.train(config)
    saved = checkpoint.load(checkpoint.find(config.output))
    assert [Path(entry["path"]).parent.parent.name for entry in saved.state["origin"]["merged"]] == ["run"]
    assert load_checkpoint(saved).has_stack
    words = ["export", "--source", config.output, "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0 and "NFT" in (tmp_path / "out/README.md").read_text()


def test_continues_from_an_adapter(config, tmp_path, model):
    """The old policy begins with it too, and the reference is the base below it."""
    (tmp_path / "first").mkdir()
    config.model.start, config.model.start_as = str(runs.trained(tmp_path / "first", model)), "continue"
    nft.train(config)
    first, second = runs.training_rows(config.output)
    assert first["old_error"] == 0 and first["kl"] > 1e-9 and second["old_distance"] > 0


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.allow_distilled", True, "give a Raw checkpoint"),
        ("loss.times", 5, "is 5, but 4 steps have 4 noise levels to draw from"),
        ("loss.beta", 0.0, "use a number above 0"),
        ("loss.max_advantage", -1.0, "use a number above 0"),
        ("old.max", 1.0, "below 1"),
        ("old.ramp", -0.1, "use 0 or more"),
        ("optim.passes", 2, "is 2; after an update"),
        ("eval.steps", 4, "as sampling.steps"),
        ("eval.best", "brightness@4steps", "'brightness@4steps' is trained on"),
        ("rewards", [], "at least one reward"),
    ],
)
def test_mistakes(config, path, value, says):
    target, (*sections, name) = config, path.split(".")
    for section in sections:
        target = getattr(target, section)
    setattr(target, name, value)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert error.value.field == path and says in str(error.value)


def test_awm_without_a_minimum_is_refused(config):
    config.loss.form, config.loss.anchor = "awm", 4.0
    with pytest.raises(ConfigError, match=r"loss\.anchor: is 4, below loss\.max_advantage \(5\)"):
        validate(config)
    config.loss.form, config.loss.levels = "nft", "noisier"
    validate(config)  # two of four
    config.loss.times = 3
    with pytest.raises(ConfigError, match="4 steps have 2 noise levels"):
        validate(config)


def test_turbo_is_refused(config, tmp_path, capsys):
    from tests.helpers import tiny

    config.model.path = str(tiny.save(tmp_path / "turbo", distilled=True))
    path = runs.recipe(config, tmp_path / "recipe.yaml")
    assert cli.main(["nft", "--config", str(path)]) == 2
    assert "is_distilled is true" in capsys.readouterr().err and not Path(config.output).exists()


@pytest.mark.parametrize("name", ["nano/nft", "k2/nft", "k2/nft_published"])
def test_recipes_are_valid(name):
    config, _ = load_config("nft", ["--config", str(runs.ROOT / f"recipes/{name}.yaml")])
    heldout = [reward.name for reward in config.rewards if reward.heldout_only]
    assert heldout and config.eval.steps != config.sampling.steps
