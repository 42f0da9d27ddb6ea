"""TIES, sign conflict and the SVD of a difference, by numbers worked out by hand."""

import math

import pytest
import torch

from posttrain.merge import algebra
from posttrain.model.adapters import low_rank

A, B = torch.tensor([3.0, -2.0, 0.5, 0.1]), torch.tensor([-1.0, -4.0, 0.4, 2.0])


def test_ties_of_four_entries():
    """Density .5 keeps (3, -2, 0, 0) and (0, -4, 0, 2). The sums' signs are +, -, 0, +; means of what agrees."""
    assert algebra.ties([A, B], [1, 1], 0.5).tolist() == [3, -3, 0, 2]
    assert algebra.ties([A, B], [1, 1], 0.5, 0.5).tolist() == [1.5, -1.5, 0, 1]
    # Only ratios of weights count: (-2 + 3 * -4) / 4 = -3.5.
    expected = [3, -3.5, 0, 2]
    assert algebra.ties([A, B], [1, 3], 0.5).tolist() == expected == algebra.ties([A, B], [0.5, 1.5], 0.5).tolist()
    # All entries: 3 beats -1, both agree on the second and third, and (.1 + 2) / 2.
    assert algebra.ties([A, B], [1, 1], 1.0) == pytest.approx(torch.tensor([3.0, -3.0, 0.45, 1.05]))
    assert algebra.ties([A], [2.0], 0.25).tolist() == [3, 0, 0, 0]
    # Two that cancel elect no sign.
    assert algebra.ties([A, -A], [1, 1], 1.0).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("part", [2**18, 500])
def test_density_keeps_that_share(part, monkeypatch):
    """Of one change; also in parts, over which the share is counted as a whole."""
    monkeypatch.setattr(algebra, "PART", part)
    change = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    for density in (1e-9, 0.01, 0.3, 0.999):
        kept = algebra.ties([change], [0.5], density)
        assert int((kept != 0).sum()) == max(1, round(density * change.numel()))
        assert torch.equal(kept[kept != 0], change[kept != 0])
        assert kept[kept != 0].abs().min() >= change[kept == 0].abs().max()
    assert torch.equal(algebra.ties([change], [0.5], 1.0), change)


def test_sign_conflict():
    """Of check 48: positive parts (3, 0, .9, 2.1), negative (1, 6, 0, 0): (1 + 0 + 0 + 0) / (3 + 6 + .9 + 2.1)."""
    found = algebra.overlap([A, B], [1, 1])
    assert found.conflict == pytest.approx(1 / 12)
    assert found.products[0][1] == pytest.approx(-3 + 8 + 0.2 + 0.2)
    assert found.cosine(0, 1) == pytest.approx(5.4 / (A.norm() * B.norm()).item())
    assert algebra.overlap([A, -A], [1, 1]).conflict == 1 and algebra.overlap([A, A], [1, 2]).conflict == 0
    # A weight below 0 turns agreement into conflict, and weights count: 1 against 3.
    assert algebra.overlap([A, A], [1, -1]).conflict == 1
    assert algebra.overlap([A, -A], [1, 3]).conflict == pytest.approx(1 / 3)
    zero = algebra.overlap([torch.zeros(4)], [1])
    assert zero.conflict is None and zero.cosine(0, 0) is None


def test_overlap_by_factors_is_that_of_the_matrices(monkeypatch):
    """Also in blocks of rows, with ranks of their own, and with a change that leaves the layer as it is."""
    monkeypatch.setattr(algebra, "ROWS", 7)
    generator = torch.Generator().manual_seed(1)

    def factors(rank):
        shapes = (40, rank), (rank, 24)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    pairs, weights = [factors(4), None, factors(6)], [0.5, 2.0, -0.7]
    whole = algebra.overlap([pairs[0][0] @ pairs[0][1], torch.zeros(40, 24), pairs[2][0] @ pairs[2][1]], weights)
    found = algebra.overlap_of_factors(pairs, weights)
    for row, other in zip(found.products, whole.products):
        assert row == pytest.approx(other, rel=1e-12, abs=1e-9)
    assert (found.opposed, found.leading) == pytest.approx((whole.opposed, whole.leading), rel=1e-12)
    assert found.norms[1] == 0 and found.cosine(0, 1) is None
    assert algebra.total([found, whole]).norms[0] == pytest.approx(math.sqrt(2) * found.norms[0])


