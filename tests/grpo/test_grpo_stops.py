"""GRPO runs that stop, early or by a signal, go on, keep their best step, and refuse what cannot be gone on with."""

import copy
import functools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import cli, preconditions
from posttrain.config.sections import CheckpointConfig
from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.training import checkpoint
from posttrain.training.stepper import Loop
from rewards.base import RewardSpec
from tests.helpers import runs, tiny


@pytest.fixture
def config(tmp_path, model):
    return runs.config(tmp_path, model)


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
    counters = a.state["counters"]
    assert counters == b.state["counters"] and len(counters.pop("norms")) == 8
    assert counters == {"updates": 8, "skipped": 0, "skipped_in_a_row": 0, "clipped": 0}
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

    asked, saved, taken = [], [], []
    loop = Loop(0, 9, CheckpointConfig(every=0, minutes=0), anywhere)
    for step in loop:
        taken.append(step)
        if loop.save_due(step):
            saved.append(step)
    assert taken == [1, 2, 3]
    assert asked == [False, False, True] and saved == [3] and loop.stopped is signal.SIGTERM


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
    config.rewards.append(runs.script("heldout", [0.5, 0.6, 0.55, 0.5]))
    config.eval.best = "heldout"
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

    # It hands on its best step, which is also known when the process was killed before it could write a summary.
    assert summary["after"]["heldout"] == 0.6 and runs.latest(run).state["history"]["after"]["heldout"] == 0.5
    (run / "summary.json").unlink()
    assert checkpoint.find(run).name == checkpoint.find(run).name == "step-000001"
    told = f"posttrain: {run}: its stop rule ended it at step 3; taking its best step 1 by heldout\n"
    assert capsys.readouterr().err == told  # once a process

    assert cli.main([*arguments, "--resume"]) == 0  # it stays ended ...
    assert runs.latest(run).step == 3
    monkeypatch.undo()
    assert (
        cli.main([*arguments, "--resume", "--eval.stop.metric", "null", "--steps", "4"]) == 0
    )  # ... until told to go on
    assert runs.latest(run).step == 4 and checkpoint.find(run).name == "step-000004"


def test_a_run_that_was_stopped_without_a_best_step_hands_on_nothing(config, capsys):
    config.rewards.append(runs.script("heldout", [0.5, 0.3, 0.2]))
    config.steps, config.eval.every, config.checkpoint.keep = 5, 1, 1
    config.eval.best, config.eval.stop.metric = "heldout", "heldout"
    grpo.train(config)
    run = Path(config.output)
    assert checkpoints(run) == {"step-000002"}
    with pytest.raises(UserError, match=r"ended it at step 2, and heldout was never above its start, .*; run it again"):
        checkpoint.find(run)
    assert checkpoint.find(run / "checkpoints/step-000002").name == "step-000002"


def test_a_best_step_that_is_gone_is_told(config):
    config.rewards.append(runs.script("heldout", [0.5, 0.6, 0.3, 0.2]))
    config.steps, config.eval.every, config.checkpoint.keep = 5, 1, 1
    config.eval.best, config.eval.stop.metric = "heldout", "heldout"
    grpo.train(config)
    best = Path(config.output) / "checkpoints/step-000001"
    assert checkpoint.find(config.output) == best
    (best / "state.json").unlink()
    with pytest.raises(UserError, match=r"its best step is not whole: .*step-000001: state.json is missing; run it"):
        checkpoint.find(config.output)


def test_a_rule_that_watches_high_frequencies_alone_is_warned_of(config, capsys):
    config.steps, config.eval.every, config.eval.best = 1, 1, "image/diversity"
    config.eval.groups, config.eval.group_size = 1, 2
    config.eval.stop.metric, config.eval.stop.better = "image/high_frequency", "lower"
    grpo.train(config)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1 and "eval.stop watches image/high_frequency alone, which fell on K2-nano" in said[0]


# mistakes


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
    config.rewards = [RewardSpec("light", "tests.helpers.runs:brightness", weight=2.0)]
    grpo.train(config, resume=True)
    told = capsys.readouterr().err
    assert "the recipe has changed since the run began: " in told and "optim.lr 0.003 -> 0.0001" in told
    (group,) = runs.latest(config.output).state["optimizer"]["groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, [0.8, 0.95], 0.1)
    config.pool.kind, config.steps = "uniform", 4
    grpo.train(config, resume=True)
    assert runs.latest(config.output).step == 4


def test_held_out_prompts_replaced_in_place_are_noticed_by_their_content(config, tmp_path):
    """Before anything is loaded or changed. Touched, or longer beyond what is evaluated, it is the same file."""
    config.steps, config.checkpoint.every, config.eval.prompts = 1, 1, 2
    grpo.train(config)
    file = Path(config.prompts.heldout)
    began = file.read_text()
    rows = [json.loads(line) for line in began.splitlines()]
    rows[1]["texts"] = ["NEW"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}
    config.steps = 2
    says = r"prompts\.heldout: .*heldout\.jsonl holds other prompts than when .*run began; restore them, or choose"
    with pytest.raises(UserError, match=says):
        grpo.train(config, resume=True)
    with pytest.raises(UserError, match=says):
        preconditions.check("grpo", config, resume=True)
    assert {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()} == made
    file.write_text("\ufeff" + began.replace("\n", "\r\n") + '{"prompt": "one more"}\n', encoding="utf-8")
    grpo.train(config, resume=True)
    assert runs.latest(config.output).step == 2


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
