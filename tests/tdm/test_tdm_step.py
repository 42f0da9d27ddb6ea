"""Single steps of TDM on a tiny real K2 against what they should be, and the student in the stock pipeline."""

import pytest
import torch
from diffusers import Krea2Pipeline

from posttrain.distributed.processes import Processes
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.tdm import losses
from posttrain.tdm import train as tdm
from posttrain.tdm.rollout import MU, roll_out
from tests.helpers import runs, tiny


@pytest.fixture
def config(tmp_path, model):
    return runs.tdm_config(tmp_path, model)


class OneStep:
    """Student and fake score that differ from the base, and trajectories."""

    def __init__(self, config, size=0.02):
        self.config, self.procs = config, Processes()
        self.k2 = K2.load(config.model.path)
        tdm.add_roles(self.k2, config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for role in ("policy", "fake"):
                for key, parameter in self.k2.role_named_parameters(role).items():
                    if "lora_B" in key:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        self.null = self.k2.text([""])
        self.steppers = tdm.steppers(self.k2, config)

    def draw(self, step=1, updates=2):
        fused = [self.k2.text([p], 64).tokens[0] for p in [*tiny.PROMPTS, *tiny.PROMPTS][: self.config.batch]]
        keys = [(0, step, i) for i in range(self.config.batch)]
        return roll_out(self.k2, self.config.student, fused, keys, (32, 32), self.config.micro_batch, updates)

    def student_gradient(self):
        return self.watched(self.steppers[0], lambda stepper: tdm.update_student(
            self.k2, self.config, self.draw(), self.null, stepper, self.procs))  # fmt: skip

    def fake_gradient(self):
        return self.watched(self.steppers[1], lambda stepper: tdm.update_fake(
            self.k2, self.config, self.draw(), 0, stepper, self.procs))  # fmt: skip

    def watched(self, stepper, update):
        """The gradient of an update, flat, which is not made; and its metrics."""
        seen = []
        stepper.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in stepper.parameters])) or 0.0
        metrics = update(stepper)
        del stepper.step
        for parameter in stepper.parameters:
            parameter.grad = None
        return seen[0], metrics


def test_no_gradient_where_the_fake_score_is_the_teacher(config):
    """Both without effect yet, and no guidance: exactly zero."""
    config.teacher.guidance = 0.0
    gradient, metrics = OneStep(config, size=0.0).student_gradient()
    assert not gradient.any() and metrics["direction"] == metrics["generator_loss"] == 0
    config.teacher.guidance = 1.5
    gradient, metrics = OneStep(config, size=0.0).student_gradient()
    assert gradient.any() and metrics["direction"] > 0