def test_dare_is_left_out_for_its_noise():
    """Check 45, why there is no DARE: dropping a share 1 - d and scaling up is noise of sqrt((1 - d) / d), and a masked
    rank-8 change has full rank."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(400, 8, generator=generator) @ torch.randn(8, 400, generator=generator)
    for density, noise in ((0.5, 1.0), (0.9, 1 / 3), (0.1, 3.0)):
        masked = change * (torch.rand(400, 400, generator=generator) < density) / density
        assert float((masked - change).norm() / change.norm()) == pytest.approx(noise, rel=0.02)
        assert torch.linalg.matrix_rank(masked) == 400


def test_errors_of_known_singular_values():
    """diag(3, 2, 1): sqrt(1 / 14) without the last, sqrt(5 / 14) with the first alone; the least rank for an error."""
    diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    for rank, error in ((1, 0.597614), (2, 0.267261), (3, 0.0), (9, 0.0)):
        assert algebra.low_rank(diagonal, rank).error == pytest.approx(error, abs=5e-7)
    for error, rank in ((0.6, 1), (0.59, 2), (0.2673, 2), (0.2672, 3), (1e-9, 3)):
        found = algebra.low_rank(diagonal, error=error)
        assert found.a.shape == (rank, 3) and found.error <= error
    assert algebra.least_rank([3, 2, 1], math.sqrt(14), 1e-12, 2) == 2


def test_energy_and_error():
    """Check 50: energy kept 1 - err^2 at the published errors of Turbo minus Raw; noise of rank n / 96 keeps little."""
    assert [1 - e * e for e in (0.461, 0.415, 0.366)] == pytest.approx([0.7875, 0.8278, 0.8660], abs=5e-5)
    noise = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    assert algebra.low_rank(noise, 8).error == pytest.approx(0.981, abs=0.003)


def test_the_randomised_svd_is_near_the_exact_one(monkeypatch):
    """On a spectrum that falls as 1 / k. Its error is the measured one; the same seed gives the same factors, and the
    global generator stays as it is."""
    generator = torch.Generator().manual_seed(0)
    q1, q2 = (torch.linalg.qr(torch.randn(300, 300, generator=generator))[0] for _ in range(2))
    matrix = (q1 / torch.arange(1, 301)) @ q2.mT
    exact = algebra.low_rank(matrix, 32)
    monkeypatch.setattr(algebra, "EXACT", 64)
    before = torch.get_rng_state()
    found, again = algebra.low_rank(matrix, 32), algebra.low_rank(matrix, 32)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(found.a, again.a)
    assert exact.error < found.error < 1.01 * exact.error
    assert found.residual == pytest.approx(float((matrix - found.b @ found.a).norm()))
    assert algebra.low_rank(matrix, error=0.25).error <= 0.25
    # What is of low rank is found as it is.
    low = (q1[:, :8] @ q2[:8]) * 3
    assert algebra.low_rank(low, 8).error < 1e-5


def test_concatenation_of_fp32_factors():
    """Checks 46 and 51 in the type that files have: rank 32 with alpha 64 is a scale of 2; the sum to 1e-6."""
    generator = torch.Generator().manual_seed(2)
    pairs = [(torch.randn(96, r, generator=generator), torch.randn(r, 64, generator=generator)) for r in (32, 4)]
    (b1, a1), (b2, a2) = pairs
    b, a = low_rank.concatenate([(64 / 32 * b1, a1), (b2, a2)], [0.5, 0.7])
    expected = 0.5 * 2 * b1.double() @ a1.double() + 0.7 * b2.double() @ a2.double()
    assert (b @ a - expected).norm() < 1e-6 * expected.norm()
