"""GDPO of the expander with TRL's own trainer: advantages, runs, resuming, and what is refused."""

import json
import shutil
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from posttrain import cli
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.expander import callbacks, gdpo
from posttrain.expander.gdpo_config import AblationConfig, ExpanderGDPOConfig
from posttrain.expander.model import Expander
from posttrain.expander.renderer import K2Renderer
from posttrain.training import advantages, checkpoint
from posttrain.training.stepper import MAX_SKIPPED
from rewards.base import RewardSpec
from tests.helpers import chat, expander_runs, runs
from tests.helpers.expander_runs import plain_files
from tests.helpers.gullible import GULLED, RAISED
from tests.helpers.images_server import ImagesServer
from tests.helpers.settings import validate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, model):
    return expander_runs.parts(tmp_path_factory.mktemp("parts"), model)


@pytest.fixture
def config(tmp_path, parts) -> ExpanderGDPOConfig:
    return expander_runs.config(tmp_path, parts)


class Watched(gdpo.Trainer):
    """TRL's trainer, whose rewards and advantages stay to be looked at."""

    batches: ClassVar[list[tuple[dict, list]]] = []

    def log(self, logs, start_time=None):
        kept = {name: list(values) for name, values in self._logs["rewards"].items()}
        self.batches.append((kept, list(self._logs["advantages"])))
        super().log(logs, start_time)


# ---- a run