def test_direction_of_the_first_step(config):
    """tau s (c - u) at each point, of the base alone."""
    config.micro_batch = 6
    one = OneStep(config, size=0.0)
    (batch,) = one.draw()
    _, metrics = one.student_gradient()
    p = batch.points[-1]
    with torch.no_grad():
        x0, e = sampler.x0_eps(p.x, one.k2.velocity(p.x, p.t, batch.text, 32, 32), p.t)
        x_tau = losses.renoise(sampler.noised(x0, e, p.m), p.z, p.m, p.tau)
        c, u = (one.k2.velocity(x_tau, p.tau, text, 32, 32) for text in (batch.text, one.null))
    expected = (p.tau[:, None, None] * 1.5 * (c - u)).abs().mean()
    assert metrics["direction"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("micro_batch", [6, 4, 1])
def test_gradients_of_a_step(config, micro_batch):
    """However the batch is cut, those of the losses as they are written, over the whole batch at once."""
    config.micro_batch = 6
    one = OneStep(config)
    (batch,) = one.draw()
    k2 = one.k2

    def velocity(role, x, t, text=batch.text):
        with k2.role(role):
            return k2.velocity(x, t, text, 32, 32)

    p = batch.points[-1]
    parameters = k2.train_role("policy")
    x0, e = sampler.x0_eps(p.x, velocity("policy", p.x, p.t), p.t)
    with torch.no_grad():
        a, b = (c[:, None, None] for c in losses.renoise_coefficients(p.m, p.tau))
        x_tau = a * sampler.noised(x0, e, p.m) + b * p.z
        c, u, f = velocity(None, x_tau, p.tau), velocity(None, x_tau, p.tau, one.null), velocity("fake", x_tau, p.tau)
        tau = p.tau[:, None, None]
        pull = tau * (c + 1.5 * (c - u) - f)
        pull = pull / (x0 - (x_tau - tau * (c + 1.5 * (c - u)))).abs().mean((1, 2), keepdim=True)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad((x0 * pull).mean(), parameters)])

    q = batch.points[0]
    parameters = k2.train_role("fake")
    with torch.no_grad():
        x0, e = sampler.x0_eps(q.x, velocity("policy", q.x, q.t), q.t)
        a, b = (c[:, None, None] for c in losses.renoise_coefficients(q.m, q.tau))
        x_tau = a * sampler.noised(x0, e, q.m) + b * q.z
        n = (x_tau - (1 - q.tau[:, None, None]) * x0) / q.tau[:, None, None]
        omega = ((q.z.square().mean((1, 2)) - n.square().mean((1, 2))) / 2).exp()
    error = (velocity("fake", x_tau, q.tau) - (n - x0)).square().mean((1, 2))
    fake = torch.cat([g.flatten() for g in torch.autograd.grad((omega * error).mean(), parameters)])

    config.micro_batch = micro_batch
    got, metrics = one.student_gradient()
    assert (got - expected).norm() < 1e-3 * expected.norm()
    got, metrics = one.fake_gradient()
    assert (got - fake).norm() < 1e-3 * fake.norm()
    assert metrics["omega"] == pytest.approx(float(omega.mean()), rel=1e-4)
    assert metrics["fake_loss"] == pytest.approx(float((omega * error.detach()).mean()), rel=1e-4)


def test_an_update_moves_one_role_alone(config):
    one = OneStep(config)

    def values():
        named = {role: one.k2.role_state_dict(role) for role in ("policy", "fake")} | {"base": one.k2.base_state_dict()}
        return {role: {key: value.clone() for key, value in state.items()} for role, state in named.items()}

    before = values()
    tdm.update_fake(one.k2, config, one.draw(), 0, one.steppers[1], one.procs)
    between = values()
    tdm.update_student(one.k2, config, one.draw(), one.null, one.steppers[0], one.procs)
    after = values()
    for role in ("policy", "base"):
        runs.assert_equal(before[role], between[role])
    for role in ("fake", "base"):
        runs.assert_equal(between[role], after[role])
    for a, b in ((before["fake"], between["fake"]), (between["policy"], after["policy"])):
        assert all(not torch.equal(a[key], b[key]) for key in a if "lora_B" in key)


def test_roles_of_all_weights(config):
    """Three copies: an update moves one of them, and where all are the same and there is no guidance, none."""
    config.lora, config.optim.lr, config.teacher.guidance = None, 1e-3, 0.0
    one = OneStep(config)
    gradient, _ = one.student_gradient()
    assert not gradient.any()
    roles = {"policy": one.k2.transformer, "fake": one.k2.copies["fake"].transformer}
    assert one.k2.reference is not None
    roles["teacher"] = one.k2.reference.transformer
    assert len({id(roles[name].img_in.weight) for name in roles}) == 3

    def values():
        return {name: {key: p.clone() for key, p in net.state_dict().items()} for name, net in roles.items()}

    before = values()
    for name in roles:
        runs.assert_equal(before["policy"], before[name])
    tdm.update_fake(one.k2, config, one.draw(), 0, one.steppers[1], one.procs)
    between = values()
    gradient, metrics = one.student_gradient()
    assert gradient.any() and metrics["direction"] > 0
    tdm.update_student(one.k2, config, one.draw(), one.null, one.steppers[0], one.procs)
    after = values()
    for name, a, b in (("fake", before, between), ("policy", between, after)):
        for other in roles:
            moved = any(not torch.equal(a[other][key], b[other][key]) for key in a[other])
            assert moved == (other == name)


