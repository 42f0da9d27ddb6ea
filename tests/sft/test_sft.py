"""Finetuning of a tiny real K2: whole runs, and previews on Turbo."""

import csv
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain import cli
from posttrain.config import metric_names
from posttrain.config.load import load_config
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.export.config import ExportConfig
from posttrain.export.export import export, load_checkpoint
from posttrain.model.k2 import K2
from posttrain.sft import train as sft
from posttrain.sft.cache import encode_images
from posttrain.sft.dataset import ImageSet
from posttrain.tdm import train as tdm
from posttrain.training import checkpoint
from tests.helpers import runs, tiny


@pytest.fixture
def config(tmp_path, model):
    return runs.sft_config(tmp_path, model)


def evaluations(run):
    return [row for row in runs.rows(run) if "eval/heldout/loss" in row]


def table(run):
    with (Path(run) / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# whole runs


def test_run_directory(config, monkeypatch):
    seen = runs.watch_loading(sft, monkeypatch)
    config.eval.every, config.images.drop_caption = 1, 0.5
    sft.train(config)
    run = Path(config.output)
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "grids", "samples", "checkpoints", "report.html",
        "summary.json", "images.csv",
    }  # fmt: skip
    first, second = runs.training_rows(run)
    runs.assert_metrics_are_defined(run, "brightness")
    assert first["loss"] > 0 and first["grad_norm"] > 0 and first["skipped_updates"] == 0
    assert first["image_tokens"] == 16 and first["cropped"] == first["cropped_area"] == 0
    dropped = [row["dropped"] * config.batch for row in (first, second)]
    assert all(value == round(value) for value in dropped) and 0 < sum(dropped) < 12
    assert first["seconds/image"] == pytest.approx((first["seconds/prepare"] + first["seconds/update"]) / 6)

    before, _, after = evaluations(run)
    assert (before["step"], after["step"]) == (0, 2)
    assert before["eval/heldout/gain"] == before["eval/heldout/drift"] == 0
    assert after["eval/heldout/drift"] > 0 and after["eval/heldout/gain"] > 0
    assert after["eval/heldout/gain"] == pytest.approx(1 - after["eval/heldout/loss"] / before["eval/heldout/loss"])
    # Five images: of the four parts of the times the first has two.
    of_parts = [before[f"eval/heldout/loss_t{part}"] for part in (1, 1, 2, 3, 4)]
    assert np.mean(of_parts) == pytest.approx(before["eval/heldout/loss"])
    summary = json.loads((run / "summary.json").read_text())
    named = {"brightness", *metric_names.LOOK, *metric_names.HELDOUT}
    assert summary["before"].keys() == summary["after"].keys() == named
    assert (summary["steps"], summary["images"]) == (2, 12)
    assert "heldout/gain" in (run / "report.html").read_text()

    rows = table(run)
    assert len(rows) == 20 and [row["use"] for row in rows].count("held out") == 5
    assert rows[3] | {"use": ""} == {
        "image": f"{config.images.train}/003.png", "use": "", "height": "32", "width": "32", "bucket_height": "32",
        "bucket_width": "32", "left": "0.0", "top": "0.0", "right": "32.0", "bottom": "32.0", "cut": "0.0",
    }  # fmt: skip
    saved = runs.latest(run)
    assert saved.state["method"] == "sft" and saved.state["origin"]["merged"] == []
    ((k2, base),) = seen
    runs.assert_equal(dict(k2.base_state_dict()), base)
    moved = [bool(v.any()) for key, v in saved.tensors["adapter"].items() if key.endswith("lora_B.weight")]
    assert len(moved) == 24 and all(moved)


