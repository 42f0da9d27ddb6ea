"""STPO on a tiny real K2: whole runs, and what is refused."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import cli
from posttrain.config import metric_names
from posttrain.config.load import load_config
from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.stpo import train as stpo
from posttrain.training import image_metrics as figures_of
from tests.helpers import runs


@pytest.fixture
def config(tmp_path, model):
    return runs.stpo_config(tmp_path, model)


def evaluations(run):
    return [row for row in runs.rows(run) if "eval/pairs/winner" in row]


# whole runs


def test_run_directory(config, monkeypatch):
    seen = runs.watch_loading(stpo, monkeypatch)
    config.eval.every = 1
    stpo.train(config)
    run = Path(config.output)
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "grids", "samples", "checkpoints", "report.html",
        "summary.json",
    }  # fmt: skip
    first, second = runs.training_rows(run)
    runs.assert_metrics_are_defined(run, "brightness")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("winner", "loser", "margin", "z", "drift_winner", "drift_loser", "gradient/anchor"):
        assert first[name] == 0
    assert second["drift_winner"] > 0 and second["loss"] != first["loss"]
    assert first["sigma"] == 0.5 and first["grad_norm"] > 0 and first["skipped_updates"] == 0
    assert sum(first[f"gradient/{n}"] for n in ("winner", "loser", "anchor", "hinge")) == pytest.approx(1)
    assert first["gradient/winner"] > first["gradient/loser"] > 0 and "gradient/winner" not in second

    before, _, after = evaluations(run)
    assert (before["step"], after["step"]) == (0, 2)
    assert before["eval/image/high_energy_ratio"] == 1 and before["eval/pairs/winner"] == 0
    shown = [np.stack([np.asarray(Image.open(run / f"samples/step-{s:06d}/{i:03d}.png")) for i in range(2)])
             for s in (0, 2)]  # fmt: skip
    energies = [figures_of.high_energy(images) for images in shown]
    assert after["eval/image/high_energy_ratio"] == pytest.approx(energies[1] / energies[0])
    assert after["eval/image/contrast"] == pytest.approx(figures_of.contrast(shown[1]))
    summary = json.loads((run / "summary.json").read_text())
    named = {"brightness", *metric_names.LOOK, *metric_names.CHANGES, *metric_names.PAIRS}
    assert summary["before"].keys() == summary["after"].keys() == named
    assert summary["after"] == {name: after[f"eval/{name}"] for name in named}
    assert (summary["steps"], summary["pairs"]) == (2, 12)
    assert "high_energy_ratio" in (run / "report.html").read_text()

    saved = runs.latest(run)
    assert saved.state["method"] == "stpo" and saved.state["origin"]["merged"] == []
    ((k2, base),) = seen
    runs.assert_equal(
        dict(k2.base_state_dict()), base
    )  # the reference is what it was, and nothing asked for its gradient
    assert all(p.grad is None for key, p in k2.transformer.named_parameters() if "lora_" not in key)
    moved = [bool(v.any()) for key, v in saved.tensors["adapter"].items() if key.endswith("lora_B.weight")]
    assert len(moved) == 24 and all(moved)


@pytest.mark.parametrize("kind", ["stpo", "dpo"])
def test_a_preference_is_learnt(config, kind):
    """Bright over dark, for a prompt that was not trained on. This model's errors would all fall if they were let, so
    the guard lets the whole of the rejected picture's gradient pass that does not raise the chosen one's."""
    config.loss.kind, config.steps, config.optim.lr, config.eval.every = kind, 18, 1e-2, 6
    config.loss.guard_share = 0.0
    stpo.train(config)
    before, *_, after = evaluations(config.output)
    assert before["eval/pairs/accuracy"] == 0.5 and after["eval/pairs/accuracy"] == 1
    assert after["eval/pairs/margin"] > 0 and after["eval/pairs/z10"] <= after["eval/pairs/z50"]
    if kind == "stpo":
        assert after["eval/pairs/winner"] < 0.01


def test_dpo_by_one_setting(config, tmp_path):
    """What it does not use is not read; and with its own settings switched off STPO is the same."""
    config.loss.kind = "dpo"
    stpo.train(config)
    config.loss.guard, config.loss.anchor, config.loss.hinge = "none", 0, 0
    for i, kind in enumerate(("dpo", "stpo")):
        config.output, config.loss.kind = str(tmp_path / f"again-{i}"), kind
        stpo.train(config)
        runs.assert_equal(
            runs.latest(config.output).tensors["adapter"], runs.latest(tmp_path / "run").tensors["adapter"]
        )
    config.output, config.loss.guard = str(tmp_path / "guarded"), "output"
    stpo.train(config)
    one, other = (runs.latest(run).tensors["adapter"] for run in (config.output, tmp_path / "run"))
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("guard", "ema", "lora"), [("output", 0.7, True), ("exact", 0.0, True), ("output", 0.0, False)]
)
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path, guard, ema, lora):
    """Killed in step 4, after step 3 was logged and the last checkpoint was step 2's; compared bit for bit."""
    config.loss.guard, config.optim.ema, config.loss.terms_every = guard, ema, 2
    config.pairs.drop_prompt, config.optim.warmup_steps, config.eval.best = 0.3, 3, "image/brightness"
    if not lora:
        config.lora, config.optim.lr = None, 3e-4
    config.steps, config.checkpoint.every, config.eval.every = 4, 2, 2
    stpo.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")

    def killed(*arguments):
        if len(runs.training_rows(config.output)) == 3:
            raise RuntimeError("killed")
        return optimise(*arguments)

    optimise = stpo.optimise
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(stpo, "optimise", killed)
        stpo.train(config)
    assert [row["step"] for row in runs.rows(config.output)] == [0, 1, 2, 2, 3]
    torch.manual_seed(99)
    np.random.seed(99)
    stpo.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.step == b.step == 4
    assert (
        a.tensors.keys()
        == b.tensors.keys()
        == {"adapter" if lora else "weights", "optimizer"} | ({"live"} if ema else set())
    )
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert a.state["counters"] == b.state["counters"] and a.state["pairs"] == b.state["pairs"]
    assert runs.untimed(whole) == runs.untimed(config.output)
    summaries = [json.loads((Path(run) / "summary.json").read_text()) for run in (whole, config.output)]
    for name in ("before", "after", "pairs", "steps", "best"):
        assert summaries[0][name] == summaries[1][name]


