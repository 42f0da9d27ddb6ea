"""The losses and the calibration of the judges, against arithmetic."""

import math

import numpy as np
import pytest
import torch

from posttrain.judge.calibration import auroc, brier, expected_calibration_error, reliability
from posttrain.judge.losses import bradley_terry, faulty


def test_bradley_terry_holds_the_offset():
    """Scores 2 and 1: log(1 + e^-1) + 0.01 (2 + 1)^2 = .313262 + .09; 3 higher each, the second part is .81."""
    for shift, expected in ((0.0, 0.403262), (3.0, 1.123262)):
        loss, _ = bradley_terry(torch.tensor([2 + shift]), torch.tensor([1 + shift]), torch.tensor([1.0]))
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_faulty_is_the_cross_entropy_with_the_votes():
    """sigma(0) = 1/2 costs log 2 whatever the votes; rho = log 3 is P = 3/4: -(.8 log .75 + .2 log .25) = .507405;
    its derivative is P - share = -.05. A score is right where it is on the votes' side of a half."""
    rho = torch.tensor([0.0, math.log(3), -2.0], requires_grad=True)
    loss, metrics = faulty(rho, torch.tensor([0.3, 0.8, 1.0]))
    assert loss[:2].tolist() == pytest.approx([math.log(2), 0.507405], abs=1e-6)
    assert loss[2].item() == pytest.approx(math.log(1 + math.exp(2)), abs=1e-6)
    loss.sum().backward()
    assert rho.grad is not None and rho.grad[1].item() == pytest.approx(-0.05, abs=1e-6)
    assert metrics["accuracy"].item() == 2


def test_bradley_terry_arithmetic():
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    # -log sigma(1) = .313262; the offset term adds .01 (1 + 0)^2
    loss, _ = bradley_terry(one, zero, one)
    assert loss.item() == pytest.approx(0.313262 + 0.01, abs=1e-6)
    gap = torch.tensor([1.0], requires_grad=True)
    bradley_terry(gap, gap.detach() - 1, one)[0].sum().backward()
    offset = 2 * 0.01 * (1.0 + 0.0)
    assert gap.grad is not None and gap.grad.item() == pytest.approx(-0.268941 + offset, abs=1e-6)
    # three of four votes: the gap that is best is ln 3, with the sum of scores at 0
    scores = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=0.5)
    for _ in range(800):
        optimizer.zero_grad()
        bradley_terry(scores[:1], scores[1:], torch.tensor([0.75]))[0].sum().backward()
        optimizer.step()
    assert (scores[0] - scores[1]).item() == pytest.approx(math.log(3), abs=1e-4)
    assert scores.sum().item() == pytest.approx(0, abs=1e-5)
    # logits 2 for yes and 0 for no: P(yes) = .880797
    assert torch.tensor(2.0).sigmoid().item() == pytest.approx(0.880797, abs=1e-6)


def test_calibration_arithmetic():
    p, y = np.array([0.05, 0.15, 0.85, 0.85]), np.array([0.0, 1.0, 1.0, 0.0])
    assert brier(p, y) == pytest.approx((0.05**2 + 0.85**2 + 0.15**2 + 0.85**2) / 4)
    assert reliability(p, y) == [(pytest.approx(0.05), 0.0, 1), (pytest.approx(0.15), 1.0, 1), (0.85, 0.5, 2)]
    assert expected_calibration_error(p, y) == pytest.approx((0.05 + 0.85 + 2 * 0.35) / 4)
    assert auroc(p, y) == pytest.approx((1 + 0.0 + 1 + 0.5) / 4)
    assert math.isnan(auroc(p, np.ones(4)))
