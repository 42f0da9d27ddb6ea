"""GRPO on a tiny real K2: whole runs, and single steps against autograd."""

import copy
import functools
import itertools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import checkpoint, cli, grpo, sampler
from posttrain import figures as figures_of
from posttrain.config import CheckpointConfig, OptimConfig, RewardSpec
from posttrain.export import load_checkpoint
from posttrain.k2 import K2
from posttrain.loop import Loop, Stepper
from posttrain.processes import Processes
from posttrain.sampler import sde_moments
from posttrain.source import PromptSource, in_turn
from prompts.errors import UserError
from prompts.records import read_prompts
from rewards.background import ScoreQueue
from rewards.base import Scores
from rewards.load import load_rewards
from tests import runs, tiny

LOOK = ("brightness", "saturation", "high_frequency", "latent_norm", "diversity")


@pytest.fixture
def config(tmp_path, model):
    return runs.config(tmp_path, model)


@pytest.fixture
def trained(monkeypatch):
    """The K2 that `train` loads, with a copy of its weights as they were."""
    return runs.watch_loading(grpo, monkeypatch)


# whole runs


def test_run_directory(config, trained):
    config.track.tensorboard = True
    config.eval.guidance, config.eval.every = [0.0, 1.5], 1
    config.eval.groups, config.eval.group_size = 1, 3
    grpo.train(config)
    run = Path(config.output)
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "grids", "samples", "checkpoints",
        "report.html", "summary.json",
    }  # fmt: skip
    assert any((run / "tensorboard").iterdir())
    assert sorted(path.name for path in (run / "grids").iterdir()) == [f"step-00000{i}.png" for i in range(3)]
    for step in range(3):
        pictures = sorted((run / "samples" / f"step-00000{step}").glob("*.png"))
        assert [Image.open(path).size for path in pictures] == [(32, 32)] * 2
    assert len(json.loads((run / "samples/prompts.json").read_text())) == 2

    metrics = runs.training_rows(run)
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert row["ratio_error"] <= 1e-5 and row["grad_norm"] > 0 and row["kl"] >= 0 and 0 < row["reward"] < 1
        assert (row["missing"], row["failed"], row["flat_groups"], row["skipped_updates"]) == (0, 0, 0, 0)
        assert row["advantage"] > 0.1 and row["reward"] == row["reward/brightness"]
        assert all(row[f"seconds/{part}"] > 0 for part in ("sample", "optimise"))
    evaluations = [row for row in runs.rows(run) if "eval/brightness" in row]
    assert [row["step"] for row in evaluations] == [0, 1, 2]

    summary = json.loads((run / "summary.json").read_text())
    names = ["brightness", *(f"image/{n}" for n in LOOK)]
    figures = {name + at for name in names for at in ("", "@1.5")}
    assert summary["before"].keys() == summary["after"].keys() == figures
    assert summary["before"] == {name: evaluations[0][f"eval/{name}"] for name in figures}
    assert summary["after"] == {name: evaluations[2][f"eval/{name}"] for name in figures}
    assert summary["before"] != summary["after"] and "best" not in summary and "stopped" not in summary
    # The oldest evaluation again, from its pictures.
    shown = np.stack([np.asarray(Image.open(run / "samples/step-000000" / f"{i:03d}.png")) for i in range(2)])
    for name in ("brightness", "saturation", "high_frequency"):
        assert summary["before"][f"image/{name}"] == pytest.approx(getattr(figures_of, name)(shown))
    assert 0.3 < summary["before"]["image/latent_norm"] < 3 and 0 < summary["before"]["image/diversity"] < 1
    assert (summary["steps"], summary["images"]) == (2, 2 * 2 * 4)
    said = json.loads((run / "samples/step-000000/scores.json").read_text())
    assert np.mean([one["brightness"]["score"] for one in said]) == pytest.approx(summary["before"]["brightness"])
    assert 0 < summary["memory"]["trained weights"] < summary["memory"]["frozen weights"] < summary["peak_ram_gib"]
    assert summary["seconds"] > 0 and summary["peak_ram_gib"] > 0
    page = (run / "report.html").read_text()
    assert "brightness" in page and "image/diversity@1.5" in page and "data:image/png" in page

    saved = runs.latest(run)
    assert saved.step == 2 and saved.state["lora"]["rank"] == 4 and saved.state["method"] == "grpo"
    ((k2, base),) = trained
    runs.assert_equal(dict(k2.base_state_dict()), base)
    runs.assert_equal(saved.tensors["adapter"], k2.role_state_dict("policy"))
    moved = [bool(v.any()) for key, v in saved.tensors["adapter"].items() if key.endswith("lora_B.weight")]
    assert len(moved) == 24 and all(moved)


