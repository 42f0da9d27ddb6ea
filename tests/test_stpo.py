"""STPO on a tiny real K2: whole runs, single steps against autograd of the loss as it is written, and the cache."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from posttrain import cli, latents, stpo
from posttrain import figures as figures_of
from posttrain.export import load_checkpoint
from posttrain.k2 import K2
from posttrain.latents import encode_pairs
from posttrain.loop import Stepper
from posttrain.preference_loss import inner
from posttrain.preferences import read_preferences
from posttrain.processes import Processes
from prompts.errors import UserError
from tests import runs, tiny


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
    named = {"brightness", *figures_of.LOOK, *figures_of.CHANGES, *figures_of.PAIRS}
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
    config.loss.kind, config.steps, config.optim.lr, config.eval.every = kind, 12, 1e-2, 6
    config.loss.guard_share = 0.0
    stpo.train(config)
    before, *_, after = evaluations(config.output)
    assert before["eval/pairs/accuracy"] == 0 and after["eval/pairs/accuracy"] == 1
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
    assert cli.main(["stpo", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 0
    assert runs.latest(config.output).step == 2
    stopped = json.loads((Path(config.output) / "summary.json").read_text())["stopped"]
    assert stopped.startswith("eval.stop: pairs/drift_winner is ") and stopped.endswith("above the limit 1e-09")
    assert stopped in capsys.readouterr().err


# single steps


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
        return stpo.draw(self.k2, self.config, self.pairs, step, self.procs)

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
        figures, parts = stpo.measure_pairs(one.k2, config, one.pairs, one.procs)
        again = stpo.measure_pairs(one.k2, config, one.pairs, one.procs)
    assert again == (figures, parts) and figures.keys() == set(figures_of.PAIRS)
    assert parts.keys() == {f"{n}_t{i}" for n in figures_of.PAIRS if n[6:] not in ("z10", "z50", "z90")
                            for i in range(1, 5)}  # fmt: skip
    assert figures["pairs/winner"] != 0 and figures["pairs/drift_winner"] > 0
    # parts of 2, 1, 1 and 1 of the five pairs
    mean = sum(n * parts[f"pairs/margin_t{i}"] for i, n in ((1, 2), (2, 1), (3, 1), (4, 1))) / 5  # type: ignore[operator]
    assert figures["pairs/margin"] == pytest.approx(mean)
    with one.k2.role(None):
        reference, _ = stpo.measure_pairs(one.k2, config, one.pairs, one.procs)
    assert reference["pairs/winner"] == reference["pairs/drift_loser"] == reference["pairs/accuracy"] == 0
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
    monkeypatch.setattr(latents, "SHARD", 6)
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
    assert "pairs.jsonl: 1 of 23 rows are ties and left out" in said
    assert "pairs.jsonl: 2 of 23 rows are bad and left out: " in said
    assert "pairs.jsonl:1: chosen: images/none.png is missing; " in said
    assert "pairs.jsonl:2: is 32x20 pixels, no multiples of 8; set pairs.size" in said
    assert json.loads((Path(config.output) / "summary.json").read_text())["steps"] == 2
    config.pairs.max_bad, config.output = 0.05, str(tmp_path / "other")
    with pytest.raises(UserError, match=r"more than 0\.05 of 23 rows \(max_bad\) are bad: .*pairs\.jsonl:2: is 32x20"):
        stpo.train(config)
    assert not Path(config.output).exists()


def test_other_pairs_cannot_be_resumed(config):
    stpo.train(config)
    spoil(config, {"prompt": "another"})
    with pytest.raises(UserError, match=r"pairs: not those that .*step-000002 was trained on"):
        stpo.train(config, resume=True)


def test_one_prompt_is_too_few(config):
    path = Path(config.pairs.train)
    path.write_text("".join(json.dumps(json.loads(x) | {"prompt": "a"}) + "\n" for x in path.read_text().splitlines()))
    with pytest.raises(UserError, match=r"pairs\.jsonl: all pairs are of one prompt, which is held out; add others"):
        stpo.train(config)


def test_long_prompts_are_cut_with_a_warning(config, capsys):
    config.pairs.max_tokens = 16
    stpo.train(config)
    assert "warning: 1 prompts are longer than pairs.max_tokens (16); up to" in capsys.readouterr().err
    assert load_checkpoint(runs.latest(config.output)).roles.keys() == {"policy"}


@pytest.mark.parametrize("name", ["stpo_synthetic", "stpo_human"])
def test_recipes_are_valid(name):
    config, _ = cli.load_config("stpo", ["--config", f"recipes/nano/{name}.yaml"])
    assert config.output == f"runs/nano-{name.replace('_', '-')}" and config.loss.kind == "stpo"
    assert config.model.start == (None if name == "stpo_synthetic" else "runs/nano-stpo-synthetic")
