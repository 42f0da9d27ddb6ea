"""One teacher's gradient on a tiny real K2, and teachers as roles: which are refused, and whose a prompt is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from posttrain import cli
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.model import sampler
from posttrain.model.fingerprint import fingerprint
from posttrain.model.k2 import K2
from posttrain.model.roles import Role
from posttrain.mopd import losses, teachers, update
from posttrain.mopd.config import ANCHOR
from posttrain.training.policy import load_model, scaled_factors
from posttrain.training.prompt_source import FusedTexts
from prompts.records import PromptRecord, read_prompts
from tests.helpers import runs, tiny


@pytest.fixture
def config(tmp_path, model):
    return runs.mopd_config(tmp_path, model)


class Step:
    """A student, its teachers, and the gradient of one of them."""

    def __init__(self, config):
        self.config, self.k2 = config, load_model(config.model, "cpu")
        teachers.add_roles(self.k2, config)
        self.parameters = self.k2.train_role("policy")
        self.teachers = {t.name: t for t in teachers.routed(config, read_prompts(config.prompts.train))}
        self.texts, self.null = FusedTexts(self.k2, 64), self.k2.text([""])

    def learn(self, name: str, micro_batch: int = 4, step: int = 1):
        """The flat gradient, and sums of metrics."""
        sums: dict[str, float] = {}
        teacher = self.teachers[name]
        weight = losses.row_weight(teacher.images * self.config.sampling.states, 1)
        update.learn(self.k2, self.config, teacher, self.texts, self.null, step, weight, sums, Processes(), micro_batch)
        return update.taken(self.parameters, Processes()), sums


# ---- steps ------------------------------------------------------------------------------------------------


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(config, model):
    """Without guidance exactly 0; with guidance s^2 |c - u|^2. Teachers get no gradient and stay what they are."""
    config.lora.rank, config.lora.alpha, config.lora.targets = 2, 2.0, ["to_q", "to_v"]
    step = Step(config)
    step.k2.load_role_state_dict("policy", step.k2.role_state_dict("teacher_dark"))
    before = {name: fingerprint(step.k2.role_state_dict(f"teacher_{name}")) for name in config.teachers}
    gradient, sums = step.learn("dark")
    assert abs(sums["loss"] - config.loss.reference * sums["kl"] / 4) < 1e-10 and sums["distance/dark"] == 0
    config.loss.reference = 0.0
    gradient, sums = step.learn("dark")
    assert sums["loss"] <= 1e-10 and float(gradient.abs().max()) == 0
    step.k2.load_role_state_dict("policy", step.k2.role_state_dict("teacher_light"))
    gradient, sums = step.learn("light")
    assert gradient.norm() > 0
    config.teachers["light"].guidance = step.teachers["light"].guidance = 3.0
    _, doubled = step.learn("light")
    assert doubled["distance/light"] == pytest.approx(4 * sums["distance/light"], rel=1e-4)
    for name, value in before.items():
        assert fingerprint(step.k2.role_state_dict(f"teacher_{name}")) == value
        assert all(p.grad is None and not p.requires_grad for p in step.k2.role_parameters(f"teacher_{name}"))


@pytest.mark.parametrize("weight", ["velocity", "kl", "mean"])
def test_gradient_of_a_teacher(config, weight):
    """As written out: trajectories of the student, the teacher's guided velocity at some states, and the reference."""
    config.loss.weight, config.loss.reference = weight, 0.2
    config.model.start, config.model.start_as = str(Path(config.output).parent / "dark"), "continue"
    config.lora.targets = ["to_q", "to_k", "to_v"]
    step = Step(config)
    k2, teacher, key = step.k2, step.teachers["light"], (0, 1, sampler.seed_for(*b"light"))
    found, sums = step.learn("light")
    times = sampler.schedule(4, k2.mu(32, 32))
    chosen, weights = update.states(config, key), losses.weights(times, weight, 0.7)
    assert len(chosen) == 2 and (weight != "kl" or 3 not in chosen)
    prompts = {record.prompt for record in teacher.records}
    assert len(prompts) == 2
    total = torch.zeros(())
    for i in range(4):
        record = teacher.records[mopd_prompt(config, teacher, i)]
        text = k2.text([record.prompt], 64)
        x = sampler.noise([sampler.seed_for(*key, i, 0)], (16, 64))
        for k in range(4):
            t, t_next = times[k], times[k + 1]
            with k2.role("policy"):
                v = k2.velocity(x, t, text, 32, 32)
            if k in chosen:
                with torch.no_grad(), k2.role("teacher_light"):
                    c, u = (k2.velocity(x, t, one, 32, 32) for one in (text, step.null))
                with torch.no_grad(), k2.role(None):
                    reference = k2.velocity(x, t, text, 32, 32)
                total = total + weights[k] * (v - (2.5 * c - 1.5 * u)).square().mean() / 8
                total = total + 0.2 * (v - reference).square().mean() / 8
            v = v.detach()
            if weight == "kl" and k < 3:
                mean, std = sampler.sde_moments(x, v, t, t_next, "flow", 0.7, times[1])
                x = mean + std * sampler.noise([sampler.seed_for(*key, i, 1 + k)], (16, 64))
            else:
                x = sampler.ode_step(x, v, t, t_next)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, step.parameters)])
    assert expected.norm() > 0 and (found - expected).norm() < 2e-4 * expected.norm()
    assert sums["loss"] == pytest.approx(float(total.detach()), rel=1e-4)


