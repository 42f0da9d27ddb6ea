"""The losses of the judges, against arithmetic."""

import math

import pytest
import torch

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
