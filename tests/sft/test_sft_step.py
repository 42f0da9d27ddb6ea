"""Single steps of finetuning on a tiny real K2: gradient, draws, captions, and the cache."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.sft import cache
from posttrain.sft import train as sft
from posttrain.sft.cache import encode_images
from posttrain.sft.config import ImageColumns
from posttrain.sft.dataset import ImageSet
from posttrain.training import shard_cache
from posttrain.training.stepper import Stepper
from tests.helpers import runs, tiny


@pytest.fixture
def config(tmp_path, model):
    return runs.sft_config(tmp_path, model)


def encoded(config, k2=None):
    return encode_images(k2 or K2.load(config.model.path), ImageSet(config.images), config.images, Processes())


class OneStep:
    """A policy that differs from the base, its images, and what one update of them would follow."""

    def __init__(self, config):
        self.config, self.procs, self.k2 = config, Processes(), K2.load(config.model.path)
        self.images = encoded(config, self.k2)
        self.order = sft.order_of(self.images, config)
        self.k2.add_role("policy", 4, 8.0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in self.k2.role_named_parameters("policy").items():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        self.parameters = self.k2.train_role("policy")

    def draw(self, step=1, micro_batch=None):
        batch = micro_batch or self.config.micro_batch
        return sft.draw(self.k2, self.config, self.images, self.order(step), step, self.procs, batch)

    def gradient(self, micro_batch):
        stepper, seen = Stepper(self.parameters, self.config.optim), []
        stepper.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in self.parameters])) or 0.0  # type: ignore
        metrics = sft.optimise(self.k2, self.config, self.draw(1, micro_batch), stepper, self.procs)
        for parameter in self.parameters:
            parameter.grad = None
        return seen[0], metrics


@pytest.mark.parametrize("micro_batch", [6, 4, 1])
def test_gradient_of_a_step(config, micro_batch):
    """However the batch is cut it is that of the mean over images of the mean square of v - (eps - x0)."""
    one = OneStep(config)
    (batch,) = one.draw(1, 6)
    entries = one.order(1)
    seeds = [[sampler.seed_for(config.seed, 1, i, j) for j in range(4)] for i in range(6)]
    x0 = torch.stack([one.images.read(entry, 0.0)[0] for entry in entries])
    eps = sampler.noise([seed[1] for seed in seeds], x0.shape[1:])
    mu = sampler.resolution_mu(16)
    n = torch.cat([sampler.noise(seed[:1], (1,)) for seed in seeds]).flatten()
    t = torch.sigmoid(n + mu)
    torch.testing.assert_close(batch.t, t)
    x = (1 - t[:, None, None]) * x0 + t[:, None, None] * eps
    torch.testing.assert_close(batch.x, x)
    with one.k2.role("policy"):
        v = one.k2.velocity(x, t, batch.text, 32, 32)
    loss = (v - (eps - x0)).square().mean()  # all images have one size
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, one.parameters)])
    got, metrics = one.gradient(micro_batch)
    assert (got - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_shift_and_times(config):
    """shift is added to the bucket's own mu, which differs from that of sampling nothing; noise stays the same."""
    one = OneStep(config)
    (plain,) = one.draw(1, 6)
    config.shift = 0.5
    (shifted,) = one.draw(1, 6)
    torch.testing.assert_close(torch.logit(shifted.t), torch.logit(plain.t) + 0.5)
    config.shift, config.time_mean, config.time_std = 0.0, 1.0, 2.0
    (wide,) = one.draw(1, 6)
    mu = one.k2.mu(32, 32)
    assert mu == sampler.resolution_mu(16)
    torch.testing.assert_close(torch.logit(wide.t) - mu - 1, 2 * (torch.logit(plain.t) - mu), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide.target, plain.target)


def test_each_bucket_has_its_own_shift(config, tmp_path):
    config.images.train = str(runs.captioned(tmp_path / "two", 24, (32, 32), (24, 40)))
    one = OneStep(config)
    seen = {}
    for step in range(1, 9):
        for batch in one.draw(step, 6):
            seeds = [sampler.seed_for(config.seed, step, i, 0) for i in range(6)]
            n = torch.cat([sampler.noise([seed], (1,)) for seed in seeds]).flatten()
            tokens = batch.size[0] * batch.size[1] // 64
            torch.testing.assert_close(batch.t, torch.sigmoid(n + sampler.resolution_mu(tokens)))
            seen[batch.size] = tokens
    assert seen == {(32, 32): 16, (24, 40): 15}


def test_captions_are_taken_as_often_as_they_weigh(config):
    """3 of the long one to 1 of the two short ones together, and a fifth of all images without one."""
    place = Path(config.images.train)
    for file in place.glob("*.png"):
        captions = {"caption": tiny.PROMPTS[1], "short": [tiny.PROMPTS[0], "fox"]}
        file.with_suffix(".json").write_text(json.dumps(captions))
        file.with_suffix(".txt").unlink()
    config.images.columns = ImageColumns(captions={"caption": 3, "short": 1})
    config.images.drop_caption, config.batch, config.micro_batch = 0.2, 15, 15
    one = OneStep(config)
    lengths = {len(one.k2.text([text], 64).tokens[0]): text for text in (tiny.PROMPTS[1], tiny.PROMPTS[0], "fox", "")}
    assert len(lengths) == 4
    seen: Counter[str] = Counter()
    for step in range(1, 101):
        (batch,) = one.draw(step)
        mask = batch.text.mask
        assert mask is not None
        own = [lengths[int(length)] for length in mask.sum(1)]
        assert batch.dropped == own.count("")
        seen.update(own)
    total = 1500
    for text, share in ((tiny.PROMPTS[1], 0.6), (tiny.PROMPTS[0], 0.1), ("fox", 0.1), ("", 0.2)):
        error = math.sqrt(share * (1 - share) / total)
        assert abs(seen[text] / total - share) < 4 * error, text


