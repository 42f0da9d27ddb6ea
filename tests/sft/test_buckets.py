"""Buckets, crops, the order of batches, and the training times: the arithmetic of finetuning, without a model."""

import math
from collections import Counter

import pytest
import torch

from posttrain.model import sampler
from posttrain.sft.buckets import buckets, crop, cut, enlargement, nearest
from posttrain.sft.losses import flow_loss
from posttrain.sft.order import Order


def worst_cut(choices):
    """The most that is cut off an image whose sides are up to 2 to 1."""
    worst = 0.0
    for i in range(4001):
        ratio = math.exp(math.log(2) * (2 * i / 4000 - 1))
        size = (10_000, round(10_000 * ratio))
        worst = max(worst, cut(size, crop(size, nearest(size, choices))))
    return worst


def test_buckets_of_k2_and_nano():
    """11 of 3840 to 4096 tokens of 16 x 16 pixels, at most an eighth cut off; of nano 5 of 60 to 64 tokens of 8 x 8."""
    k2, nano = buckets(1024, 64, 2.0), buckets(64, 8, 2.0)
    assert k2[0] == (768, 1344) and (1024, 1024) in k2 and k2[-1] == (1408, 704)
    assert len(k2) == 11 and {h * w // 256 for h, w in k2} >= {3840, 4096}
    assert min(h * w // 256 for h, w in k2) == 3840 and max(h * w // 256 for h, w in k2) == 4096
    assert worst_cut(k2) == pytest.approx(0.125, abs=1e-3)
    assert nano == [(48, 80), (56, 72), (64, 64), (72, 56), (80, 48)]
    assert {h * w // 64 for h, w in nano} == {60, 63, 64}
    assert worst_cut(nano) == pytest.approx(0.167, abs=1e-3)


def test_no_image_is_distorted_or_enlarged_without_a_word():
    """A box has the bucket's ratio, lies in the image around its centre, and touches two of its sides."""
    for size in ((1080, 1920), (1920, 1080), (3000, 3001), (1, 1), (20_000, 12_000), (64, 64)):
        bucket = nearest(size, buckets(1024, 64, 2.0))
        left, top, right, bottom = crop(size, bucket)
        width, height = right - left, bottom - top
        assert width / height == pytest.approx(bucket[1] / bucket[0])
        assert left + right == pytest.approx(size[1]) and top + bottom == pytest.approx(size[0])
        assert min(left, top) == pytest.approx(0, abs=1e-9)
        assert enlargement(size, bucket) == pytest.approx(bucket[0] / height)
        assert cut(size, crop(size, bucket)) == pytest.approx(1 - width * height / (size[0] * size[1]), abs=1e-9)
    assert enlargement((512, 512), (1024, 1024)) == 2 and enlargement((2048, 4096), (1024, 1024)) == 0.5
    assert cut((64, 64), crop((64, 64), (64, 64))) == 0
    # 1080 x 1920 in 768 x 1344: as high as it is, 1080 * 1344 / 768 = 1890 wide, of 1920
    assert crop((1080, 1920), (768, 1344)) == pytest.approx((15, 0, 1905, 1080))
    assert cut((1080, 1920), (15, 0, 1905, 1080)) == pytest.approx(30 / 1920)


def test_the_shift_is_that_of_the_bucket():
    """e^mu at 256, 1024, 4096 and 6400 tokens, beside which musubi's 1.6, 2.5 and 3.2 are rounded."""
    shifts = [math.exp(sampler.resolution_mu(tokens)) for tokens in (256, 1024, 4096, 6400)]
    assert shifts == pytest.approx([1.6487, 1.7883, 2.4750, 3.1582], abs=1e-4)
    assert [math.log(x) for x in (1.6, 2.5, 3.2)] == pytest.approx([0.4700, 0.9163, 1.1632], abs=1e-4)
    assert sampler.resolution_mu(3840) == pytest.approx(0.87917, abs=1e-5)


def test_the_share_of_noisy_times():
    """P(t > .9) at mu = .90625 and at 0, and shift is added to mu."""
    n = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    for mean, mu, share in ((0.0, 0.90625, 0.0984), (0.0, 0.0, 0.0140), (0.40625, 0.5, 0.0984)):
        t = sampler.logit_normal(n, mean, 1.0, mu)
        assert float((t > 0.9).float().mean()) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(("mu", "least"), [(0.0, 0.8111), (0.90625, 0.5610)])
def test_the_least_loss_on_gaussian_data(mu, least):
    """Data N(m, .5^2): the best velocity is E[u | x_t], linear in x_t. No other has a lower loss."""
    generator, count, m, s = torch.Generator().manual_seed(0), 400_000, 0.7, 0.5
    x0 = m + s * torch.randn(count, 1, 1, generator=generator)
    eps = torch.randn(count, 1, 1, generator=generator)
    t = sampler.logit_normal(torch.randn(count, generator=generator), 0.0, 1.0, mu)
    x, u, column = sampler.noised(x0, eps, t), sampler.velocity_target(x0, eps), t.view(-1, 1, 1)
    slope = (column - (1 - column) * s**2) / (column**2 + (1 - column) ** 2 * s**2)
    best = -m + slope * (x - (1 - column) * m)
    losses = flow_loss(best, u)
    assert losses.shape == (count,)
    assert float(losses.mean()) == pytest.approx(least, abs=4e-3)  # four standard errors
    assert float(flow_loss(best + 0.1, u).mean()) == pytest.approx(least + 0.01, abs=4e-3)


# ---- the order of batches -----------------------------------------------------------------------------------------


def sizes(counts):
    """Entries by number, of buckets (0,), (1,), ... with these counts."""
    entries = {}
    for bucket, count in enumerate(counts):
        for _ in range(count):
            entries[3 * len(entries) + 1] = (bucket,)
    return entries


def test_batches_are_of_one_bucket_and_take_all_entries_equally_often():
    bucket_of = sizes([13, 7, 2])
    order, seen = Order(bucket_of, 4, seed=5), Counter()
    for step in range(1, 551):  # 2200 entries: a hundred epochs
        entries = order(step)
        assert len(entries) == 4 and len({bucket_of[entry] for entry in entries}) == 1
        seen.update(entries)
    assert seen.keys() == bucket_of.keys() and sum(seen.values()) == 2200
    # What waits is less than a batch of each bucket.
    assert max(seen.values()) - min(seen.values()) <= 4
    assert order.small() == {(2,): 2}
    assert Order(sizes([4, 9]), 4, 0).small() == {}


def test_an_epoch_comes_once_before_the_next():
    """Of one bucket whose entries divide by the batch, each epoch is a permutation, and another each time."""
    order = Order(sizes([12]), 4, seed=0)
    epochs = [[entry for step in range(3 * e + 1, 3 * e + 4) for entry in order(step)] for e in range(3)]
    assert all(sorted(epoch) == sorted(sizes([12])) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_that_of_the_seed_from_any_step():
    whole = Order(sizes([11, 6]), 3, seed=7)
    batches = [whole(step) for step in range(1, 41)]
    again = Order(sizes([11, 6]), 3, seed=7)
    assert again(31) == batches[30] and again(31) == batches[30] and again(40) == batches[39]
    assert again(2) == batches[1]  # an earlier one
    assert [Order(sizes([11, 6]), 3, seed=8)(step) for step in range(1, 5)] != batches[:4]
