"""GRPO on a tiny real K2: whole runs."""

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.training import image_metrics as figures_of
from rewards import noise
from rewards.base import Noise, RewardSpec
from tests.helpers import runs, tiny
from tests.helpers.gullible import GULLED, Gullible

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
    runs.assert_metrics_are_defined(run, "brightness")
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
    begun = summary["startup"]
    parts = {"inputs", "read", "verify", "servers", "prepare", "evaluation", "first_step"}
    assert parts <= set(begun) and begun["compile"] <= begun["first_step"]
    summed = sum(seconds for part, seconds in begun.items() if part not in ("total", "compile"))
    assert begun["total"] == pytest.approx(summed, abs=0.1)
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
    config.rewards = [RewardSpec("light", "tests.helpers.runs:brightness", scale=sign)]
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
        assert row["log_ratio_std"] > 1e-5  # in the second pass the policy has moved


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


def test_all_weights_are_trained(config, trained):
    """Where `lora` is null: all but the text fusion's. The KL is to the weights as they were, so 0 at first."""
    config.lora, config.optim.lr, config.loss.kl = None, 3e-4, 0.1
    grpo.train(config)
    first, second = runs.training_rows(config.output)
    assert first["kl"] < 1e-12 < second["kl"]  # at first they differ by rounding alone
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


def test_flat_rewards_move_nothing(config, tmp_path, model, trained):
    config = runs.config(tmp_path, model, "constant")
    config.loss.kl = 0
    grpo.train(config)
    for row in runs.training_rows(config.output):
        assert (row["flat_groups"], row["advantage"], row["grad_norm"], row["reward"]) == (1, 0, 0, 0.5)
    fresh = K2.load(model)
    fresh.add_role("policy", 4, 8.0, seed=config.seed)
    runs.assert_equal(runs.latest(config.output).tensors["adapter"], fresh.role_state_dict("policy"))


def test_noise_of_judges_is_measured_once_and_kept(config, monkeypatch):
    """A run that goes on has it from its checkpoint; its judge is not asked again."""
    asked, given = [], []

    async def wandering(self, encoded, text):
        asked.append(text)
        return 0.5 + 0.002 * (len(asked) % 2)

    def noise_of(*arguments):
        given.append(noise.noise_of(*arguments))
        return given[-1]

    monkeypatch.setattr(Gullible, "_p_yes", wandering)
    monkeypatch.setattr(grpo, "noise_of", noise_of)
    config.rewards.append(RewardSpec("gulled", GULLED))
    grpo.train(config)
    assert runs.rows(config.output)[1]["noise/gulled"] == pytest.approx(0.002)
    for row in runs.training_rows(config.output):
        assert row["noise_share"] == 0  # the judge's scores lie within its floor, and the other reward has no noise
    config.steps = 3
    grpo.train(config, resume=True)
    assert given[0] == given[1] and given[0]["brightness"] == Noise(0, 0)
    assert astuple(given[0]["gulled"]) == pytest.approx((0.002, 0.01))


def test_a_reward_that_compares_a_group(config):
    """Evaluation shows it the groups that it draws; without any it is not measured."""
    config.rewards = [RewardSpec("far", "tests.helpers.runs:contrast", group=True)]
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
    steps = [row for row in runs.rows(config.output) if "missing" in row]
    counts = [{k: v for k, v in row.items() if k.startswith("pool/")} for row in steps]
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
    with pytest.raises(UserError, match="not one image of 2 steps could be scored: all None"):
        grpo.train(config)
    assert runs.rows(config.output)[0]["eval/nothing"] is None


@pytest.mark.parametrize("prompt", [" ".join(tiny.PROMPTS), "🦊🌲🌙🦊🌲🌙"])
def test_long_prompts_are_cut_with_a_warning(config, capsys, prompt, model):
    """max_tokens counts the five of the template's end."""
    config.steps, config.prompts.max_tokens = 1, 16
    Path(config.prompts.train).write_text(json.dumps({"prompt": prompt}) + '\n{"prompt": "a fox"}\n')
    Path(config.prompts.heldout).write_text('{"prompt": "a red circle"}\n')
    grpo.train(config)
    cut = len(tiny.tokenizer()(prompt)["input_ids"]) - (16 - 5)
    assert cut > 3
    message = f"warning: longer than prompts.max_tokens (16): 1 prompt, of which up to {cut} tokens are cut"
    assert message in capsys.readouterr().err
    Path(config.prompts.train).write_text('{"prompt": "a fox"}\n')
    grpo.train(config, resume=True)
    assert "tokens are cut" not in capsys.readouterr().err