def test_the_images_are_learnt(config):
    """The loss on images that were not trained on falls by a third, in all parts of the times."""
    config.steps, config.optim.lr, config.eval.every = 40, 1e-2, 20
    sft.train(config)
    *_, after = evaluations(config.output)
    gains = [after[f"eval/heldout/gain_t{part}"] for part in range(1, 5)]
    assert after["eval/heldout/gain"] > 0.3 and min(gains) > 0.05
    losses = [row["loss"] for row in runs.training_rows(config.output)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(("ema", "lora"), [(0.7, True), (0.0, False)])
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path, ema, lora):
    """Killed in step 4, after step 3 was logged and the last checkpoint was step 2's; compared bit for bit. Buckets of
    three sizes, one of which fills a batch only over epochs."""
    config.images.train = str(runs.captioned(tmp_path / "mixed", 20, (32, 32), (32, 32), (24, 40), (40, 24)))
    config.images.drop_caption, config.optim.ema, config.optim.warmup_steps = 0.3, ema, 3
    config.eval.best = "heldout/gain"
    if not lora:
        config.lora, config.optim.lr = None, 3e-4
    config.steps, config.checkpoint.every, config.eval.every = 4, 2, 2
    sft.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")

    def killed(*arguments):
        if len(runs.training_rows(config.output)) == 3:
            raise RuntimeError("killed")
        return optimise(*arguments)

    optimise = sft.optimise
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(sft, "optimise", killed)
        sft.train(config)
    assert [row["step"] for row in runs.rows(config.output)] == [0, 1, 2, 2, 3]
    torch.manual_seed(99)
    np.random.seed(99)
    sft.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.step == b.step == 4
    assert a.tensors.keys() == {"adapter" if lora else "weights", "optimizer"} | ({"live"} if ema else set())
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert a.state["counters"] == b.state["counters"] and a.state["images"] == b.state["images"]
    assert runs.untimed(whole) == runs.untimed(config.output)
    summaries = [json.loads((Path(run) / "summary.json").read_text()) for run in (whole, config.output)]
    for name in ("before", "after", "images", "steps", "best"):
        assert summaries[0][name] == summaries[1][name]
    assert table(whole) == table(config.output)


def test_two_processes_train_as_one(command, config, tmp_path):
    """Five images an update and seven held-out ones, of two sizes; each set of processes has a cache of its own."""
    config.images.train = str(runs.captioned(tmp_path / "many", 70, (32, 32), (24, 40)))  # two shards
    config.batch, config.micro_batch, config.images.measured = 5, 2, 7
    config.optim.ema, config.rewards, config.images.drop_caption, made = 0.5, [], 0.3, []
    for processes in (1, 2):
        config.images.cache, config.output = str(tmp_path / f"cache-{processes}"), str(tmp_path / f"run-{processes}")
        result = command("sft", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stderr.count("step 2/2") == 1  # one process tells of all
        made.append(Path(config.output))
    first, second = (runs.untimed(run) for run in made)
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
    a, b = (checkpoint.load_latest(run / "checkpoints") for run in made)
    assert a is not None and b is not None and a.step == b.step == 2
    for name in ("adapter", "live"):
        trained, again = (runs.flat(saved.tensors[name]) for saved in (a, b))
        assert (trained - again).norm() < 1e-3 * trained.norm()
    caches = [tmp_path / "cache-1", tmp_path / "cache-2"]
    names = [sorted(file.relative_to(cache) for file in cache.rglob("*.*")) for cache in caches]
    assert names[0] == names[1] and len(names[0]) == 3
    assert all((caches[0] / name).read_bytes() == (caches[1] / name).read_bytes() for name in names[0])
    assert table(made[0]) == table(made[1])


def test_fsdp2_equals_one_process(command, config, tmp_path):
    """All weights, in float32, divided over two processes."""
    config.lora, config.optim.lr, config.rewards = None, 3e-4, []
    config.images.measured = 4
    trained = []
    for processes, environment in ((1, {}), (2, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})):
        config.output = str(tmp_path / f"run-{processes}")
        path = runs.recipe(config, tmp_path / "recipe.yaml")
        result = command("sft", "--config", path, processes=processes, **environment)
        assert result.returncode == 0, result.stderr[-3000:]
        trained.append(runs.latest(config.output))
    one, two = (saved.tensors["weights"] for saved in trained)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-5)
    rows = [runs.untimed(tmp_path / f"run-{processes}") for processes in (1, 2)]
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_what_is_exported_is_what_was_evaluated(config, tmp_path):
    """Of the base with the exported LoRA, the held-out loss is the last that the run measured."""
    config.optim.ema = 0.6
    sft.train(config)
    *_, last = evaluations(config.output)
    export(ExportConfig(source=config.output, output=str(tmp_path / "out")))
    k2, procs = K2.load(tmp_path / "out"), Processes()
    images = encode_images(k2, ImageSet(config.images), config.images, procs)
    base = sft.HeldOut(k2, images, 5, config.eval.seed, procs, 4)
    figures, _ = base()
    assert figures["heldout/loss"] == pytest.approx(last["eval/heldout/loss"], rel=1e-5)
    assert figures["heldout/gain"] == 0
    policy = load_checkpoint(runs.latest(config.output))
    with policy.role("policy"):
        figures, _ = sft.HeldOut(policy, images, 5, config.eval.seed, procs, 4)()
    assert figures["heldout/loss"] == pytest.approx(last["eval/heldout/loss"], rel=1e-5)