def test_samples_are_of_heldout_prompts_by_the_base_and_by_the_policy(config):
    """Drawn again from the checkpoint by the seeds that prompts.json tells, without guidance."""
    config.optim.lr = 0.02
    grpo.train(config)
    k2, folder = load_checkpoint(runs.latest(config.output)), Path(config.output) / "samples"
    table = json.loads((folder / "prompts.json").read_text())
    assert [row["prompt"] for row in table] == tiny.PROMPTS[2:]
    noise = sampler.noise([row["seed"] for row in table], (16, 64))
    drawn = {}
    for step, role in ((0, None), (2, "policy")):
        with k2.role(role):
            latents = k2.sample(k2.text(tiny.PROMPTS[2:]), noise, config.eval.steps, 32, 32)
        drawn[step] = k2.decode(latents, 32, 32).numpy().astype(int)
        saved = [np.asarray(Image.open(folder / f"step-{step:06d}" / f"{i:03d}.png"), int) for i in range(2)]
        assert np.abs(drawn[step] - np.stack(saved)).max() <= 1
    assert np.abs(drawn[0] - drawn[2]).max() > 3


@pytest.mark.parametrize("sign", [1, -1])
def test_reward_rises(config, sign):
    """Brighter pictures, or darker ones where that is what is rewarded."""
    config.rewards = [RewardSpec("light", "tests.runs:brightness", scale=sign)]
    config.steps, config.optim.lr, config.loss.kl, config.groups.group_size = 6, 1e-2, 0, 6
    grpo.train(config)
    summary = json.loads((Path(config.output) / "summary.json").read_text())
    assert summary["after"]["light"] > summary["before"]["light"] + 0.004


@pytest.mark.parametrize(
    ("dynamics", "ratio", "window", "advantages"),
    [("dance", "plain", 2, "gdpo"), ("cps", "guard", 1, "sum"), ("flow", "guard", None, "gdpo")],
)
def test_ratio_is_one_before_the_first_update(config, dynamics, ratio, window, advantages):
    """In each step, also when several sizes, a small micro-batch and more passes are in play."""
    config.sampling.dynamics, config.sampling.window, config.loss.ratio = dynamics, window, ratio
    config.sampling.sizes, config.groups.prompts_per_step = [[32, 32], [16, 48], [48, 32]], 3
    config.optim.passes, config.groups.micro_batch, config.advantages = 2, 3, advantages
    config.optim.lr = 1e-2
    grpo.train(config)
    for row in runs.training_rows(config.output):
        assert row["ratio_error"] <= 1e-5
        assert row["ratio_std"] > 1e-5  # in the second pass the policy has moved


def test_a_ratio_that_is_not_one_ends_the_run(config, monkeypatch):
    """At the first step and at the first one after resuming; what was saved before is as it was."""

    def trained_otherwise(self, *arguments):
        return velocity(self, *arguments) * (1 + 0.01 * torch.is_grad_enabled())

    velocity = K2.velocity
    says = r"loss: before the first update a ratio is .* off 1, more than the clip of 0\.0001, .*; use model\.dtype"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=says):
        patch.setattr(K2, "velocity", trained_otherwise)
        grpo.train(config)
    assert not (Path(config.output) / "checkpoints").exists() and runs.training_rows(config.output) == []
    config.loss.clip_low = config.loss.clip_high = 0.5
    with monkeypatch.context() as patch:
        patch.setattr(K2, "velocity", trained_otherwise)
        grpo.train(config, resume=True)
    before, config.loss.clip_low, config.steps = runs.latest(config.output), 1e-4, 4
    with monkeypatch.context() as patch, pytest.raises(UserError, match=says):
        patch.setattr(K2, "velocity", trained_otherwise)
        grpo.train(config, resume=True)
    after = runs.latest(config.output)
    assert after.step == before.step == 2
    for name in before.tensors:
        runs.assert_equal(after.tensors[name], before.tensors[name])
    grpo.train(config, resume=True)
    assert runs.latest(config.output).step == 4


