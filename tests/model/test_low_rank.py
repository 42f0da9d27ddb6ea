"""Sums of low-rank updates and their way back to a rank, against whole matrices."""

import math

import pytest
import torch

from posttrain.model.adapters import low_rank


def factors(seed: int, rank: int, out: int = 40, into: int = 24):
    generator = torch.Generator().manual_seed(seed)
    shapes = (out, rank), (rank, into)
    b, a = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return b, a


def test_concatenation_is_the_weighted_sum():
    """Scales 2 and 1, weights .5 and .7, ranks 4 and 6: to 1e-12. In between, the scale belongs to B."""
    (b1, a1), (b2, a2) = factors(0, 4), factors(1, 6)
    b, a = low_rank.concatenate([(2.0 * b1, a1), (b2, a2)], [0.5, 0.7])
    assert b.shape == (40, 10) and a.shape == (10, 24)
    expected = 0.5 * 2.0 * b1 @ a1 + 0.7 * b2 @ a2
    assert (b @ a - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_small_svd_is_that_of_the_whole_matrix(rank):
    b, a = low_rank.concatenate([factors(2, 5), factors(3, 4)], [1.0, -0.3])
    whole = b @ a
    u, sigma, vh = torch.linalg.svd(whole)
    expected = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
    found = low_rank.truncate(b, a, rank)
    assert found.b.shape == (40, rank) and found.a.shape == (rank, 24)
    assert (found.b @ found.a - expected).norm() < 1e-12 * whole.norm()
    assert found.norm == pytest.approx(float(whole.norm()), rel=1e-12)
    assert found.residual == pytest.approx(float((whole - found.b @ found.a).norm()), abs=1e-12 * float(whole.norm()))
    # Both factors have the roots of the singular values.
    for factor in (found.b, found.a):
        assert torch.linalg.svdvals(factor) == pytest.approx(sigma[:rank].sqrt(), rel=1e-10)


def test_error_of_known_singular_values():
    """diag(3, 2, 1): sqrt(1 / 14) = .267261 without the last, sqrt(5 / 14) = .597614 with the first alone."""
    diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64)
    two, one = (low_rank.truncate(diagonal, eye, rank) for rank in (2, 1))
    assert (two.error, one.error) == pytest.approx((0.267261, 0.597614), abs=5e-7)
    assert low_rank.truncate(diagonal, eye, 3).error == 0
    # Over both layers: sqrt((1 + 5) / (14 + 14)).
    assert low_rank.error_of([two, one]) == pytest.approx(math.sqrt(6 / 28))


def test_inner_product():
    """Check 49: <B1 A1, B2 A2> = 1 x 1 of the smaller products, to 1e-12."""
    first, second = factors(4, 4), factors(5, 7)
    whole = float(((first[0] @ first[1]) * (second[0] @ second[1])).sum())
    assert low_rank.inner(first, second) == pytest.approx(whole, rel=1e-12)


def test_edges():
    """A rank above what there is, factors wider than the layer, an update of zeros, and nothing to add."""
    b, a = factors(6, 3, out=2, into=24)
    found = low_rank.truncate(b, a, 8)
    assert found.b.shape == (2, 2) and found.a.shape == (2, 24)
    assert found.error < 1e-15 and (found.b @ found.a - b @ a).norm() < 1e-12
    zero = low_rank.truncate(torch.zeros(4, 2), torch.ones(2, 3), 1)
    assert zero.error == 0 and low_rank.error_of([zero]) == 0
    with pytest.raises(ValueError, match="0 updates and 0 weights"):
        low_rank.concatenate([], [])
    with pytest.raises(ValueError, match="give one weight for each"):
        low_rank.concatenate([(b, a)], [1.0, 2.0])