def test_sigterm_saves_and_ends(config, monkeypatch):
    def optimise(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    original = stpo.optimise
    monkeypatch.setattr(stpo, "optimise", optimise)
    stpo.train(config)
    assert runs.latest(config.output).step == 1 and (Path(config.output) / "report.html").is_file()


def test_a_limit_ends_the_run(config, tmp_path, capsys):
    config.steps, config.eval.every = 9, 1
    config.eval.stop.metric, config.eval.stop.better, config.eval.stop.limit = "pairs/drift_winner", "lower", 1e-9
    config.eval.best = "pairs/accuracy"
    assert cli.main(["stpo", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 0
    assert runs.latest(config.output).step == 2
    stopped = json.loads((Path(config.output) / "summary.json").read_text())["stopped"]
    assert stopped.startswith("eval.stop: pairs/drift_winner is ") and stopped.endswith("above the limit 1e-09")
    assert stopped in capsys.readouterr().err


# mistakes


def spoil(config, *rows):
    """Puts other rows at the top of the set."""
    path = Path(config.pairs.train)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*(json.dumps(json.loads(lines[0]) | row) + "\n" for row in rows), *lines]))


def test_bad_rows_are_counted_and_left_out(config, capsys, tmp_path):
    """Two of 23 and a tie are below the limit of a tenth; above it, the run ends before it begins."""
    Image.new("RGB", (20, 32)).save(tmp_path / "images/odd.png")
    Image.new("RGB", (20, 32), "red").save(tmp_path / "images/odd2.png")
    spoil(config, {"chosen": "images/none.png"}, {"chosen": "images/odd.png", "rejected": "images/odd2.png"},
          {"share": 0.5})  # fmt: skip
    config.pairs.max_bad = 0.1
    stpo.train(config)
    said = capsys.readouterr().err
    assert "pairs.jsonl: 1 of 23 rows left out as ties" in said
    assert "pairs.jsonl: 2 of 23 rows left out as bad: " in said
    assert "pairs.jsonl:1: chosen: images/none.png is missing; " in said
    assert "pairs.jsonl:2: is 32x20 pixels, no multiples of 8; set pairs.size" in said
    assert json.loads((Path(config.output) / "summary.json").read_text())["steps"] == 2
    config.pairs.max_bad, config.output = 0.05, str(tmp_path / "other")
    with pytest.raises(UserError, match=r"more than 0\.05 of 23 rows are bad \(max_bad\): .*pairs\.jsonl:2: is 32x20"):
        stpo.train(config)
    assert not Path(config.output).exists()


def test_other_pairs_cannot_be_resumed(config):
    stpo.train(config)
    spoil(config, {"prompt": "another"})
    with pytest.raises(UserError, match=r"pairs: not those that .*step-000002 was trained on"):
        stpo.train(config, resume=True)


def test_what_is_held_out_stays_so(config, tmp_path, capsys):
    """A pair that was trained on must not be held out later."""
    stpo.train(config)
    recipe = runs.recipe(config, tmp_path / "recipe.yaml")
    assert cli.main(["stpo", "--config", str(recipe), "--resume", "--steps", "3", "--pairs.heldout", "0.5"]) == 2
    assert "cannot be resumed with pairs.heldout 0.25 -> 0.5: " in capsys.readouterr().err


def test_one_prompt_is_too_few(config):
    path = Path(config.pairs.train)
    path.write_text("".join(json.dumps(json.loads(x) | {"prompt": "a"}) + "\n" for x in path.read_text().splitlines()))
    with pytest.raises(UserError, match=r"pairs\.jsonl: all pairs are of one prompt, which is held out; add others"):
        stpo.train(config)


def test_long_prompts_are_cut_with_a_warning(config, capsys):
    config.pairs.max_tokens = 16
    stpo.train(config)
    assert "warning: longer than pairs.max_tokens (16): 1 prompt, of which up to" in capsys.readouterr().err
    assert load_checkpoint(runs.latest(config.output)).roles.keys() == {"policy"}


@pytest.mark.parametrize("name", ["stpo_synthetic", "stpo_human"])
def test_recipes_are_valid(name):
    config, _ = load_config("stpo", ["--config", f"recipes/nano/{name}.yaml"])
    assert config.output == f"runs/nano-{name.replace('_', '-')}" and config.loss.kind == "stpo"
    assert config.model.start == (None if name == "stpo_synthetic" else "runs/nano-stpo-synthetic")