@pytest.mark.parametrize(
    ("ema", "lora", "kind"), [(0.0, True, "uniform"), (0.7, True, "adaptive"), (0.7, False, "uniform")]
)
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path, ema, lora, kind):
    """Killed in step 4, after step 3 was logged and the last checkpoint was step 2's; compared bit for bit."""
    config.optim.ema, config.pool.kind = ema, kind
    config.eval.groups, config.eval.group_size, config.eval.best = 1, 2, "image/brightness"
    config.sampling.window_start, config.sampling.window_every = "sliding", 1
    if not lora:
        config.lora, config.optim.lr = None, 3e-4
    config.steps, config.checkpoint.every, config.eval.every = 4, 2, 2
    config.optim.passes, config.optim.warmup_steps, config.groups.prompts_per_step = 2, 6, 1
    grpo.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")

    def killed(*arguments):
        if len(runs.training_rows(config.output)) == 3:
            raise RuntimeError("killed")
        return optimise(*arguments)

    optimise = grpo.optimise
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(grpo, "optimise", killed)
        grpo.train(config)
    assert [row["step"] for row in runs.rows(config.output)] == [0, 1, 2, 2, 3]
    assert runs.latest(config.output).step == 2
    torch.manual_seed(99)
    np.random.seed(99)
    grpo.train(config, resume=True)

    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.step == b.step == 4
    files = {"adapter" if lora else "weights", "optimizer"}
    files |= ({"live"} if ema else set()) | ({"pool"} if kind == "adaptive" else set())
    assert a.tensors.keys() == b.tensors.keys() == files
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert a.state["counters"] == b.state["counters"] == {"updates": 8, "skipped": 0, "skipped_in_a_row": 0}
    assert a.state["optimizer"] == b.state["optimizer"] and a.state.get("pool") == b.state.get("pool")
    assert runs.untimed(whole) == runs.untimed(config.output)
    summaries = [json.loads((Path(run) / "summary.json").read_text()) for run in (whole, config.output)]
    for name in ("before", "after", "images", "steps", "best"):
        assert summaries[0][name] == summaries[1][name]
    pictures = [path.relative_to(whole) for path in Path(whole).glob("*/step-*/*.png")]
    assert len(pictures) == 6
    assert all((Path(whole) / p).read_bytes() == (Path(config.output) / p).read_bytes() for p in pictures)


def test_resuming_a_finished_run_changes_nothing(config):
    grpo.train(config)
    before, metrics = runs.latest(config.output), runs.rows(config.output)
    grpo.train(config, resume=True)
    assert runs.rows(config.output) == metrics
    runs.assert_equal(runs.latest(config.output).tensors["adapter"], before.tensors["adapter"])
    config.steps = 3
    grpo.train(config, resume=True)
    assert [row["step"] for row in runs.training_rows(config.output)] == [1, 2, 3]


@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGTERM, None), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_run_after_the_step(config, monkeypatch, number, leaves):
    """Ctrl-C saves as SIGTERM does, and is passed on when all is written. The handlers are put back."""

    def optimise(*arguments):
        signal.raise_signal(number)
        return original(*arguments)

    original, handlers = grpo.optimise, [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(grpo, "optimise", optimise)
    if leaves is None:
        grpo.train(config)
    else:
        with pytest.raises(leaves):
            grpo.train(config)
    assert runs.latest(config.output).step == 1 and len(runs.training_rows(config.output)) == 1
    assert (Path(config.output) / "report.html").is_file()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_signal_that_the_other_processes_have_not_heard_of():
    """It comes just after they were asked, in step 2: all have to end together, so with step 3."""

    def anywhere(flag):
        asked.append(flag)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGTERM)
        return flag

    asked, saved = [], []
    loop = Loop(0, 9, CheckpointConfig(every=0, minutes=0), saved.append, anywhere)
    assert list(loop) == [1, 2, 3]
    assert asked == [False, False, True] and saved == [3] and loop.stopped is signal.SIGTERM


def test_all_weights_are_trained(config, trained):
    """Where `lora` is null: all but the text fusion's. The KL is to the weights as they were, so 0 at first."""
    config.lora, config.optim.lr, config.loss.kl = None, 3e-4, 0.1
    grpo.train(config)
    first, second = runs.training_rows(config.output)
    assert first["kl"] == 0 < second["kl"]
    assert all(row["ratio_error"] <= 1e-5 and row["grad_norm"] > 0 for row in (first, second))
    ((k2, base),) = trained
    saved = runs.latest(config.output)
    assert saved.state["lora"] is None and saved.tensors.keys() == {"weights", "optimizer"}
    runs.assert_equal(saved.tensors["weights"], k2.role_state_dict("policy"))
    for key, value in k2.base_state_dict().items():
        assert torch.equal(value, base[key]) == key.startswith(("text_fusion.", "txt_in.")), key
    assert saved.tensors["weights"].keys() == {key for key in base if not key.startswith(("text_fusion.", "txt_in."))}