def test_from_an_earlier_run(config, tmp_path, model):
    """Its policy is the start: no drift and no gain before the first step."""
    first = runs.trained(tmp_path, model)
    config.model.start, config.output = str(first), str(tmp_path / "second")
    sft.train(config)
    before, after = evaluations(config.output)
    assert before["eval/heldout/drift"] == before["eval/heldout/gain"] == 0 < after["eval/heldout/drift"]
    assert len(runs.latest(config.output).state["origin"]["merged"]) == 1


def test_an_adapter_that_is_continued_is_compared_with_the_model_below_it(config, tmp_path, model):
    """In a resumed run too: its base is not what the run began with."""
    config.model.start, config.model.start_as = str(runs.trained(tmp_path, model)), "continue"
    config.eval.every, config.checkpoint.every, made = 1, 1, []
    for name, steps in (("whole", [2]), ("parts", [1, 2])):
        config.output = str(tmp_path / name)
        for i, config.steps in enumerate(steps):
            sft.train(config, resume=i > 0)
        rows = evaluations(config.output)
        assert rows[0]["eval/heldout/drift"] > 0
        made.append({row["step"]: row["eval/heldout/drift"] for row in rows})
    assert made[0] == made[1] and made[0].keys() == {0, 1, 2}
    origins = [runs.latest(tmp_path / name).state["origin"] for name in ("whole", "parts")]
    assert origins[0] == origins[1] and "continued" in origins[0]


