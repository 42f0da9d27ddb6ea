"""A step of NFT on a tiny real K2: what is drawn and noised, and which gradient it has."""

import json

import pytest
import torch

from posttrain import cli
from posttrain.distributed.processes import Processes
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.nft import losses, update
from posttrain.nft import train as nft
from posttrain.training.prompt_source import PromptSource
from posttrain.training.stepper import Stepper
from prompts.records import read_prompts
from rewards.background import ScoreQueue
from rewards.load import load_rewards
from tests.helpers import runs


@pytest.fixture
def config(tmp_path, model):
    return runs.nft_config(tmp_path, model)


@pytest.fixture
def one_step(config, model):
    """A policy that differs from the base, an old one that is the same or not, and the groups of a step."""
    k2 = K2.load(model)
    update.add_roles(k2, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in k2.role_named_parameters("policy").items():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        k2.load_role_state_dict("old", k2.role_state_dict("policy"))
    stepper = Stepper(k2.train_role("policy"), config.optim)
    source = PromptSource(config, read_prompts(config.prompts.train))

    def draw(step=1, micro_batch=4):
        with ScoreQueue(load_rewards(config.rewards), config.groups.group_size) as queue:
            groups = nft.sample(k2, config, step, stepper, source, queue, Processes(), micro_batch)
            advantages_PG, _ = nft.score(config, queue.gather())
        return groups, advantages_PG

    def gradient(groups, advantages_PG, scored_PG=None, micro_batch=4, lagging=False, check=False):
        """Flat, and the metrics; nothing is changed."""
        scored_PG = torch.ones_like(advantages_PG) if scored_PG is None else scored_PG
        metrics = update.gradient(
            k2, config, 1, groups, advantages_PG, scored_PG, Processes(), micro_batch, lagging, check
        )
        flat = torch.cat([p.grad.flatten() for p in stepper.parameters])  # type: ignore[union-attr]
        stepper.optimizer.zero_grad(set_to_none=True)
        return flat, metrics

    return k2, draw, gradient


def test_each_image_has_its_own_noise_and_they_are_those_of_the_sampler(config, one_step):
    k2, draw, _ = one_step
    groups, _ = draw()
    for group in groups:
        noise = sampler.noise([sampler.seed_for(0, 1, group.index, j, 0) for j in range(4)], (16, 64))
        with k2.role("policy"):
            expected = k2.sample(group.text, noise, 4, 32, 32)
        torch.testing.assert_close(group.latents, expected)
        assert len({tuple(row.flatten()[:4].tolist()) for row in group.latents}) == 4
    again, _ = draw(micro_batch=2)
    for a, b in zip(groups, again):
        torch.testing.assert_close(a.latents, b.latents)
    assert not torch.equal(draw(step=2)[0][0].latents, groups[0].latents)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("levels", "times"), [("all", 4), ("all", 3), ("noisier", 2)])
