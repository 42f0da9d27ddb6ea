"""Single steps of STPO on a tiny real K2 against autograd of the loss as it is written, their pairs, and the cache."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from posttrain.config import metric_names
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model.k2 import K2
from posttrain.preferences.dataset import read_preferences
from posttrain.stpo import train as stpo
from posttrain.stpo.latent_cache import encode_pairs
from posttrain.stpo.losses import has_risen, inner
from posttrain.training import shard_cache
from posttrain.training.stepper import Stepper
from tests.helpers import runs, tiny


@pytest.fixture
def config(tmp_path, model):
    return runs.stpo_config(tmp_path, model)


class OneStep:
    """A policy that differs from the base, some pairs, and what one update of them would follow."""

    def __init__(self, config):
        self.config, self.procs = config, Processes()
        self.k2 = K2.load(config.model.path)
        self.pairs = encode_pairs(self.k2, read_preferences(config.pairs.train), config.pairs, self.procs)
        self.k2.add_role("policy", 4, 8.0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in self.k2.role_named_parameters("policy").items():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        self.parameters = self.k2.train_role("policy")

    def draw(self, step: int = 1):
        return stpo.draw(self.k2, self.config, self.pairs, step, self.procs, self.config.micro_batch)

    def gradient(self, step: int = 1):
        """Flat; nothing is changed. And the metrics."""
        stepper = Stepper(self.parameters, self.config.optim)
        seen = []
        stepper.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in self.parameters])) or 0.0  # type: ignore
        metrics = stpo.optimise(self.k2, self.config, step, self.draw(step), stepper, self.procs)
        for parameter in self.parameters:
            parameter.grad = None
        return seen[0], metrics

    def outputs(self):
        """Of the whole batch: v_w, v_l, reference_w, reference_l, target_w, target_l, share, all as (B, ...)."""
        columns = []
        for batch in self.draw():
            x, t = torch.cat([batch.x_w, batch.x_l]), batch.t.repeat(2)
            with self.k2.role("policy"):
                v = self.k2.velocity(x, t, batch.text, *batch.size)
            with torch.no_grad():
                r = self.k2.velocity(x, t, batch.text, *batch.size)
            columns.append([*v.chunk(2), *r.chunk(2), batch.target_w, batch.target_l, batch.label])
        return [torch.cat(column) for column in zip(*columns)]

    def flat(self, loss, **keep):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters, **keep)])


def close(a, b, tolerance=1e-4):
    return (a - b).norm() < tolerance * b.norm() and b.norm() > 0


def mean_square(x):
    return x.square().flatten(1).mean(1)


def written(config, v_w, v_l, r_w, r_l, u_w, u_l, share):
    """The loss as it is written, with its straight-through guard, for the whole batch at once."""
    loss = config.loss
    e_w, e_l = v_w - u_w, v_l - u_l
    dw, dl = mean_square(e_w) - mean_square(r_w - u_w), mean_square(e_l) - mean_square(r_l - u_l)
    if loss.kind == "dpo":
        return -F.logsigmoid(loss.beta / 2 * (dl - dw)).mean()
    product = (e_w * e_l).flatten(1).mean(1)
    kept = torch.where(product > 0, ((1 - loss.guard_share) * mean_square(e_w) / product).clamp(0, 1), 1.0).detach()
    z = loss.beta / 2 * (dl.detach() + kept * (dl - dl.detach()) - dw)
    p = share
    preference = -(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z)).mean()
    drift = (mean_square(v_w - r_w) + mean_square(v_l - r_l)).mean()
    return preference + loss.beta / 2 * (loss.anchor * drift + loss.hinge * dw.mean().clamp(min=0))


@pytest.mark.parametrize("kind", ["stpo", "dpo"])
@pytest.mark.parametrize("terms_every", [0, 1])
@pytest.mark.parametrize("micro_batch", [6, 4, 1])
def test_gradient_of_a_step(config, kind, terms_every, micro_batch):
    """However the batch is cut, and whether or not the terms are kept apart. This policy's chosen errors have risen, so
    the hinge pulls, which one micro-batch alone could not know."""
    config.loss.kind, config.loss.terms_every, config.loss.beta, config.loss.anchor = kind, terms_every, 20.0, 0.1
    one = OneStep(config)
    config.micro_batch = micro_batch
    got, metrics = one.gradient()
    outputs = one.outputs()
    loss = written(config, *outputs)
    assert close(got, one.flat(loss)), (got - one.flat(written(config, *one.outputs()))).norm()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["winner"] > 0
    assert ("gradient/winner" in metrics) == bool(terms_every)
    if terms_every and kind == "stpo":
        assert metrics["gradient/hinge"] > 0 and metrics["gradient/anchor"] > 0


def test_rounding_is_no_rise():
    """At the start policy and reference differ by rounding alone, and its sign depends on the number of processes."""
    assert not has_risen(change=-0.01, error=1.0)
    assert not has_risen(change=0.0, error=1.0)
    assert not has_risen(change=2e-5, error=1.0)  # bf16 at K2's size
    assert has_risen(change=2e-3, error=1.0)


def test_the_hinge_is_off_where_the_mean_has_not_risen(config):
    """With the chosen pictures' targets moved to where the policy is, single pairs' errors still rise."""
    config.loss.beta, config.micro_batch = 20.0, 4
    one = OneStep(config)
    draw = one.draw

    def moved(step=1):
        batches = draw(step)
        for batch in batches:
            with torch.no_grad(), one.k2.role("policy"):
                x, t = torch.cat([batch.x_w, batch.x_l]), batch.t.repeat(2)
                v = one.k2.velocity(x, t, batch.text, *batch.size).chunk(2)[0]
            batch.target_w = v + 0.3 * (v - batch.target_w)
        return batches

    one.draw = moved  # type: ignore[method-assign]
    got, metrics = one.gradient()
    assert metrics["winner"] < 0
    assert close(got, one.flat(written(config, *one.outputs())))
    config.loss.hinge = 0.0
    assert torch.equal(one.gradient()[0], got)


def test_soft_labels(config):
    rows = [json.loads(line) for line in Path(config.pairs.train).read_text().splitlines()]
    votes = [{"share": 1.0}, {"share": 0.8}, {"share": 0.99}, {"share": 1.0, "source": "human"}, {"share": 0.6}]
    Path(config.pairs.train).write_text("".join(json.dumps(row | votes[i % 5]) + "\n" for i, row in enumerate(rows)))
    config.loss.beta, config.loss.hinge = 20.0, 0.0
    one = OneStep(config)
    outputs = one.outputs()
    assert [round(float(p), 4) for p in one.pairs.label] == [1.0, 0.8, 0.95, 0.95, 0.6] * 4
    assert len(set(outputs[-1].tolist())) >= 3
    assert close(one.gradient()[0], one.flat(written(config, *outputs)))


@pytest.mark.parametrize("micro_batch", [6, 4])
def test_exact_guard_of_a_step(config, micro_batch):
    """g_w - l g_l with l of the whole batch's gradients, and the anchor and the hinge on top; and the share that the
    guard promises: <g_w - l g_l, n> >= mu <g_w, n>."""
    config.loss.guard, config.loss.beta, config.loss.anchor, config.micro_batch = "exact", 20.0, 0.1, micro_batch
    one = OneStep(config)
    got, metrics = one.gradient()
    v_w, v_l, r_w, r_l, u_w, u_l, _ = one.outputs()
    dw, dl = mean_square(v_w - u_w) - mean_square(r_w - u_w), mean_square(v_l - u_l) - mean_square(r_l - u_l)
    c = torch.sigmoid(-10 * (dl - dw)).detach()
    keep = {"retain_graph": True}
    g_w, g_l, n = (one.flat(x, **keep) for x in ((c * dw).sum(), (c * dl).sum(), mean_square(v_w - u_w).sum()))
    kept = float(((1 - 0.6) * (g_w @ n).clamp(min=0) / (g_l @ n)).clamp(0, 1)) if g_l @ n > 0 else 1.0
    anchor = one.flat((mean_square(v_w - r_w) + mean_square(v_l - r_l)).sum(), **keep)
    expected = 10 / 6 * (g_w - kept * g_l + 0.1 * anchor + 0.25 * (dw.mean() > 0) * n)
    assert close(got, expected)
    assert metrics["guard"] == pytest.approx(kept, rel=1e-3) and 0 < kept < 1 and metrics["guarded"] == 1
    assert float((g_w - kept * g_l) @ n) >= 0.6 * float(g_w @ n) * (1 - 1e-4) and metrics["conflict"] == 0
    assert inner([g_w], [n]) > 0 > float((g_w - g_l) @ n) - 0.6 * float(g_w @ n)


def test_a_pair_shares_time_and_noise(config):
    """Both pictures, and whatever the micro-batch: x_t = (1 - t) x0 + t e and u = e - x0 give the same e."""
    one = OneStep(config)
    seen = {}
    for micro_batch in (6, 4):
        config.micro_batch = micro_batch
        for batch in one.draw():
            t = batch.t[:, None, None]
            e_w, e_l = batch.x_w + (1 - t) * batch.target_w, batch.x_l + (1 - t) * batch.target_l
            torch.testing.assert_close(e_w, e_l, rtol=1e-4, atol=1e-5)
            for j, noise, time in zip(batch.jobs, e_w, batch.t):
                torch.testing.assert_close(seen.setdefault(j, noise), noise)
                assert 0 < time < 1
    assert len(seen) == 6 and len({round(float(e.std()), 4) for e in seen.values()}) == 6
    later = [e for batch in one.draw(2) for e in batch.x_w]
    assert all(not torch.equal(e, x) for e in later for batch in one.draw(1) for x in batch.x_w)


def test_times_follow_the_resolution(config):
    """Their median is the schedule's midpoint: logit t = mu + mean."""
    config.batch, config.loss.time_mean, config.loss.time_std = 400, 0.5, 0.5
    one = OneStep(config)
    logits = torch.cat([batch.t for batch in one.draw()]).logit()
    assert logits.median() == pytest.approx(one.k2.mu(32, 32) + 0.5, abs=0.08)
    assert logits.std() == pytest.approx(0.5, abs=0.05)