def test_the_tokens_are_those_of_the_caption(config):
    one = OneStep(config)
    image = one.images.images[3]
    _, text = one.images.read(3, 0.0)
    expected = one.k2.text([tiny.PROMPTS[image.row % 4]], 64).tokens[0]
    torch.testing.assert_close(text, expected)
    torch.testing.assert_close(one.images.null, one.k2.text([""]).tokens[0])


def test_the_latents_are_those_of_the_crop(config, tmp_path):
    """Of an image of 70 x 40 in a bucket of 40 x 24: 66.7 of 70 rows."""
    place = tmp_path / "one"
    place.mkdir()
    for i in range(2):
        Image.effect_noise((40, 70), 60 + i).convert("RGB").save(place / f"{i}.png")
        (place / f"{i}.txt").write_text("noise")
    config.images.train, config.images.heldout = str(place), 0.5
    k2 = K2.load(config.model.path)
    images = encoded(config, k2)
    assert images.size.tolist() == [[40, 24]] * 2 and images.cut(0) == pytest.approx(1 - (40 * 40 / 24) / 70)
    top = (70 - 40 * 40 / 24) / 2
    image = Image.open(place / "0.png").resize((24, 40), Image.Resampling.LANCZOS, box=(0, top, 40, 70 - top))
    latents, _ = images.read(0, 0.0)
    torch.testing.assert_close(latents, k2.encode_images([image])[0])


def test_several_resolutions(config, tmp_path):
    """A large image is trained in both, a small one in one, and both sides of an image are held out together."""
    config.images.train = str(runs.captioned(tmp_path / "two", 20, (64, 64), (40, 40)))
    config.images.resolutions = [32, 64]
    images = encoded(config)
    assert len(images.images) == 20 and len(images.entries) == 30
    assert Counter(map(tuple, images.size.tolist())) == {(32, 32): 20, (64, 64): 10}
    held = {images.entries[entry][0] for entry in images.heldout}
    trained = {images.entries[entry][0] for entry in images.train}
    assert len(held) == 5 and not held & trained and len(trained) == 15
    config.images.resolutions = [64]
    assert list(encoded(config).left_out.values()) == [cache.SMALL] * 10


def test_what_is_encoded_is_encoded_once(config, monkeypatch):
    whole = encoded(config)

    def encode(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(K2, "encode_images", encode)
    assert encoded(config).fingerprint == whole.fingerprint
    config.images.heldout, config.images.measured, config.images.drop_caption = 0.5, 9, 0.5  # of no consequence to it
    assert len(encoded(config).train) == 10
    for field, value in (("max_tokens", 32), ("multiple", 16), ("max_cut", 0.1), ("resolutions", [16])):
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="encoded again"):
            patch.setattr(config.images, field, value)
            encoded(config)


def test_encoding_that_was_killed_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "SHARD", 6)
    whole = encoded(config)
    (tmp_path / "cache").rename(tmp_path / "whole")
    calls = []

    def killed(self, images, batch=16):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, images, batch)

    encode = K2.encode_images
    monkeypatch.setattr(K2, "encode_images", killed)
    with pytest.raises(KeyboardInterrupt):
        encoded(config)
    again = encoded(config)
    assert calls == [6, 6, 6, 6, 2]  # two shards, the third was killed, and again
    for path in whole.folder.glob("*"):
        other = again.folder / path.name
        assert (tmp_path / "whole" / whole.folder.name / path.name).read_bytes() == other.read_bytes()


def test_a_damaged_shard_is_named(config):
    file = encoded(config).folder / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00000\.safetensors: is damaged .*; remove it, and it is made again"):
        encoded(config)


def test_what_is_read_belongs_to_the_reader(config, monkeypatch):
    """Shards stay open, the latest ones, and a write to what was read is not there at the next reading."""
    monkeypatch.setattr(shard_cache, "SHARD", 6)
    monkeypatch.setattr(shard_cache, "OPEN", 2)
    images = encoded(config)
    count = len(images.entries)
    first = [tuple(map(torch.clone, images.read(i, 0.0))) for i in range(count)]
    for i in range(count):
        for part in images.read(i, 0.0):
            part.zero_()
    for i in range(count):
        assert all(map(torch.equal, images.read(i, 0.0), first[i]))
    assert len(images._shards._files) == 2


def test_a_full_disk_is_told(config, command, tmp_path):
    result = command("sft", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), limit=20_000)
    assert result.returncode == 2 and "images.cache: " in result.stderr and "no space left; free some" in result.stderr
    assert not (tmp_path / "run").exists()
