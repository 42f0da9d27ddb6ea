"""The preflight on a tiny real K2: a sound recipe passes, and each planted fault fails in its own row and no other."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from posttrain import cli
from posttrain.export import export
from posttrain.grpo import losses
from posttrain.grpo import train as grpo
from posttrain.grpo.config import RolloutConfig
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.preflight import grpo as preflight_grpo
from posttrain.preflight.grpo import GRPOChecks
from posttrain.training import advantages
from posttrain.training.stepper import Stepper
from rewards.base import Failure, RewardSpec
from rewards.serve import ServerSpec
from tests.helpers import runs, tiny

ROWS = [
    "adapter", "judges", "evaluation", "images differ", "missing scores", "spread of brightness", "planted failure",
    "policy gradient", "ratio is 1", "policy moves", "KL gradient", "memory", "step", "run", "export",
]  # fmt: skip


def broken(images, prompts):
    raise RuntimeError("no such weights")


def unsteady(images, prompts):
    scores = runs.brightness(images, prompts)
    return [Failure("the lights went out") if i % 2 else score for i, score in enumerate(scores)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    PartialState(cpu=True)
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture
def config(tmp_path, model, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return runs.config(tmp_path, model)


@pytest.fixture
def check(config, tmp_path, capsys):
    """Runs the command: its exit code, and result and text by row."""

    def run(code: int) -> dict[str, tuple[str, str]]:
        capsys.readouterr()
        assert cli.main(["preflight", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == code
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 120
        assert not Path(config.output).exists() and not list((tmp_path / "tmp").iterdir())
        return table(out)

    return run


def table(out: str) -> dict[str, tuple[str, str]]:
    """Of each row its result, and measured and remedy as one text; a cell may go on in the lines below."""
    lines = out.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith(" ──"))
    starts = [lines[rule - 1].find(title) for title in ("measured", "remedy")]
    starts = [start for start in starts if start > 0]
    rows: dict[str, tuple[str, list[str]]] = {}
    cells: list[str] = []
    for line in filter(str.strip, lines[rule + 1 :]):
        if line[: starts[0]].strip():
            name, result = line[: starts[0]].rsplit(maxsplit=1)
            rows[name.strip()] = result, (cells := [""] * len(starts))
        for i, (start, end) in enumerate(zip(starts, [*starts[1:], None])):
            cells[i] += line[start:end].strip() + " "
    return {name: (result, " | ".join(map(str.strip, cells)).strip(" |")) for name, (result, cells) in rows.items()}


def failed(rows: dict[str, tuple[str, str]]) -> list[str]:
    return [name for name, (result, _) in rows.items() if result == "FAIL"]


def test_sound_recipe(config, check):
    config.eval.groups, config.eval.group_size, config.eval.guidance, config.steps = 2, 3, [0.0, 1.5], 7
    config.eval.every, config.pool.kind = 3, "adaptive"
    rows = check(0)
    assert list(rows) == ROWS
    results = {name: result for name, (result, _) in rows.items()}
    assert results == dict.fromkeys(ROWS, "pass") | {"judges": "skipped"}
    for name, says in {
        "adapter": "24 layers adapted in 3 blocks, 8 are named for each; 0.0323 M weights",
        "evaluation": "10 images of 2 steps in",  # two prompts and a group of three, with and without guidance
        "images differ": "8 of 8 images different",
        "missing scores": "0 of 8 scores failed, 0 images without any",
        "spread of brightness": "0 of 2 groups flat",
        "policy moves": "24 of 24 B factors changed",
        "step": "s for 8 images (sample",
        "run": "56 images: 7 steps and 4 evaluations of",  # before the first step, after 3, 6 and 7
        "memory": "GiB of RAM",
    }.items():
        assert says in rows[name][1]
    assert "bit-identical" in rows["policy moves"][1]


def test_a_recipe_that_draws_ahead(config, check):
    """Each part is timed by itself, and what is hidden is not part of a step."""
    config.rollout.ahead, config.loss.max_weight = 1, 1.001
    rows = check(0)
    assert list(rows) == ROWS and "max |ratio - 1| is" in rows["ratio is 1"][1]
    assert "score 0.0, optimise" in rows["step"][1]


@pytest.mark.parametrize(
    ("gpus", "seconds", "expected"),
    [
        (0, (3.0, 4.0, 2.0), (3.0, 0.0, 2.0)),  # 4 s of judging are hidden by 2 of training and 3 of drawing
        (0, (3.0, 7.0, 2.0), (3.0, 2.0, 2.0)),
        (1, (3.0, 4.0, 2.0), (2.0, 4.0, 4.0)),  # one draws for 6 s while one trains for 4, then the judges are awaited
        (1, (1.0, 4.0, 2.0), (0.0, 2.0, 4.0)),  # one draws for 2 s, then 2 of judging are hidden
    ],
)
def test_seconds_that_are_hidden(gpus, seconds, expected):
    parts = ("sample", "score", "optimise")
    checks = GRPOChecks.__new__(GRPOChecks)
    checks.rollout, checks.seconds = RolloutConfig(ahead=1, gpus=gpus), dict(zip(parts, seconds))
    checks.procs = SimpleNamespace(size=2)  # type: ignore[assignment]
    assert checks.parts() == parts and tuple(checks.seconds.values()) == expected


@pytest.mark.parametrize(("lora", "lr"), [(True, 1e-5), (False, 1e-6)])
def test_small_updates_in_bf16(config, check, lora, lr):
    """One of an adapter, or of all weights: it is less than bf16 can tell, and its export is checked all the same."""
    config.model.dtype, config.optim.lr = "bfloat16", lr
    config.lora = config.lora if lora else None
    rows = check(0)
    assert rows["adapter"][1].startswith("24 layers" if lora else "none: 0.779 M weights in 51 tensors are trained")
    assert [rows[name][0] for name in ("ratio is 1", "policy moves", "KL gradient", "export")] == ["pass"] * 4


def test_reward_that_sees_nothing(config, check):
    config.rewards.append(RewardSpec("same", "tests.helpers.runs:constant"))
    rows = check(1)
    assert list(rows) == [*ROWS[:6], "spread of same", *ROWS[6:]]
    assert failed(rows) == ["spread of same"]
    assert "std 0; 2 of 2 groups flat | it teaches nothing: see that it looks" in rows["spread of same"][1]


def test_reward_that_does_not_apply(config, check):
    config.rewards.append(RewardSpec("text", "tests.helpers.runs:nothing"))
    rows = check(0)
    assert rows["spread of text"] == ("skipped", "it has two scores in no group of this step")
    assert "no score from text" in rows["evaluation"][1]
    config.rewards.append(RewardSpec("silent", "tests.helpers.warm:nothing", heldout_only=True))
    config.eval.best = "silent"
    assert failed(check(1)) == ["evaluation"]


def test_reward_that_always_fails(config, check):
    """What does not need scores is checked all the same."""
    config.rewards = [RewardSpec("a", "tests.preflight.test_preflight:broken")]
    rows = check(1)
    assert failed(rows) == ["evaluation", "missing scores"]
    says = "reward a: 4 of the last 4 scores failed (max_failures 0.1 of 256): RuntimeError: no such weights (tests/"
    assert says in rows["missing scores"][1]
    for name in ("reward spread", "planted failure", "run"):
        assert rows[name][0] == "skipped"
    for name in ("images differ", "policy gradient", "ratio is 1", "policy moves", "KL gradient", "export"):
        assert rows[name][0] == "pass"


def test_reward_that_fails_often(config, check):
    config.rewards = [RewardSpec("a", "tests.preflight.test_preflight:unsteady")]
    rows = check(1)
    assert failed(rows) == ["missing scores"]
    assert "4 of 8 scores failed, 4 images without any; a: the lights went out | fix the" in rows["missing scores"][1]
    config.rewards[0].max_failures = 0.5
    assert failed(check(0)) == []


def test_scores_that_a_pool_cannot_use(config, check):
    config.rewards[0].scale, config.pool.kind = 100.0, "adaptive"
    rows = check(1)
    assert failed(rows) == ["missing scores"] and "set its scale and offset" in rows["missing scores"][1]


def test_failures_that_count_as_zero(check, monkeypatch):
    true = advantages.gdpo
    monkeypatch.setattr(advantages, "gdpo", lambda r, valid, weights, **rest: true(r, valid | True, weights, **rest))
    rows = check(1)
    assert failed(rows) == ["planted failure"] and "an image whose brightness failed has advantage -1" in str(rows)


def test_judge_and_server_that_are_not_there(config, check):
    """Rewards that ask no judge are checked all the same, unless no reward can be made for want of a server."""
    judge = {"model": "m", "base_urls": "http://127.0.0.1:1/v1", "deadline": 0.2}
    config.rewards.append(RewardSpec("taste", {"class_path": "rewards.image.Aesthetic", "init_args": {"judge": judge}}))
    rows = check(1)
    assert failed(rows) == ["judge m"] and rows["spread of brightness"][0] == "pass"
    assert "http://127.0.0.1:1/v1: Connection error" in rows["judge m"][1]
    assert "see that its server runs" in rows["judge m"][1]

    config.servers = [ServerSpec("vlm", "/no/such/model", executable="/no/such/vllm")]
    rows = check(1)
    assert failed(rows) == ["judges"] and "make an environment with" in rows["judges"][1]
    assert rows["missing scores"] == ("skipped", "no reward can be asked") and rows["export"][0] == "pass"


def test_seeds_that_are_alike(check, monkeypatch):
    true = sampler.seed_for
    monkeypatch.setattr(sampler, "seed_for", lambda *indices: true(*indices[:3], *indices[4:]))
    rows = check(1)
    # Equal images of one start have gradients that cancel.
    assert failed(rows) == ["images differ", "spread of brightness", "policy gradient"]
    assert "2 of 8 images different; image 1 of group 0 is image 0 of group 0" in rows["images differ"][1]


def test_policy_that_is_not_the_one_that_sampled(check, monkeypatch):
    true = K2.velocity
    monkeypatch.setattr(
        K2, "velocity", lambda *args, **more: true(*args, **more) * (1 + 1e-3 * torch.is_grad_enabled())
    )
    rows = check(1)
    assert failed(rows) == ["ratio is 1"] and "use model.dtype float32" in rows["ratio is 1"][1]


def test_policy_that_does_not_move(config, check):
    """The factors are no longer 0, and yet nothing comes of it."""
    config.optim.lr = 1e-30
    rows = check(1)
    assert failed(rows) == ["policy moves"] and "raise optim.lr" in rows["policy moves"][1]
    assert rows["KL gradient"][0] == rows["export"][0] == "skipped"


def test_reference_that_moves(check, monkeypatch):
    def step(self):
        with torch.no_grad():
            seen[0].transformer.img_in.weight.add_(0.01)
        return true(self)

    true, seen, load = Stepper.step, [], preflight_grpo.load_model
    monkeypatch.setattr(preflight_grpo, "load_model", lambda *args: seen.append(load(*args)) or seen[0])
    monkeypatch.setattr(Stepper, "step", step)
    rows = check(1)
    assert "the reference's changed too" in rows["policy moves"][1]


def test_layers_without_an_adapter(check, monkeypatch):
    def add_policy(k2, *args, **keywords):
        true(k2, *args, **keywords)
        k2._layers.pop()

    true = preflight_grpo.add_policy
    monkeypatch.setattr(preflight_grpo, "add_policy", add_policy)
    rows = check(1)
    assert "adapter" in failed(rows) and "23 layers adapted in 3 blocks" in rows["adapter"][1]


def test_kl_without_a_gradient(check, monkeypatch):
    true = losses.velocity_kl
    monkeypatch.setattr(losses, "velocity_kl", lambda v, reference: true(v.detach(), reference))
    rows = check(1)
    assert failed(rows) == ["KL gradient"] and rows["KL gradient"][1].startswith("norm 0 over")


def test_gradient_that_is_not_finite(check, monkeypatch):
    true = losses.clipped_policy

    def broken(*args, **clips):
        loss_B, metrics = true(*args, **clips)
        return loss_B * float("nan"), metrics

    monkeypatch.setattr(losses, "clipped_policy", broken)
    rows = check(1)
    assert failed(rows) == ["policy gradient", "policy moves"] and rows["policy gradient"][1].startswith("norm nan")


def test_export_at_another_strength(check, monkeypatch):
    """alpha / rank is 2 here; without it the adapter has half its effect."""
    monkeypatch.setattr(export, "scaled_factors", lambda saved: saved.tensors["adapter"])
    rows = check(1)
    assert failed(rows) == ["export"] and "not what was trained" in rows["export"][1]


def test_no_memory_left_and_a_bug(check, monkeypatch):
    def optimise(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore about it.")

    def planted(self):
        raise ZeroDivisionError("here")

    monkeypatch.setattr(grpo, "optimise", optimise)
    monkeypatch.setattr(preflight_grpo.GRPOChecks, "planted", planted)
    rows = check(1)
    assert failed(rows) == ["planted failure", "update"]
    assert "Tried to allocate 20.00 GiB. | lower micro_batch (grpo: groups.micro_batch)" in rows["update"][1]
    assert rows["planted failure"][1].startswith("ZeroDivisionError: here") and rows["policy gradient"][0] == "pass"
    assert rows["run"] == ("skipped", "how long a step takes to optimise is not known")


def test_mistakes_that_leave_nothing_to_check(config, tmp_path, capsys):
    config.prompts.heldout = str(tmp_path / "none.jsonl")
    assert cli.main(["preflight", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "none.jsonl: no such file" in err