def mopd_prompt(config, teacher, i: int) -> int:
    return update.in_turn(sampler.seed_for(*teacher.name.encode()) + config.seed, i, len(teacher.records))


def test_gradient_does_not_depend_on_the_micro_batch(config):
    step = Step(config)
    whole, a = step.learn("light")
    parts, b = step.learn("light", micro_batch=3)
    assert (whole - parts).norm() < 1e-4 * whole.norm() and a == pytest.approx(b, rel=1e-4)
    other, _ = step.learn("light", step=2)
    assert (whole - other).norm() > 0.1 * whole.norm()


def test_no_forward_is_made_behind_the_last_state(config, monkeypatch):
    """Of the anchor: one forward a step up to the last chosen state, and one of the reference at each chosen one."""
    step, calls = Step(config), []
    velocity = K2.velocity
    monkeypatch.setattr(K2, "velocity", lambda self, *args: calls.append(self.active) or velocity(self, *args))
    step.learn(ANCHOR)
    chosen = update.states(config, (0, 1, sampler.seed_for(*ANCHOR.encode())))
    assert calls.count("policy") == max(chosen) + 1 and calls.count(None) == len(chosen) == 2


# ---- teachers and prompts ---------------------------------------------------------------------------------


def test_prompts_go_to_their_teacher(config, tmp_path):
    step = Step(config)
    assert {name: len(t.records) for name, t in step.teachers.items()} == {"light": 2, "dark": 2, ANCHOR: 1}
    assert {name: t.images for name, t in step.teachers.items()} == {"light": 4, "dark": 2, ANCHOR: 4}
    both = PromptRecord("a fox", tags=["light", "dark"])
    with pytest.raises(UserError, match=r"teachers: 'a fox' has tags of light and of dark \(light, dark\)"):
        teachers.routed(config, [both])
    with pytest.raises(UserError, match=r"teachers\.dark\.tags: no prompt of prompts\.train has"):
        teachers.routed(config, [PromptRecord("a fox", tags=["light"])])
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a wolf"}) + "\n")
    config.teachers["dark"].prompts, config.anchor = str(tmp_path / "own.jsonl"), 0.0
    found = teachers.routed(config, [PromptRecord("a fox", tags=["light"]), PromptRecord("b")])
    assert [t.name for t in found] == ["light", "dark"] and [r.prompt for r in found[1].records] == ["a wolf"]


def test_a_teacher_that_stands_on_earlier_runs_is_one_role(config, tmp_path, model):
    """Its own adapter and those below it, side by side: its velocity is that of the run itself. What the student
    starts from as well is left to the stack."""
    (tmp_path / "one").mkdir()
    first = runs.config(tmp_path / "one", model)
    first.optim.lr, first.steps = 0.02, 1
    from posttrain.grpo import train as grpo

    grpo.train(first)
    second = runs.nft_config(tmp_path / "one", model)
    second.model.start, second.output, second.optim.lr, second.steps = first.output, str(tmp_path / "two"), 0.02, 1
    from posttrain.nft import train as nft

    nft.train(second)
    whole = load_checkpoint(runs.latest(second.output))
    config.teachers["dark"].run = second.output
    x, text = torch.randn(1, 16, 64), whole.text([tiny.PROMPTS[0]])
    with torch.no_grad(), whole.role("policy"):
        expected = whole.velocity(x, 0.5, text, 32, 32)
    for start, rank in ((None, 8), (first.output, 4)):
        config.model.start = start
        if start:
            config.teachers = {"dark": config.teachers["dark"]}
        k2 = load_model(config.model, "cpu")
        teachers.add_roles(k2, config)
        with torch.no_grad(), k2.role("teacher_dark"):
            torch.testing.assert_close(k2.velocity(x, 0.5, text, 32, 32), expected, rtol=1e-4, atol=1e-5)
        role = k2.roles["teacher_dark"]
        assert isinstance(role, Role) and role.rank == rank
    config.teachers["dark"].run = str(tmp_path / "light")
    with pytest.raises(UserError, match=r"teachers\.dark\.run: .* was not trained on top of model\.start"):
        teachers.add_roles(load_model(config.model, "cpu"), config)