def test_all_weights_in_bf16_move_by_less_than_bf16_can_hold(config):
    """They are kept in fp32: a step of 1e-7 is there in all of them, and there is no KL before the first."""
    config.model.dtype, config.lora, config.optim.lr, config.loss.kl = "bfloat16", None, 1e-7, 0.1
    config.steps = 1
    grpo.train(config)
    (row,) = runs.training_rows(config.output)
    assert row["kl"] == 0 and row["ratio_error"] <= 1e-5
    base = K2.load(config.model.path, dtype=torch.bfloat16).base_state_dict()
    for key, value in runs.latest(config.output).tensors["weights"].items():
        assert 0 < (value - base[key].float()).abs().max() < 2e-7, key


# what evaluations decide


def checkpoints(run) -> set[str]:
    return {path.name for path in (Path(run) / "checkpoints").iterdir()}


def test_the_best_step_is_kept(config):
    """Also when it is older than what is kept otherwise, and no checkpoint was due at it."""
    config.rewards.append(runs.script("oracle", [0.5, 0.4, 0.7, 0.6, 0.7]))
    config.steps, config.eval.every, config.eval.best, config.checkpoint.keep = 4, 1, "oracle", 1
    grpo.train(config)
    run = Path(config.output)
    assert checkpoints(run) == {"best", "step-000002", "step-000004"}
    best = checkpoint.load(checkpoint.find(run / "checkpoints/best"))
    assert best.step == 2 and runs.latest(run).step == 4
    assert json.loads((run / "summary.json").read_text())["best"] == {"metric": "oracle", "step": 2, "value": 0.7}
    assert "Best oracle: 0.7 at step 2, in checkpoints/best" in (run / "report.html").read_text()
    # It holds what was evaluated: its pictures are those of step 2.
    k2, table = load_checkpoint(best), json.loads((run / "samples/prompts.json").read_text())
    with k2.role("policy"):
        noise = sampler.noise([row["seed"] for row in table], (16, 64))
        drawn = k2.decode(k2.sample(k2.text(tiny.PROMPTS[2:]), noise, config.eval.steps, 32, 32), 32, 32).numpy()
    shown = [np.asarray(Image.open(run / "samples/step-000002" / f"{i:03d}.png"), int) for i in range(2)]
    assert np.abs(drawn.astype(int) - np.stack(shown)).max() <= 1


def test_no_step_is_best_that_is_below_the_start(config, capsys):
    config.rewards.append(runs.script("oracle", [0.5, 0.4, 0.5]))
    config.eval.every, config.eval.best = 1, "oracle"
    grpo.train(config)
    assert checkpoints(config.output) == {"step-000002"}
    assert "oracle was never above its start (0.5), so no step is marked best" in capsys.readouterr().err
    assert "Best oracle: 0.5 at the start: no step did better" in (Path(config.output) / "report.html").read_text()


def test_a_link_to_best_lost_with_the_process_is_made_again(config):
    config.rewards.append(runs.script("oracle", [0.5, 0.6, 0.7]))
    config.eval.every, config.eval.best = 1, "oracle"
    grpo.train(config)
    (Path(config.output) / "checkpoints/best").unlink()
    grpo.train(config, resume=True)
    assert checkpoint.load(Path(config.output) / "checkpoints/best").step == 2