def test_a_run_equals_what_it_should(config, parts, monkeypatch, capsys):
    """TRL's advantages are those of advantages.gdpo for the same rewards; the run directory has what it should."""
    monkeypatch.setattr(gdpo, "Trainer", Watched)
    gdpo.train(config)
    names = ["brightness", "redness", "diversity"]
    missing = 0
    for kept, told in Watched.batches[:2]:
        batch = torch.tensor([kept[name] for name in names]).double().T.reshape(2, 4, 3)
        valid = ~batch.isnan()
        missing += int((~valid).sum())
        expected = advantages.gdpo(batch.nan_to_num(), valid, torch.tensor([1.0, 0.5, 0.3]))
        assert torch.allclose(torch.tensor(told).double().view(2, 4), expected, atol=2e-3)  # TRL's arithmetic is fp32
        assert expected.abs().max() > 0.5
    assert missing in (4, 8, 12)  # whole groups whose prompt names no red

    run = runs.Path(config.output)
    steps = [row for row in runs.rows(run) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    runs.assert_metrics_are_defined(run, *names)
    for row in steps:
        assert row["diversity_weight"] == pytest.approx(0.3)
        assert row["renders"] <= 8 and row["format"] >= 0.5
        assert {f"flat/{name}" for name in names} <= row.keys()
        assert all(row[f"seconds/{part}"] > 0 for part in ("generate", "render", "score", "train"))
    assert "step 2: generate" in capsys.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"].keys() == summary["after"].keys() >= {"brightness", "diversity", "text/distinct2", "safe"}
    assert "ablation" not in summary
    weights = load_file(run / "adapter/adapter_model.safetensors")
    assert any("lora_B" in key and value.abs().max() > 0 for key, value in weights.items())
    assert "library_name: peft" in (run / "adapter/README.md").read_text()
    assert Expander.load(str(run), dtype=torch.float32).expand(["a red circle"], 2, max_tokens=24)
    page = (run / "report.html").read_text()
    assert page.count('class="tiles"') == 4 and "a fox in the snow" not in page  # two prompts, before and after


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(config, done, no_pickle):
    """Adapter and metrics are the same bit for bit, on one process: TRL saves the generators that it samples with.
    Four prompts are two steps, so it is resumed within the first epoch, at its end, and within the second."""
    config.steps, config.checkpoint.keep = 4, 4
    gdpo.train(config)
    first = runs.Path(config.output)
    whole = load_file(first / "adapter/adapter_model.safetensors")
    rows = runs.untimed(first)
    plain_files(first / f"checkpoints/checkpoint-{done}")
    for step in range(done + 1, 5):
        shutil.rmtree(first / "checkpoints" / f"checkpoint-{step}")
    shutil.rmtree(first / "adapter")
    # What a process leaves that is killed while it saves: a checkpoint without its last file.
    torn = first / f"checkpoints/checkpoint-{done + 1}"
    shutil.copytree(first / f"checkpoints/checkpoint-{done}", torn)
    (torn / "trainer_state.json").unlink()
    gdpo.train(config, resume=True)
    runs.assert_equal(load_file(first / "adapter/adapter_model.safetensors"), whole)
    # One that was killed after its last checkpoint has its adapter from there.
    shutil.rmtree(first / "adapter")
    gdpo.train(config, resume=True)
    runs.assert_equal(load_file(first / "adapter/adapter_model.safetensors"), whole)
    again = runs.untimed(first)
    left_out = ("num_tokens",)  # TRL counts them from where it resumes
    assert [{k: v for k, v in r.items() if k not in left_out} for r in again] == [
        {k: v for k, v in r.items() if k not in left_out} for r in rows
    ]


def test_what_an_order_to_the_judge_is_worth_is_measured_before_the_first_step(config, capsys):
    config.rewards.append(RewardSpec("gulled", GULLED))
    config.steps = 1
    gdpo.train(config)
    logged = [row for row in runs.rows(config.output) if "injection/image/gulled" in row]
    assert [row["step"] for row in logged] == [0]
    assert logged[0]["injection/image/gulled"] == pytest.approx(RAISED) and logged[0]["repeatability/gullible"] == 0
    kept = json.loads((runs.Path(config.output) / "evaluations.json").read_text())
    assert kept[0]["noise"] == {"noise/gulled": 0}  # from which a run that goes on has it
    (row,) = (row for row in runs.rows(config.output) if "loss" in row)
    assert row["noise_share"] == 0 and row["flat/gulled"] > 0
    warning = "reward gulled: text that tells the judge what to answer raises it in an image by 0.70"
    assert warning in capsys.readouterr().err


def test_a_run_that_is_told_to_stop_saves_and_goes_on(config, monkeypatch, tmp_path):
    import os
    import signal

    config.steps, config.checkpoint.every = 3, 0
    say = callbacks.log.info

    def stop_after_one(message):
        say(message)
        if message.startswith("step 1:"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.log, "info", stop_after_one)
        gdpo.train(config)
    run = runs.Path(config.output)
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert (run / "checkpoints/checkpoint-1/trainer_state.json").is_file()
    with pytest.raises(UserError, match=r"cannot be resumed with lora\.rank 4 -> 8"):
        gdpo.train(replace(config, lora=replace(config.lora, rank=8)), resume=True)
    other = chat.save(tmp_path / "other", steps=1)
    with pytest.raises(UserError, match=r"model\.path: .*other has other weights than what .*checkpoint-1"):
        gdpo.train(replace(config, model=replace(config.model, path=str(other))), resume=True)
    gdpo.train(config, resume=True)
    assert [row["step"] for row in runs.rows(run) if "loss" in row] == [1, 2, 3]


def test_a_run_can_go_on_from_another_with_its_adapter_as_the_reference(config, tmp_path):
    """As after the supervised step: the same adapter is trained on, and a KL of 0 at the start is to it."""
    config.steps = 1
    gdpo.train(config)
    first = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    config.model.path, config.output, config.optim.kl = config.output, str(tmp_path / "second"), 0.1
    gdpo.train(config)
    [row] = [row for row in runs.rows(tmp_path / "second") if "loss" in row]
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    second = load_file(tmp_path / "second/adapter/adapter_model.safetensors")
    assert second.keys() == first.keys() and any(not second[key].equal(first[key]) for key in first)


def test_a_mistake_ends_the_command_in_one_line(config, tmp_path, capsys):
    config.safety[1].function = "tests.helpers.expander_runs:unreachable"
    assert cli.main(["expander", "gdpo", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 2
    assert "posttrain: error: safety picture: cannot be checked: ConnectionError" in capsys.readouterr().err


def test_an_endpoint_can_render_a_run(config, parts):
    local = K2Renderer(config.renderer, torch.device("cpu"))

    def draw(body):
        return local([body["prompt"]], [body["seed"]]).images[0]

    config.steps = 1
    with ImagesServer(draw) as server:
        config.renderer.urls = [server.url]
        gdpo.train(config)
    [row] = [row for row in runs.rows(config.output) if "loss" in row]
    assert row["missing_images"] == 0 and row["renders"] <= len(server.requests)
    assert len({b["seed"] for b in server.requests}) == 2 + 2  # a noise for each held-out prompt and each group


def test_an_ablation_is_marked_and_anneals(config, capsys):
    config.ablation = AblationConfig("annealed")
    config.steps = 4
    gdpo.train(config)
    weights = [row["diversity_weight"] for row in runs.rows(config.output) if "loss" in row]
    assert weights == pytest.approx([0.3, 0.15, 0.0, 0.0])
    summary = json.loads((runs.Path(config.output) / "summary.json").read_text())
    assert summary["ablation"] == "annealed" and "ABLATION" in capsys.readouterr().err


def test_the_weight_may_not_change_in_a_run(config, monkeypatch):
    def tampered(self, *args, **kwargs):
        if self.trainer.state.global_step == 1:
            self.trainer.reward_weights[-1] = 0.1
        return begin(self, *args, **kwargs)

    begin = callbacks.GDPOCallback.on_step_begin
    monkeypatch.setattr(callbacks.GDPOCallback, "on_step_begin", tampered)
    with pytest.raises(RuntimeError, match=r"the weight of diversity is 0\.1.*, not 0\.3"):
        gdpo.train(config)


def test_gradients_that_are_not_finite_are_left_out_and_then_end_the_run(config, tmp_path):
    callback = callbacks.GDPOCallback.__new__(callbacks.GDPOCallback)
    callback.config, callback.history = config, {"skipped": 0, "skipped_in_a_row": 0}
    model = torch.nn.Linear(2, 1)
    for i in range(MAX_SKIPPED - 1):
        model(torch.full((1, 2), torch.inf)).sum().backward()
        callback.on_pre_optimizer_step(None, None, None, model=model)
        assert model.weight.grad is None and callback.history["skipped"] == i + 1
    model(torch.ones(1, 2)).sum().backward()
    callback.on_pre_optimizer_step(None, None, None, model=model)
    assert model.weight.grad is not None and callback.history["skipped_in_a_row"] == 0
    callback.history["skipped_in_a_row"] = MAX_SKIPPED - 1
    model.weight.grad.fill_(torch.nan)
    with pytest.raises(UserError, match=r"optim\.lr: 10 gradients in a row"):
        callback.on_pre_optimizer_step(None, None, None, model=model)


def test_steps_that_teach_nothing_end_the_run(config, monkeypatch):
    """Where every expansion fails the format, all of a group get the worst score."""
    monkeypatch.setattr("posttrain.expander.score.causes", lambda *_: ["empty"])
    config.idle_steps = 1
    with pytest.raises(UserError, match="idle_steps: nothing could be learnt from 1 step in a row: the expansions of"):
        gdpo.train(config)


def test_a_resumed_run_counts_on(config, monkeypatch):
    """Idle steps and skipped gradients before the checkpoint count as in a run that was not interrupted."""
    monkeypatch.setattr("posttrain.expander.score.causes", lambda *_: ["empty"])
    config.steps = 2
    gdpo.train(config)
    last = runs.Path(config.output) / "checkpoints/checkpoint-2"
    history = json.loads((last / callbacks.HISTORY).read_text())
    assert history["idle_steps"] == 2 and history["skipped"] == 0
    (last / callbacks.HISTORY).write_text(json.dumps(history | {"skipped": 1}))
    checkpoint.seal(last)
    config.steps, config.idle_steps = 5, 3
    with pytest.raises(UserError, match="idle_steps: nothing could be learnt from 3 steps in a row: the expansions of"):
        gdpo.train(config, resume=True)
    config.idle_steps = 0
    gdpo.train(config, resume=True)
    assert [row["skipped"] for row in runs.rows(config.output) if "loss" in row] == [0, 0, 1, 1, 1]


@pytest.mark.long
def test_processes_share_an_evaluation(config, command, tmp_path):
    """Three prompts on two processes: texts, images and figures of one process, within rounding; none does it all."""
    heldout = "".join(json.dumps({"prompt": user}) + "\n" for user in chat.USERS[:3])
    runs.Path(config.prompts.heldout).write_text(heldout)
    config.steps, config.eval.prompts, config.eval.shown = 1, 3, 3
    made = []
    for processes in (1, 2):
        config.output = str(tmp_path / f"run-{processes}")
        path = runs.recipe(config, tmp_path / "recipe.yaml")
        result = command("expander", "gdpo", "--config", path, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        made.append(runs.Path(config.output))
    one, two = (json.loads((run / "evaluations.json").read_text())[0]["figures"] for run in made)
    assert one.keys() == two.keys() and one["text/spread"] is not None
    for name, value in one.items():
        assert two[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name
    first, second = (json.loads((run / "groups/step-000000/groups.json").read_text()) for run in made)
    assert first == second and len(first) == 3
    files = sorted(file.name for file in (made[0] / "groups/step-000000").glob("*.png"))
    assert len(files) >= 6 and files == sorted(f.name for f in (made[1] / "groups/step-000000").glob("*.png"))
    for name in files:
        same = [np.asarray(Image.open(run / "groups/step-000000" / name), int) for run in made]
        assert np.abs(same[0] - same[1]).max() <= 1


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (lambda c: setattr(c.diversity, "weight", [0.3, 0.0]), "diversity.weight", "a schedule, but .* stays constant"),
        (lambda c: setattr(c.diversity, "weight", 0.0), "diversity.weight", "stays constant for the whole run"),
        (lambda c: setattr(c.groups, "group_size", 2), "groups.group_size", "use 3 or more"),
        (lambda c: c.safety.pop(0), "safety", "no check with sees: text"),
        (lambda c: c.safety.pop(1), "safety", "no check with sees: image"),
        (lambda c: setattr(c.safety[0], "threshold", 0.0), r"safety\[0\].threshold", "above 0"),
        (lambda c: setattr(c.rewards[0], "gate", "multiply"), r"rewards\[0\].gate", "under safety"),
        (lambda c: setattr(c.rewards[0], "group", True), r"rewards\[0\].group", "diversity alone"),
        (lambda c: setattr(c.rewards[0], "name", "diversity"), r"rewards\[0\].name", "measured in every run"),
        (lambda c: c.worst.update(brightness=0.5), "worst", "cannot fall below 0"),
        (lambda c: c.worst.update(nothing=-1.0), "worst", "is not a reward that is trained on"),
        (lambda c: setattr(c.groups, "micro_batch", 3), "groups.micro_batch", "divisor of the step's 8"),
        (lambda c: c.generation.vllm.update(mode="colocate"), "generation.vllm", "no effect"),
    ],
)
def test_settings_that_cannot_be(config, change, field, message):
    validate(config)
    change(config)
    with pytest.raises(ConfigError, match=message) as raised:
        validate(config)
    import re

    assert re.fullmatch(field, raised.value.field)


def test_an_unknown_setting_of_vllm_is_named(config):
    config.generation.use_vllm, config.generation.vllm = True, {"memory": 0.3}
    with pytest.raises(UserError, match=r"generation\.vllm: .*vllm_memory"):
        gdpo.settings(config, gdpo.Processes())


def test_groups_are_whole_on_each_process(config, monkeypatch):
    monkeypatch.setattr(
        gdpo.Processes, "__init__", lambda self: setattr(self, "size", 3) or setattr(self, "main", False)
    )
    with pytest.raises(UserError, match=r"groups.prompts_per_step: 2 is not divisible by 3 processes"):
        gdpo.train(config)