def test_held_out_prompts_are_never_trained_on(config):
    one = OneStep(config)
    prompts = [tiny.PROMPTS[i % 4] for i in range(20)]
    held = {prompts[i] for i in one.pairs.heldout}
    assert len(held) == 1 and len(one.pairs.heldout) == 5 and len(one.pairs.train) == 15
    assert held.isdisjoint(prompts[i] for i in one.pairs.train)


def test_the_empty_prompt_is_dropped_in(config):
    config.pairs.drop_prompt = 0.5
    config.batch = 40
    one = OneStep(config)
    null = one.k2.text([""]).tokens[0]
    dropped = 0
    for batch in one.draw():
        assert torch.equal(batch.text.tokens.chunk(2)[0], batch.text.tokens.chunk(2)[1])
        dropped += sum(torch.equal(tokens[: len(null)], null) for tokens in batch.text.tokens.chunk(2)[0])
    assert 10 <= dropped <= 30


def test_several_sizes_in_one_run(config, tmp_path):
    wide = runs.pairs(tmp_path / "wide", 6, (16, 48))
    rows = [json.loads(line) for line in wide.read_text().splitlines()]
    for row in rows:
        row |= {name: f"wide/{row[name]}" for name in ("chosen", "rejected")}
    with Path(config.pairs.train).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    config.batch = 20
    one = OneStep(config)
    batches = one.draw()
    assert {batch.size for batch in batches} == {(32, 32), (16, 48)} and sum(len(b.jobs) for b in batches) == 20
    assert all(batch.x_w.shape == (len(batch.jobs), {(32, 32): 16, (16, 48): 12}[batch.size], 64) for batch in batches)
    stpo.train(config)
    assert runs.training_rows(config.output)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_measuring_held_out_pairs(config):
    """The same each time, by the policy; the i-th pair has a time of part i mod 4 of the training times."""
    one = OneStep(config)
    with one.k2.role("policy"):
        figures, parts = stpo.measure_pairs(one.k2, config, one.pairs, one.procs, config.micro_batch)
        again = stpo.measure_pairs(one.k2, config, one.pairs, one.procs, config.micro_batch)
    assert again == (figures, parts) and figures.keys() == set(metric_names.PAIRS)
    assert parts.keys() == {f"{n}_t{i}" for n in metric_names.PAIRS if n[6:] not in ("z10", "z50", "z90")
                            for i in range(1, 5)}  # fmt: skip
    assert figures["pairs/winner"] != 0 and figures["pairs/drift_winner"] > 0
    # parts of 2, 1, 1 and 1 of the five pairs
    mean = sum(n * parts[f"pairs/margin_t{i}"] for i, n in ((1, 2), (2, 1), (3, 1), (4, 1))) / 5  # type: ignore[operator]
    assert figures["pairs/margin"] == pytest.approx(mean)
    with one.k2.role(None):
        reference, _ = stpo.measure_pairs(one.k2, config, one.pairs, one.procs, config.micro_batch)
    assert reference["pairs/winner"] == reference["pairs/drift_loser"] == 0 and reference["pairs/accuracy"] == 0.5
    assert reference["pairs/loss"] == pytest.approx(math.log(2))