def test_a_collapse_ends_the_run(config, monkeypatch, tmp_path, capsys):
    """From step 2 on, all pictures of a batch are the same."""

    def sample(self, *arguments, **keywords):
        latents = original(self, *arguments, **keywords)
        collapsed = len(runs.training_rows(config.output)) >= 2
        return latents[:1].expand_as(latents) if collapsed else latents

    original = K2.sample
    monkeypatch.setattr(K2, "sample", sample)
    config.steps, config.eval.every, config.eval.groups, config.eval.group_size = 20, 1, 1, 3
    config.eval.stop.metric, config.eval.stop.patience, config.eval.stop.drop = "image/diversity", 2, 0.5
    arguments = ["grpo", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]
    assert cli.main(arguments) == 0
    run = Path(config.output)
    diversity = [row["eval/image/diversity"] for row in runs.rows(run) if "eval/image/diversity" in row]
    assert len(diversity) == 4 and all(value > 0.01 for value in diversity[:2]) and diversity[2:] == [0, 0]
    assert runs.latest(run).step == 3 and [row["step"] for row in runs.training_rows(run)] == [1, 2, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["stopped"].startswith("eval.stop: image/diversity fell from 0.")
    assert summary["stopped"].endswith(" to 0 (step 3)")
    assert summary["stopped"] + "; the run has ended" in capsys.readouterr().err
    assert f"Stopped early: {summary['stopped']}" in (run / "report.html").read_text()

    assert cli.main([*arguments, "--resume"]) == 0  # it stays ended ...
    assert runs.latest(run).step == 3
    monkeypatch.undo()
    assert (
        cli.main([*arguments, "--resume", "--eval.stop.metric", "null", "--steps", "4"]) == 0
    )  # ... until told to go on
    assert runs.latest(run).step == 4


def test_flat_rewards_move_nothing(config, tmp_path, model, trained):
    config = runs.config(tmp_path, model, "constant")
    config.loss.kl = 0
    grpo.train(config)
    for row in runs.training_rows(config.output):
        assert (row["flat_groups"], row["advantage"], row["grad_norm"], row["reward"]) == (1, 0, 0, 0.5)
    fresh = K2.load(model)
    fresh.add_role("policy", 4, 8.0, seed=config.seed)
    runs.assert_equal(runs.latest(config.output).tensors["adapter"], fresh.role_state_dict("policy"))


def test_a_reward_that_compares_a_group(config):
    """Evaluation shows it the groups that it draws; without any it is not measured."""
    config.rewards = [RewardSpec("far", "tests.runs:contrast", group=True)]
    config.eval.groups, config.eval.group_size, config.steps = 2, 3, 1
    grpo.train(config)
    first, row, _ = runs.rows(config.output)
    assert row["reward"] > 0 and row["flat_groups"] == 0 and first["eval/far"] > 0
    config.output, config.eval.groups = config.output + "-2", 0
    grpo.train(config)
    assert "eval/far" not in runs.rows(config.output)[0]


def test_adaptive_pool_in_a_run(tmp_path, model):
    """Of three prompts that teach nothing all but a step's two are sent to rest; the report shows them."""
    config = runs.config(tmp_path, model, "constant")
    config.pool.kind, config.pool.prune_after, config.steps = "adaptive", 1, 5
    grpo.train(config)
    counts = [{k: v for k, v in row.items() if k.startswith("pool/")} for row in runs.training_rows(config.output)]
    classes = [sum(row[f"pool/{name}"] for name in ("new", "informative", "easy", "hard", "flat")) for row in counts]
    assert classes == [3] * 5 and (counts[0]["pool/new"], counts[0]["pool/resting"]) == (3, 0)
    assert (counts[-1]["pool/flat"], counts[-1]["pool/resting"], counts[-1]["pool/unscored"]) == (3, 1, 0)
    saved = runs.latest(config.output)
    assert saved.state["pool"]["rewards"] == ["constant"] and saved.state["pool"]["spread"] == [0]
    assert saved.tensors["pool"]["visits"].sum() == 2 * 5
    ends = json.loads((Path(config.output) / "prompts.json").read_text())
    assert {row["prompt"] for row in ends["hardest"]} == set(tiny.PROMPTS[:3])
    page = (Path(config.output) / "report.html").read_text()
    assert "most informative" in page and tiny.PROMPTS[1] in page and "resting" in page


def test_several_sizes_in_one_run(config, monkeypatch):
    sizes = []

    def decode(self, latents, height, width, batch=16):
        sizes.append((height, width))
        return original(self, latents, height, width, batch)

    original = K2.decode
    monkeypatch.setattr(K2, "decode", decode)
    config.sampling.sizes = [[32, 32], [16, 48], [48, 32]]
    grpo.train(config)
    assert sizes[1:-1] == [(32, 32), (16, 48), (48, 32), (32, 32)]  # two groups a step, between two evaluations
    assert all(row["ratio_error"] <= 1e-5 for row in runs.training_rows(config.output))


def test_only_some_layers_are_adapted(config):
    config.lora.targets = ["to_q", "ff.down"]
    grpo.train(config)
    saved = runs.latest(config.output)
    assert len(saved.tensors["adapter"]) == 2 * 2 * 3 and saved.state["lora"]["targets"] == ["to_q", "ff.down"]


# mistakes


def test_no_score_at_all(tmp_path, model):
    config = runs.config(tmp_path, model, "nothing")
    with pytest.raises(UserError, match="not one image of this step could be scored: all None"):
        grpo.train(config)
    assert runs.rows(config.output)[0]["eval/nothing"] is None


def test_turbo_is_refused_and_leaves_no_run_behind(config, tmp_path, model):
    turbo = tiny.save(tmp_path / "turbo", distilled=True)
    config.model.path = str(turbo)
    with pytest.raises(UserError, match=r"turbo: model_index\.json: is_distilled is true: train the Raw checkpoint"):
        grpo.train(config)
    config.model.path = str(model)
    grpo.train(config)
    assert len(runs.training_rows(config.output)) == 2


def test_a_run_is_not_overwritten(config):
    grpo.train(config)
    before = runs.rows(config.output)
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        grpo.train(config)
    assert runs.rows(config.output) == before


@pytest.mark.parametrize("prompt", [" ".join(tiny.PROMPTS), "🦊🌲🌙🦊🌲🌙"])
def test_long_prompts_are_cut_with_a_warning(config, capsys, prompt, model):
    """max_tokens counts the five of the template's end."""
    config.steps, config.prompts.max_tokens = 1, 16
    Path(config.prompts.train).write_text(json.dumps({"prompt": prompt}) + '\n{"prompt": "a fox"}\n')
    Path(config.prompts.heldout).write_text('{"prompt": "a red circle"}\n')
    grpo.train(config)
    cut = len(tiny.tokenizer()(prompt)["input_ids"]) - (16 - 5)
    assert cut > 3
    message = f"warning: 1 prompts are longer than prompts.max_tokens (16); up to {cut} tokens are cut"
    assert message in capsys.readouterr().err
    Path(config.prompts.train).write_text('{"prompt": "a fox"}\n')
    grpo.train(config, resume=True)
    assert "tokens are cut" not in capsys.readouterr().err


def test_a_changed_recipe(config, capsys):
    """What a resumed run would get wrong is refused, and all is as it was; the rest is told and done."""
    grpo.train(config)
    made = {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}
    for path, value in (
        ("lora.rank", 2), ("lora.alpha", 2.0), ("lora.targets", ["to_q"]), ("lora", None), ("seed", 1),
        ("optim.ema", 0.9), ("prompts.heldout", "other.jsonl"), ("eval.prompts", 1), ("eval.steps", 3),
        ("eval.seed", 1), ("eval.groups", 1), ("sampling.sizes", [[16, 48]]),
    ):  # fmt: skip
        changed = copy.deepcopy(config)
        *sections, name = path.split(".")
        owner = functools.reduce(getattr, sections, changed)
        setattr(owner, name, value)
        changed.steps = 3  # which it may
        with pytest.raises(UserError, match=rf"run: cannot be resumed with {path} .* -> .*: restore that") as error:
            grpo.train(changed, resume=True)
        assert str(error.value).count(" -> ") == 1
    assert {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()} == made

    capsys.readouterr()
    config.steps, config.optim.lr, config.optim.betas, config.optim.weight_decay = 3, 1e-4, (0.8, 0.95), 0.1
    config.pool.kind, config.sampling.sizes, config.groups.group_size = "adaptive", [[32, 32], [16, 48]], 3
    config.rewards = [RewardSpec("light", "tests.runs:brightness", weight=2.0)]
    grpo.train(config, resume=True)
    told = capsys.readouterr().err
    assert "the recipe has changed since the run began: " in told and "optim.lr 0.003 -> 0.0001" in told
    (group,) = runs.latest(config.output).state["optimizer"]["groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, [0.8, 0.95], 0.1)
    config.pool.kind, config.steps = "uniform", 4
    grpo.train(config, resume=True)
    assert runs.latest(config.output).step == 4


def test_before_the_first_checkpoint_a_recipe_may_change(config, monkeypatch):
    def optimise(*arguments):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(grpo, "optimise", optimise)
        grpo.train(config)
    config.seed, config.lora.rank, config.optim.ema = 1, 2, 0.5
    grpo.train(config, resume=True)
    assert runs.latest(config.output).step == 2 and runs.latest(config.output).state["lora"]["rank"] == 2


def test_another_adapter_is_not_loaded(config):
    """Also where the recipe that would have told is gone."""
    grpo.train(config)
    config.lora.rank = 2
    for lora, says in ((config.lora, r"of another shape .* give the adapter of this rank"), (None, "restore lora")):
        (Path(config.output) / "recipe.yaml").unlink()
        config.lora = lora
        with pytest.raises(UserError, match=says):
            grpo.train(config, resume=True)


# single steps


@pytest.fixture
def one_step(config, model):
    """A policy that differs from the base, and a function that samples and scores a step's groups."""
    k2 = K2.load(model)
    k2.add_role("policy", 4, 8.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in k2.role_named_parameters("policy").items():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    parameters = k2.train_role("policy")
    source = PromptSource(config, read_prompts(config.prompts.train))

    def draw(step=1):
        with ScoreQueue(load_rewards(config.rewards), config.groups.group_size) as queue:
            groups = grpo.sample(k2, config, step, source, queue, Processes())
            grpo.score(config, groups, queue.gather())
        return groups

    def gradient(groups):
        """What one update would follow, flat; nothing is changed."""
        stepper = Stepper(parameters, config.optim)
        seen = []
        stepper.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in parameters])) or 0.0  # type: ignore
        metrics = grpo.optimise(k2, config, groups, stepper, Processes())
        for parameter in parameters:
            parameter.grad = None
        return seen[0], metrics

    return k2, parameters, draw, gradient


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("window", [2, None])
def test_gradient_of_a_step(config, one_step, ratio, window):
    """-mean over images and SDE steps of A grad log p; GRPO-Guard: times S / delta over the mean 1 / delta."""
    k2, parameters, draw, gradient = one_step
    config.loss.ratio, config.loss.kl, config.sampling.window = ratio, 0.0, window
    config.sampling.sizes = [[32, 32], [16, 48]]
    groups = draw()
    got, metrics = gradient(groups)
    assert metrics["ratio_error"] <= 1e-5

    terms = []
    for group in groups:
        moves = group.trajectory.transitions
        assert len(moves) == (window or 3)
        start = moves[0].x  # shared by the group up to a window, each image's own where all steps are stochastic
        assert all(torch.equal(start[0], x) == (window is not None) for x in start[1:])
        inverse = torch.tensor([1 / (move.t - move.t_next) for move in moves])
        for move, weight in zip(moves, inverse / inverse.mean()):
            with k2.role("policy"):
                v = k2.velocity(move.x, move.t, group.text, *group.size)
                first = sampler.schedule(4, k2.mu(*group.size))[1]
                mean, std = sde_moments(move.x, v, move.t, move.t_next, "flow", config.sampling.eta, first)
            factor = weight * std if ratio == "guard" else 1.0
            terms.append(factor * group.advantages * sampler.log_prob(move.x_next, mean, std))
    loss = -torch.cat(terms).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    assert (got - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0


def test_gradient_does_not_depend_on_the_micro_batch(config, one_step):
    _, _, draw, gradient = one_step
    groups = draw()
    gradients = []
    for micro_batch in (4, 3, 1):
        config.groups.micro_batch = micro_batch
        gradients.append(gradient(groups)[0])
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_kl_pulls_towards_the_base(config, one_step):
    """Without advantages the step follows the squared velocity distance to the adapter-free model alone."""
    k2, parameters, draw, gradient = one_step
    config.loss.kl = 0.5
    groups = draw()
    for group in groups:
        group.advantages = torch.zeros(4)
    got, metrics = gradient(groups)
    terms = []
    for group in groups:
        for move in group.trajectory.transitions:
            with k2.role("policy"):
                v = k2.velocity(move.x, move.t, group.text, *group.size)
            with torch.no_grad(), k2.role(None):
                reference = k2.velocity(move.x, move.t, group.text, *group.size)
            terms.append((v - reference).square().flatten(1).mean(1))
    kl = torch.cat(terms).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(0.5 * kl, parameters)])
    assert (got - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0
    assert metrics["kl"] == pytest.approx(kl.item(), rel=1e-4) and metrics["kl"] > 1e-4


def test_a_step_is_drawn_from_its_number_alone(config, one_step):
    _, _, draw, _ = one_step
    config.sampling.window_start = 0  # the first transition begins at the noise itself
    first, other = draw(3), draw(4)
    torch.manual_seed(5)
    again = draw(3)
    for a, b in zip(first, again):
        assert a.record == b.record and torch.equal(a.trajectory.latents, b.trajectory.latents)
        assert torch.equal(a.advantages, b.advantages)
    config.seed = 1
    starts = [group.trajectory.transitions[0].x[0] for groups in (first, other, draw(3)) for group in groups]
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 6  # two groups in each of three steps


def test_prompts_come_once_each_before_any_comes_twice():
    order = [in_turn(0, i, 7) for i in range(21)]
    epochs = [order[:7], order[7:14], order[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != [in_turn(1, i, 7) for i in range(21)]


@pytest.mark.parametrize(("steps", "window", "starts"), [(8, 2, 4), (10, 2, 5), (4, 3, 1), (4, 2, 2), (2, 1, 1)])
def test_windows_lie_in_the_first_half(config, steps, window, starts):
    config.sampling.steps, config.sampling.window = steps, window
    windows = [grpo.window_of(config, step) for step in range(1, 60)]
    assert {w.start for w in windows} == set(range(starts))
    assert all(len(w) == window and w.stop <= steps - 1 for w in windows)
    config.sampling.window_start, config.sampling.window_every = "sliding", 3
    slid = [grpo.window_of(config, step).start for step in range(1, 3 * starts + 4)]
    assert slid == [i for i in [*range(starts), 0] for _ in range(3)]
    config.sampling.window_start = 0
    assert grpo.window_of(config, 9) == range(window)
    config.sampling.window = None
    assert grpo.window_of(config, 9) == range(steps - 1)


def test_a_reward_without_scores_does_not_lower_the_mean(config):
    """Two prompts of which none asks for a text: the mean reward is the other's, not half of it."""
    config.rewards.append(RewardSpec("text", "tests.runs:nothing"))
    values, valid = np.array([[0.6, 0.0], [0.8, 0.0]] * 4), np.array([[True, False]] * 8)
    scores = Scores(["brightness", "text"], values, valid, np.zeros_like(valid), {}, {}, {})
    groups = [grpo.Group(g, None, None, (32, 32), None, torch.empty(0)) for g in range(2)]  # type: ignore[arg-type]
    metrics = grpo.score(config, groups, scores)
    assert metrics["reward"] == pytest.approx(0.7) and metrics["reward/text"] is None
    assert metrics["missing"] == 0 and metrics["flat_groups"] == 0
    expected = [-1.0, 1.0] * 2
    for group in groups:
        assert [a > 0 for a in group.advantages.tolist()] == [e > 0 for e in expected]
    assert all(a == b for a, b in itertools.pairwise(group.advantages.tolist()[::2] for group in groups))


def test_average_of_the_weights():
    """a += (1 - d)(p - a), d = min(ema, (1 + n) / (10 + n)); inside the block the parameters are the average."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    stepper = Stepper([parameter], OptimConfig(lr=0.1, ema=0.2))
    expected = parameter.detach().clone()
    for n in range(1, 5):
        parameter.grad = torch.tensor([1.0, float(n)])
        stepper.step()
        decay = [2 / 11, 0.2, 0.2, 0.2][n - 1]
        expected = decay * expected + (1 - decay) * parameter.detach()
    live = parameter.detach().clone()
    with pytest.raises(RuntimeError), stepper.averaged():
        torch.testing.assert_close(parameter.detach(), expected)
        raise RuntimeError
    assert torch.equal(parameter, live) and not torch.equal(live, expected)


def test_average_of_many_updates():
    """Self-check 34: from 0 towards 1 at decay .99, 100 updates: 1 - .99^100 = .633968."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    stepper = Stepper([parameter], OptimConfig(weight_decay=0.0, ema=0.99))
    stepper.restore_counters({"updates": 10_000, "skipped": 0, "skipped_in_a_row": 0})  # the quick beginning is over
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(100):
        parameter.grad = torch.zeros_like(parameter)
        stepper.step()
    with stepper.averaged():
        assert parameter.item() == pytest.approx(0.633968, abs=5e-7)


def test_the_rate_falls_at_the_end(config, monkeypatch):
    """Of four steps the last two cool down: shares 1, 1, 2/3 and 1/3 of the rate."""
    step, rates = Stepper.step, []

    def watched(self):
        norm = step(self)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return norm

    monkeypatch.setattr(Stepper, "step", watched)
    config.steps, config.optim.lr, config.optim.cooldown_steps = 4, 3e-3, 2
    grpo.train(config)
    assert rates == pytest.approx([3e-3, 3e-3, 2e-3, 1e-3])