def test_a_student_that_begins_with_a_merge(config, tmp_path):
    """The factors exactly, at another alpha, and further ranks that can learn; the reference stays the base."""
    config.model.start, config.model.start_as = str(tmp_path / "dark"), "continue"
    begun = Step(config)
    x, text = torch.randn(1, 16, 64), begun.k2.text([tiny.PROMPTS[0]])
    with torch.no_grad():
        found = {}
        for role in ("policy", "teacher_dark", None):
            with begun.k2.role(role):
                found[role] = begun.k2.velocity(x, 0.5, text, 32, 32)
    torch.testing.assert_close(found["policy"], found["teacher_dark"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["policy"], found[None], atol=1e-3)
    own = begun.k2.role_state_dict("policy")
    assert own["transformer_blocks.0.attn.to_q.lora_A.weight"][2:].abs().min() > 0
    config.lora.rank = 1
    with pytest.raises(UserError, match=r"lora\.rank: is 1, and model\.start has rank 2"):
        Step(config)


def test_a_teacher_may_be_a_lora_file(config, tmp_path):
    """The same velocity as that of the run it was written from, and the log says what is not known of it."""
    run = Step(config)
    factors = scaled_factors([runs.latest(tmp_path / "dark")])
    save_file({f"transformer.{key}": value for key, value in factors.items()}, tmp_path / "dark.safetensors")
    config.teachers["dark"].run = str(tmp_path / "dark.safetensors")
    file = Step(config)
    for key, value in run.k2.role_state_dict("teacher_dark").items():
        torch.testing.assert_close(file.k2.role_state_dict("teacher_dark")[key], value)


def test_a_student_of_a_smaller_rank_than_a_teacher_is_warned_of(config, capsys):
    config.lora.rank = 1
    Step(config)
    assert "lora.rank: is 1, and teacher light has rank 2; use at least that" in capsys.readouterr().err


def test_teachers_that_are_refused(config, tmp_path, capsys):
    """One line, before a run directory is made."""

    def says(run: Path, text: str):
        config.teachers["dark"].run = str(run)
        assert cli.main(["mopd", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert text in line and "teachers.dark.run: " in line, line
        assert not Path(config.output).exists()

    other = tiny.save(tmp_path / "other", seed=3)
    says(runs.teacher(tmp_path / "elsewhere", other, 0), "was trained on another base than model.path")
    says(tmp_path / "none", "holds no whole checkpoint")
    says(runs.teacher(tmp_path / "zero", Path(config.model.path), 0, size=0.0), "every B factor is 0")
    (tmp_path / "t").mkdir()
    full = runs.config(tmp_path / "t", Path(config.model.path))
    full.lora, full.steps, full.optim.lr = None, 1, 1e-4
    from posttrain.grpo import train as grpo

    grpo.train(full)
    capsys.readouterr()
    says(Path(full.output), "all weights were trained; give a run with an adapter")
    distilled = runs.tdm_config(tmp_path / "t", Path(config.model.path))
    distilled.output = str(tmp_path / "student")
    from posttrain.tdm import train as tdm

    tdm.train(distilled)
    capsys.readouterr()
    says(Path(distilled.output), "is distilled, on another schedule")


def test_memory_is_a_role_for_each_teacher(config):
    """The adapters of the teachers and of the student, and nothing else grows."""
    one = Step(config)
    per_role = {name: sum(p.numel() for p in one.k2.role_parameters(name)) for name in one.k2.roles}
    config.teachers = {"light": config.teachers["light"]}
    fewer = Step(config)
    counted = [sum(p.numel() for p in step.k2.transformer.parameters()) for step in (one, fewer)]
    assert counted[0] - counted[1] == per_role["teacher_dark"]