def test_sigterm_saves_and_ends(config, monkeypatch):
    def optimise(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    original = sft.optimise
    monkeypatch.setattr(sft, "optimise", optimise)
    sft.train(config)
    assert runs.latest(config.output).step == 1 and (Path(config.output) / "report.html").is_file()


def test_a_rising_loss_ends_the_run_at_its_best(config, tmp_path):
    """Three evaluations above the best one: it learns pure noise alone, and spoils the rest. The best is handed on."""
    config.steps, config.eval.every, config.optim.lr, config.shift = 30, 1, 0.3, 12.0
    config.eval.best, config.eval.stop.metric, config.eval.stop.better = "heldout/gain", "heldout/loss", "lower"
    config.eval.stop.drop, config.eval.stop.patience = 0.005, 3
    assert cli.main(["sft", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 0
    summary = json.loads((Path(config.output) / "summary.json").read_text())
    assert summary["stopped"].startswith("eval.stop: heldout/loss rose from ") and summary["steps"] < 30
    assert summary["best"]["step"] == summary["steps"] - 3


# ---- Turbo ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory, model):
    """A run of tdm of four steps on the same base."""
    made = runs.tdm_config(tmp_path_factory.mktemp("student"), model)
    made.eval.groups = 0
    tdm.train(made)
    return Path(made.output)


@pytest.mark.parametrize("kind", ["run", "lora"])
def test_previews_on_turbo(config, student, tmp_path, kind, monkeypatch):
    """The images are those of the student's own pipeline with what was trained beside it, at its steps and shift."""
    config.turbo = str(student)
    if kind == "lora":
        config.turbo, config.turbo_steps = str(tmp_path / "turbo.safetensors"), 4
        export(ExportConfig(source=str(student), output=config.turbo, format="lora"))
    sft.train(config)
    run = Path(config.output)
    runs.assert_metrics_are_defined(run, "brightness")
    assert {"step-000000.png", "turbo-step-000000.png", "turbo-step-000002.png"} <= {
        path.name for path in (run / "grids").iterdir()
    }
    after = json.loads((run / "summary.json").read_text())["after"]
    assert after["image/brightness@turbo"] != after["image/brightness"]

    # By another way: the distilled pipeline, exported, on which the trained adapter is put.
    export(ExportConfig(source=str(student), output=str(tmp_path / "turbo")))
    k2 = K2.load(tmp_path / "turbo")
    k2.add_role("tuned", config.lora.rank, config.lora.alpha, seed=3)
    k2.load_role_state_dict("tuned", runs.latest(run).tensors["adapter"])
    records = [sft.PromptRecord(prompt) for prompt in tiny.PROMPTS[2:]]
    settings = sft.SamplingSettings(4, 0.0, None, "@turbo")  # None: the pipeline's own shift, 1.15
    evaluator = sft.Evaluator(k2, records, [], config.eval, (32, 32), 4, 64, Processes(), [settings])
    with k2.role("tuned"):
        drawn = evaluator()
    for name in metric_names.LOOK:
        assert drawn.metrics[f"{name}@turbo"] == pytest.approx(after[f"{name}@turbo"], rel=1e-3), name


def test_what_is_no_turbo(config, student, tmp_path, model, monkeypatch):
    """The first ones are refused before the model is read."""
    other = tiny.save(tmp_path / "other", seed=5)
    made = runs.tdm_config(tmp_path, model)
    made.output, made.lora, made.optim.lr, made.steps = str(tmp_path / "full"), None, 1e-5, 2
    tdm.train(made)
    full = made.output
    for turbo, says in (
        (runs.trained(tmp_path, model), r"turbo: .* is no student of posttrain tdm; give one, or a LoRA"),
        (model, "turbo: .* is a whole pipeline, which would take the memory of a second model; give a run of"),
    ):
        config.turbo, config.output = str(turbo), str(tmp_path / "new")
        with monkeypatch.context() as patch, pytest.raises(UserError, match=says):
            patch.setattr(sft, "load_model", lambda *_: pytest.fail("the model is read"))
            sft.train(config)
    for turbo, says in (
        (full, r"turbo: .* has no adapter, all weights were trained, and previews need an adapter; give another"),
        (tmp_path / "none", "none: holds no whole checkpoint"),
        (tmp_path / "none.safetensors", r"none\.safetensors: no such file"),
    ):
        config.turbo, config.output = str(turbo), str(tmp_path / "new")
        with pytest.raises(UserError, match=says):
            sft.train(config)
    config.turbo, config.model.path = str(student), str(other)
    with pytest.raises(UserError, match=r"turbo: .* was trained on another model than model\.path"):
        sft.train(config)


def test_prompts_are_held_out_captions_where_none_are_named(config):
    config.heldout, config.eval.prompts, config.rewards = None, 3, []
    sft.train(config)
    shown = json.loads((Path(config.output) / "samples/prompts.json").read_text())
    held = [Path(row["image"]).with_suffix(".txt").read_text() for row in table(config.output)
            if row["use"] == "held out"]  # fmt: skip
    assert [row["prompt"] for row in shown] == list(dict.fromkeys(held))[:3]


@pytest.mark.parametrize("name", ["nano/sft", "k2/sft", "k2/sft_full"])
def test_recipes_are_valid(name, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    config, _ = load_config("sft", ["--config", f"recipes/{name}.yaml"])
    assert config.output == f"runs/{name.replace('/', '-').replace('_', '-')}"
    assert (config.lora is None) == (name == "k2/sft_full")
    assert config.metric_names() and not math.isnan(config.shift)