def test_noise_levels_are_the_rollouts_own_without_replacement(config, one_step, shared, levels, times):
    _, draw, _ = one_step
    config.loss.shared, config.loss.levels, config.loss.times = shared, levels, times
    groups, _ = draw()
    grid = sampler.schedule(4, 0.5)[:-1]
    assert grid[0] == 1  # pure noise is one of them
    drawn = list(update.noisings(config, 1, groups[0], grid, 4))
    times_JT = torch.stack([t for _, t, _ in drawn], 1)
    for row in times_JT:
        assert len(set(row.tolist())) == times and set(row.tolist()) <= set(
            grid[: 2 if levels == "noisier" else 4].tolist()
        )
    alike = [bool((noise == noise[:1]).all()) for _, _, noise in drawn]
    assert alike == [shared] * times and (not shared or bool((times_JT == times_JT[:1]).all()))
    assert len({float(noise[0, 0, 0]) for _, _, noise in drawn}) == times
    # In other micro-batches, and once more, the same.
    halves = list(update.noisings(config, 1, groups[0], grid, 2))
    for k, (_, t, noise) in enumerate(drawn):
        assert torch.equal(torch.cat([halves[2 * k][1], halves[2 * k + 1][1]]), t)
        assert torch.equal(torch.cat([halves[2 * k][2], halves[2 * k + 1][2]]), noise)
    other = next(iter(update.noisings(config, 2, groups[0], grid, 4)))
    assert not torch.equal(other[2], drawn[0][2])


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gradient_of_a_step(config, one_step, kl):
    """As written out, image by image: against the old policy, with the distance to the reference."""
    k2, draw, gradient = one_step
    config.loss.kl = kl
    with torch.no_grad():  # an old policy that lags
        for parameter in k2.role_parameters("old"):
            parameter.mul_(0.5)
    groups, advantages_PG = draw()
    found, metrics = gradient(groups, advantages_PG, lagging=True)
    k2.train_role("policy")
    total = torch.zeros(())
    for group in groups:
        grid = sampler.schedule(4, k2.mu(32, 32))[:-1]
        for _, t, eps in update.noisings(config, 1, group, grid, 4):
            for j in range(4):
                x0, own, u = group.latents[j : j + 1], t[j : j + 1], eps[j : j + 1] - group.latents[j : j + 1]
                x = (1 - own) * x0 + own * eps[j : j + 1]
                with torch.no_grad(), k2.role("old"):
                    v_old = k2.velocity(x, own, group.text, 32, 32)
                with torch.no_grad(), k2.role(None):
                    reference = k2.velocity(x, own, group.text, 32, 32)
                with k2.role("policy"):
                    v = k2.velocity(x, own, group.text, 32, 32)
                A = advantages_PG[group.index, j]
                e, d = v_old - u, v - v_old
                w_plus, w_minus = (own / (q - u).detach().abs().mean() for q in (v, 2 * v_old - v))
                r = 0.5 + A / 10
                nft_loss = 5 * (r * w_plus * (e + d).square().mean() + (1 - r) * w_minus * (e - d).square().mean())
                total = total + (nft_loss.sum() + kl * (v - reference).square().mean()) / (2 * 4 * 2)
    parameters = k2.role_parameters("policy")
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
    assert expected.norm() > 0 and (found - expected).norm() < 1e-4 * expected.norm()
    assert metrics["loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    assert metrics["old_distance"] > 0 and ("kl" in metrics) == (kl > 0)


def test_without_lag_the_gradient_is_that_with_a_second_forward_to_the_bit(config, one_step):
    """On the real network: the old policy's forward, whose weights are the policy's, and no forward of it."""
    _, draw, gradient = one_step
    config.loss.kl = 0.0
    groups, advantages_PG = draw()
    short, metrics = gradient(groups, advantages_PG, check=True)
    whole, _ = gradient(groups, advantages_PG, lagging=True)
    assert metrics["old_error"] == 0 and torch.equal(short, whole)
    config.loss.beta = 0.1
    other, _ = gradient(groups, advantages_PG)
    assert (other - short).norm() < 1e-4 * short.norm()  # beta is idle


def test_gradient_does_not_depend_on_the_micro_batch(one_step):
    _, draw, gradient = one_step
    groups, advantages_PG = draw()
    whole, a = gradient(groups, advantages_PG)
    parts, b = gradient(groups, advantages_PG, micro_batch=3)
    assert (whole - parts).norm() < 1e-4 * whole.norm()
    assert a == pytest.approx(b, rel=1e-4)


def test_an_image_without_a_score_is_left_out(config, one_step):
    """Its advantage is 0, but the distance to the old policy and to the reference would count it."""
    k2, draw, gradient = one_step
    with torch.no_grad():
        for parameter in k2.role_parameters("old"):
            parameter.mul_(0.5)
    groups, _ = draw()
    advantages_PG = torch.zeros(2, 4)
    nothing, _ = gradient(groups, advantages_PG, torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 1]]), lagging=True)
    assert nothing.norm() > 0
    groups[1].latents[:3] = 99.0  # what has no score is not looked at
    again, _ = gradient(groups, advantages_PG, torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 1]]), lagging=True)
    assert (again - nothing).norm() < 1e-4 * nothing.norm()


def test_groups_that_are_trained_on(config):
    advantages_PG = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    scored_PG = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert nft.taught(config, advantages_PG, scored_PG, False).tolist() == [True, False, False]
    assert nft.taught(config, advantages_PG, scored_PG, True).tolist() == [True, True, False]
    config.groups.flat = "kl"
    assert nft.taught(config, advantages_PG, scored_PG, False).tolist() == [True, True, False]


def test_errors_by_noise_level(config, one_step):
    """Those of the quarter that a level lies in; all levels of four steps here."""
    k2, draw, gradient = one_step
    config.loss.times = 4
    groups, advantages_PG = draw()
    _, metrics = gradient(groups, advantages_PG)
    grid, sums = sampler.schedule(4, k2.mu(32, 32))[:-1], {}
    for group in groups:
        for _, t, eps in update.noisings(config, 1, group, grid, 4):
            with torch.no_grad(), k2.role("policy"):
                v = k2.velocity(sampler.noised(group.latents, eps, t), t, group.text, 32, 32)
            part = min(3, int(4 * t[0]))
            sums.setdefault(part, []).append(losses.mean_square(v - sampler.velocity_target(group.latents, eps)).mean())
    found = {name: value for name, value in metrics.items() if name.startswith("velocity_error")}
    assert found == pytest.approx({f"velocity_error_t{k + 1}": float(torch.stack(v).mean()) for k, v in sums.items()})


@pytest.mark.long
def test_a_stage_of_a_pipeline(tmp_path, model, monkeypatch, capsys):
    """grpo, nft from it, and an export, as `posttrain run` does them; the figures of the stage are on its page."""
    made = {}
    for name, config in (("grpo", runs.config), ("nft", runs.nft_config)):
        (tmp_path / name).mkdir()
        data = json.loads(runs.recipe(config(tmp_path / name, model), tmp_path / f"{name}.yaml").read_text())
        del data["output"]
        data["rewards"] = [{"name": "brightness", "function": "tests.helpers.warm:brightness"}]
        (tmp_path / f"{name}.yaml").write_text(json.dumps(data))
        made[name] = {"name": name, "command": name, "recipes": [str(tmp_path / f"{name}.yaml")], "set": {}}
    made["nft"]["set"] = {"model.start": "${grpo}"}
    export = {"name": "lora", "command": "export", "set": {"source": "${nft}", "format": "lora"}}
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"output": str(tmp_path / "p"), "stages": [*made.values(), export]}))
    monkeypatch.chdir(runs.ROOT)
    assert cli.main(["run", str(path), "--dry-run"]) == 0
    assert "model.start from grpo" in capsys.readouterr().out
    assert cli.main(["run", str(path)]) == 0
    assert (tmp_path / "p/lora.safetensors").is_file()
    page = (tmp_path / "p/index.html").read_text()
    assert "nft" in page and "reward" in page