def test_points_lie_on_the_trajectory(config):
    """They are what sampling passes through, whatever the micro-batch, and depend on their picture and step alone."""
    config.student.steps = [4, 2]
    one, seen = OneStep(config), {}
    for micro_batch in (6, 4):
        config.micro_batch = micro_batch
        points = [batch.points for batch in one.draw()]
        for j in (0, 1):
            for name in ("k", "t", "m", "tau", "z", "x", "v"):
                value = torch.cat([getattr(p[j], name) for p in points])
                torch.testing.assert_close(seen.setdefault((j, name), value), value, rtol=1e-4, atol=1e-4)
    for i, prompt in enumerate([*tiny.PROMPTS, *tiny.PROMPTS][:6]):
        k, t = int(seen[0, "k"][i]), seen[0, "t"][i]
        steps = next(n for n in (4, 2) if torch.isclose(sampler.schedule(n, MU)[min(k, n)], t, rtol=0, atol=0))
        x = sampler.noise([sampler.seed_for(0, 1, i, 0)], (16, 64))
        text, grid = one.k2.text([prompt], 64), sampler.schedule(steps, MU)
        with torch.no_grad(), one.k2.role("policy"):
            for t, t_next in zip(grid[:k], grid[1:]):
                x = sampler.ode_step(x, one.k2.velocity(x, t, text, 32, 32), t, t_next)
            v = one.k2.velocity(x, grid[k], text, 32, 32)
        torch.testing.assert_close(seen[0, "x"][i : i + 1], x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen[0, "v"][i : i + 1], v, rtol=1e-3, atol=1e-3)
    assert all(not torch.equal(one.draw(2)[0].points[0].x[i], seen[0, "x"][i]) for i in range(4))


def test_segments_are_drawn_evenly(config):
    """96 pictures of a student of 4 or of 1 step: half take 4, of which each segment takes a quarter."""
    config.student.steps, config.batch = [4, 1], 96
    k2 = OneStep(config).k2
    fused = [k2.text(["a red circle"]).tokens[0]] * 96
    (batch,) = roll_out(k2, config.student, fused, [(7, 1, i) for i in range(96)], (32, 32), 96, 1)
    p = batch.points[0]
    counts = [int((p.t == t).sum()) for t in sampler.schedule(4, MU)[:4]]
    assert 48 < counts[0] < 74 and all(5 <= count <= 20 for count in counts[1:]) and sum(counts) == 96


def test_the_stock_pipeline_repeats_the_trajectory(config, tmp_path):
    """The student merged into a pipeline that says is_distilled: 4 steps, no guidance."""
    one = OneStep(config, size=0.1)
    noise = sampler.noise([3], (16, 64))
    with one.k2.role("policy"):
        own = one.k2.sample(one.k2.text([tiny.PROMPTS[1]], 64), noise, 4, 32, 32, mu=MU)
    plain = one.k2.sample(one.k2.text([tiny.PROMPTS[1]], 64), noise, 4, 32, 32, mu=MU)
    one.k2.stack_role("policy")  # the fake score is not active
    pipe = Krea2Pipeline(
        **one.k2.pipe.components, text_encoder_select_layers=one.k2.pipe.text_encoder_select_layers, is_distilled=True
    )
    stock = pipe(
        tiny.PROMPTS[1], height=32, width=32, num_inference_steps=4, guidance_scale=0.0, latents=noise,
        output_type="latent", max_sequence_length=64, return_dict=False,
    )[0]  # fmt: skip
    assert (stock - own).norm() < 1e-4 * own.norm() and (plain - own).norm() > 1e-2 * own.norm()