# the cache


def test_encoded_once(config, tmp_path, monkeypatch):
    """The latents are those of the pictures, the text that of the prompts; a second run encodes nothing."""
    one = OneStep(config)
    pair = one.pairs[7]
    images = [Image.open(tmp_path / f"images/7-{name}.png") for name in ("chosen", "rejected")]
    expected = one.k2.encode_images(images)
    torch.testing.assert_close(torch.stack([pair.chosen, pair.rejected]), expected)
    torch.testing.assert_close(pair.text, one.k2.text([tiny.PROMPTS[3]], 64).tokens[0])
    assert pair.size == (32, 32) and pair.label == 1

    def encode_images(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(K2, "encode_images", encode_images)
    assert torch.equal(OneStep(config).pairs[7].chosen, pair.chosen)
    for field, value in (("size", [16, 16]), ("max_tokens", 32)):  # each makes another cache
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="encoded again"):
            patch.setattr(config.pairs, field, value)
            OneStep(config)
    Image.open(tmp_path / "images/0-rejected.png").save(tmp_path / "images/7-chosen.png")
    with pytest.raises(AssertionError, match="encoded again"):
        OneStep(config)


def test_another_vae_makes_another_cache(config, tmp_path):
    OneStep(config)
    folders = list((tmp_path / "cache").iterdir())
    k2 = K2.load(config.model.path)
    with torch.no_grad():
        k2.vae.encoder.conv_in.weight.mul_(1.01)
    again = encode_pairs(k2, read_preferences(config.pairs.train), config.pairs, Processes())
    assert again.folder not in folders and len(list((tmp_path / "cache").iterdir())) == 2
    # and one that is put in the place of another is refused
    (folders[0] / "cache.json").write_text((again.folder / "cache.json").read_text())
    with pytest.raises(UserError, match=rf"{folders[0]}: was encoded with another vae; remove it"):
        OneStep(config)


def test_encoding_that_was_killed_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "SHARD", 6)
    whole = OneStep(config).pairs
    (tmp_path / "cache").rename(tmp_path / "whole")
    calls = []

    def killed(self, images, batch=16):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_images(self, images, batch)

    encode_images = K2.encode_images
    monkeypatch.setattr(K2, "encode_images", killed)
    with pytest.raises(KeyboardInterrupt):
        OneStep(config)
    again = OneStep(config).pairs
    assert calls == [12, 12, 12, 12, 4]  # two shards, the third was killed, and again
    for path in whole.folder.glob("*"):
        other = again.folder / path.name
        assert (tmp_path / "whole" / whole.folder.name / path.name).read_bytes() == other.read_bytes()


def test_a_damaged_shard_is_named(config):
    folder = OneStep(config).pairs.folder
    file = folder / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00000\.safetensors: is damaged .*; remove it, and it is made again"):
        OneStep(config)
    file.unlink()
    assert len(OneStep(config).pairs.train) == 15


def test_pictures_are_scaled_and_cropped(config, tmp_path):
    config.pairs.size = [16, 32]
    pair = OneStep(config).pairs[0]
    assert pair.size == (16, 32) and pair.chosen.shape == (8, 64)


def test_images_of_unlike_sizes_are_resized_where_a_size_is_set(config, tmp_path, capsys):
    """Each as it would be alone; without pairs.size the pair is a bad row."""
    image = Image.open(tmp_path / "images/0-chosen.png")
    image.resize((48, 48)).save(tmp_path / "images/0-chosen.png")
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: the images differ in size: 48x48 and 32x32 .*pairs\.size"):
        stpo.train(config)
    config.pairs.size = [16, 16]
    stpo.train(config)
    assert "bad" not in capsys.readouterr().err
    k2 = K2.load(config.model.path)
    pairs = encode_pairs(k2, read_preferences(config.pairs.train, resized=True), config.pairs, Processes())
    expected = k2.encode_images([image.resize((48, 48)).resize((16, 16), Image.Resampling.LANCZOS)])[0]
    torch.testing.assert_close(pairs[0].chosen, expected)
