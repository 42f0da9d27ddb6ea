"""STPO's loss against its formula, its invariants and the arithmetic of small cases."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posttrain.stpo.losses import bounded, error_change, exact_guard, inner, label, norm, preference_terms

STPO = {"beta": 2000.0, "guard": 0.6, "bound": None, "anchor": 0.01, "hinge": 0.0}
DPO = {"beta": 2000.0, "guard": None, "bound": None, "anchor": 0.0, "hinge": 0.0}


def square(x):
    return x.square().flatten(1).mean(1)


def tensors(seed: int, pairs: int = 5, apart: float = 0.3, dtype=torch.float32):
    """v_w, v_l, reference_w, reference_l, target_w, target_l of (B, 3, 4); policy and reference are `apart`."""
    generator = torch.Generator().manual_seed(seed)
    r_w, r_l, u_w, u_l, d_w, d_l = (torch.randn(pairs, 3, 4, generator=generator, dtype=dtype) for _ in range(6))
    return r_w + apart * d_w, r_l + apart * d_l, r_w, r_l, u_w, u_l


def gradient(v_w, v_l, *rest, share=None, **settings):
    """Of the sum over pairs of all terms, with respect to both outputs; and the metrics."""
    v_w, v_l = v_w.clone().requires_grad_(), v_l.clone().requires_grad_()
    share = torch.ones(len(v_w)) if share is None else share
    terms, metrics = preference_terms(v_w, v_l, *rest, share, **settings)
    return torch.autograd.grad(sum(t.sum() for t in terms.values()), (v_w, v_l)), metrics  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [STPO, DPO, {**STPO, "bound": 8.0, "hinge": 0.25}])
def test_at_the_reference(settings):
    """z = 0 and the loss is ln 2 = .693147; dL/da = beta/4 = 500, so the gradient of v_w is 500 * 2 (v - u) / D.

    That of v_l is its opposite times l, and anchor and hinge pull nowhere (the hinge is off where nothing rose).
    """
    v_w, v_l, _, _, u_w, u_l = tensors(0, apart=0.0)
    (g_w, g_l), metrics = gradient(v_w, v_l, v_w, v_l, u_w, u_l, **{**settings, "hinge": 0.0})
    assert (metrics["loss"] - math.log(2)).abs().max() < 1e-6
    for name in ("winner", "loser", "z", "margin", "drift_winner", "drift_loser"):
        assert metrics[name].abs().max() == 0
    assert (metrics["accuracy"] == 0.5).all()  # no pair is told apart yet
    torch.testing.assert_close(g_w, 500 * 2 * (v_w - u_w) / 12)
    torch.testing.assert_close(g_l, -500 * 2 * (v_l - u_l) / 12 * metrics["guard"][:, None, None])
    assert torch.equal(metrics["guard"] == 1, torch.tensor([settings["guard"] is None] * 5) | (metrics["guarded"] == 0))


@pytest.mark.parametrize("share", [1.0, 0.8])
@pytest.mark.parametrize("settings", [STPO, DPO, {**STPO, "bound": 2.0, "hinge": 0.25, "beta": 20.0}])
def test_gradient_is_that_of_the_formula(settings, share):
    """The formula in fp64 with autograd, the guard by the stop-gradient l phi + sg((1 - l) phi)."""
    v_w, v_l, r_w, r_l, u_w, u_l = given = tensors(1, apart=0.05)
    p = torch.full((5,), share)
    (g_w, g_l), metrics = gradient(*given, share=p, **settings)
    v_w, v_l, r_w, r_l, u_w, u_l = (x.double() for x in given)
    v_w.requires_grad_()
    v_l.requires_grad_()
    beta = settings["beta"]
    dw, dl = square(v_w - u_w) - square(r_w - u_w), square(v_l - u_l) - square(r_l - u_l)
    zeta = math.inf if settings["bound"] is None else 2 * settings["bound"] / beta
    phi = dl if zeta == math.inf else torch.where(dl > 0, zeta * (1 - (-dl / zeta).exp()), dl)
    e_w, e_l = v_w - u_w, v_l - u_l
    product = (e_w * e_l).flatten(1).mean(1)
    kept = torch.ones(5).double()
    if settings["guard"] is not None:
        limit = ((1 - settings["guard"]) * square(e_w) / product).clamp(0, 1)
        back = torch.sigmoid(beta / 2 * (phi - dw)) > share
        kept = torch.where((product > 0) & ~back, limit, 1.0).detach()
    z = beta / 2 * ((kept * phi + ((1 - kept) * phi).detach()) - dw)
    loss = -(share * F.logsigmoid(z) + (1 - share) * F.logsigmoid(-z))
    loss = loss + beta / 2 * settings["anchor"] * (square(v_w - r_w) + square(v_l - r_l))
    torch.testing.assert_close(metrics["loss"].double(), loss.detach(), rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad((loss + beta / 2 * settings["hinge"] * dw).sum(), (v_w, v_l))
    for got, right in zip((g_w, g_l), expected):
        assert (got - right).norm() < 1e-4 * right.norm() and right.norm() > 0
    torch.testing.assert_close(metrics["guard"].double(), kept, rtol=1e-5, atol=1e-6)
    for name, right in {"winner": dw, "loser": dl, "margin": dl - dw, "drift_winner": square(v_w - r_w),
                        "winner_error": square(r_w - u_w), "loser_error": square(r_l - u_l),
                        "cosine": product / (square(e_w) * square(e_l)).sqrt()}.items():  # fmt: skip
        torch.testing.assert_close(metrics[name].double(), right.detach(), rtol=1e-4, atol=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


def test_the_error_change_does_not_cancel():
    """In fp32, a drift of 1e-6 from an error near 1: the difference of two errors would keep no digit of it."""
    generator = torch.Generator().manual_seed(0)
    reference, target, step = (torch.randn(4, 8, 8, generator=generator) for _ in range(3))
    v = reference + 1e-6 * step
    exact = square(v.double() - target.double()) - square(reference.double() - target.double())
    torch.testing.assert_close(error_change(v, reference, target).double(), exact, rtol=1e-3, atol=0)
    assert error_change(reference, reference, target).abs().max() == 0


@pytest.mark.parametrize("seed", range(3))
def test_identities(seed):
    """For a common output p and reference r, m = 2 <p - r, u_w - u_l>, linear; and with the anchor
    2 <v - v_ref, v - u> = d + (a - a0). Both to 1e-12 in fp64."""
    _, _, r, _, u_w, u_l = (x.double() for x in tensors(seed, dtype=torch.float64))
    p = r + torch.randn(r.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def change(v, u):
        return ((v - u).square() - (r - u).square()).flatten(1).mean(1)

    margin = change(p, u_l) - change(p, u_w)
    assert (margin - 2 * ((p - r) * (u_w - u_l)).flatten(1).mean(1)).abs().max() < 1e-12
    anchor = 2 * ((p - r) * (p - u_w)).flatten(1).mean(1)
    assert (anchor - (square(p - r) + change(p, u_w))).abs().max() < 1e-12
    # the same, as the loss has it
    _, metrics = gradient(*(x.float() for x in (p, p, r, r, u_w, u_l)), **DPO)
    torch.testing.assert_close(metrics["margin"].double(), margin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loser", "kept"),
    [((2.0, 0.0), 0.2), ((0.3, 0.0), 1.0), ((0.0, 1.0), 1.0), ((-1.0, 0.0), 1.0)],
)
def test_guard_of_one_pair(loser, kept):
    """e_w = (1, 0), mu = .6: .4 * 1 / 2 = .2; .4 / .3 is above 1; no inner product, or one below 0, is let be."""
    zero = torch.zeros(1, 1, 2)
    v_w, v_l = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[loser]])
    _, metrics = gradient(v_w, v_l, v_w, v_l, zero, zero, **STPO)
    assert metrics["guard"].item() == pytest.approx(kept)


def one(x):
    return torch.full((1, 1, 1), x)


def test_a_share_of_the_rejected_gradient_leaves_the_value():
    """a = (theta - 1)^2, b = theta^2, theta = .4, a0 = .5, b0 = .3, l = .3, beta = 10: z = 5 ((.16 - .3) - (.36 - .5))
    = 0 whatever l, kappa = 5 s(0) = 2.5, and dL/dtheta = kappa (2 * -.6 - 2 * .3 * .4) = -3.6."""
    v = one(0.4).requires_grad_()
    # (r - 1)^2 = .5 and r'^2 = .3: each branch has a reference of its own
    r_w, r_l = one(1 - math.sqrt(0.5)), one(math.sqrt(0.3))
    terms, metrics = preference_terms(
        v, v, r_w, r_l, one(1.0), one(0.0), torch.ones(1), **{**DPO, "beta": 10.0}
    )  # fmt: skip
    (g,) = torch.autograd.grad((terms["winner"] + 0.3 * terms["loser"]).sum(), v)  # as the exact guard applies it
    assert metrics["z"].item() == pytest.approx(0, abs=1e-6) and g.item() == pytest.approx(-3.6, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(0.693147, abs=1e-6)


def test_guarded_gradient_of_a_scalar():
    """u_w = 0, u_l = -.4, theta = .4: e_w = .4, e_l = .8, l = (1 - mu) .16 / .32 = .3 at mu = .4. With a0 = b0 = .25,
    z = 5 ((.64 - .25) - (.16 - .25)) = 2.4 as without the guard, and dL/dtheta = 5 s(-2.4) (2 * .4 - 2 * .3 * .8)."""
    v = one(0.4).requires_grad_()
    terms, metrics = preference_terms(
        v, v, one(0.5), one(0.1), one(0.0), one(-0.4), torch.ones(1), **{**DPO, "beta": 10.0, "guard": 0.4}
    )  # fmt: skip
    (g,) = torch.autograd.grad(sum(t.sum() for t in terms.values()), v)  # type: ignore[arg-type]
    assert metrics["z"].item() == pytest.approx(2.4, rel=1e-5) and metrics["guard"].item() == pytest.approx(0.3)
    assert g.item() == pytest.approx(5 / (1 + math.exp(2.4)) * (0.8 - 0.48), rel=1e-4)


def test_what_drifts_and_what_does_not():
    """One output theta for both, u_w = 1, u_l = 0, reference .25, beta = 4, 20,000 steps of .05.

    DPO: z = 4 (theta - .25) grows by .8 s(-z) a step, so e^z + z = 16,001, z = 9.68: theta = 2.670, Dw = 2.226,
    Dl = 7.066. The guard stops at u_w; the anchor's pull moves that to 1.0056; a bound of 3 nats alone, at 1.397. The
    gradient is taken once on a grid of theta, finer than what one step moves at the end, and interpolated.
    """
    grid = torch.linspace(0, 3, 300_001)[:, None, None]
    fixed = [torch.full_like(grid, x) for x in (0.25, 0.25, 1.0, 0.0)]
    variants = {"dpo": (None, 0, None), "guard": (0.6, 0, None), "anchored": (0.6, 0.01, None), "bound": (None, 0, 3)}
    end = {}
    for name, (guard, anchor, bound) in variants.items():
        settings = {"beta": 4.0, "guard": guard, "anchor": anchor, "bound": bound, "hinge": 0.0}
        slope = sum(gradient(grid, grid, *fixed, **settings)[0]).flatten().double().numpy()
        theta, scale = 0.25, 100_000
        for _ in range(20_000):
            i = int(theta * scale)
            theta -= 0.05 * (slope[i] + (theta * scale - i) * (slope[i + 1] - slope[i]))
        end[name] = theta
    assert end == pytest.approx({"dpo": 2.670, "guard": 1.000, "anchored": 1.0056, "bound": 1.397}, abs=6e-4)
    theta = end["dpo"]
    assert (theta - 1) ** 2 - 0.75**2 == pytest.approx(2.226, abs=2e-3)
    assert theta**2 - 0.25**2 == pytest.approx(7.066, abs=2e-3)


def test_the_bound_is_a_floor_of_the_loss():
    """While the chosen picture is no better than the reference's, L >= softplus(-Z): .048587 at Z = 3."""
    beta, zeta = 10.0, 2 * 3 / 10
    changes = torch.tensor([-1.0, 0.0, 1e-4, 0.5, 1e3])
    phi = bounded(changes, zeta)
    assert phi[0] == -1 and phi[1] == 0 and phi[2] == pytest.approx(1e-4, rel=1e-3) and phi[4] == zeta
    assert F.softplus(-beta / 2 * phi).min().item() == pytest.approx(0.048587, abs=1e-6)
    _, v_l, r_w, r_l, u_w, u_l = tensors(3)
    _, metrics = gradient(r_w, v_l * 1e3, r_w, r_l, u_w, u_l, **{**DPO, "beta": beta, "bound": 3.0})
    assert metrics["loss"].min().item() == pytest.approx(0.048587, abs=1e-6) and metrics["loser"].min() > 1e3


@pytest.mark.parametrize("votes", [0.8, 0.95, 1.0])
def test_votes_ask_for_a_finite_margin(votes):
    """The gradient is 0 at z = logit p: 1.386 for .8, 2.944 for .95; all votes are no more than that."""
    p = label(votes, human=True)
    target = {0.8: 1.386294, 0.95: 2.944439, 1.0: 2.944439}[votes]
    for z, sign in ((target, 0), (target + 0.1, -1), (target - 0.1, 1)):
        # z = beta/2 (0 - Dw) with e = v, so that the chosen picture's pull is what moves
        reference, v = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), math.sqrt(4 - z / 5))
        zero = torch.zeros(1, 1, 1)
        (g, _), metrics = gradient(v, reference, reference, reference, zero, zero, share=torch.tensor([p]),
                                   **{**STPO, "beta": 10.0, "anchor": 0.0})  # fmt: skip
        assert metrics["z"].item() == pytest.approx(z, rel=1e-4)
        assert abs(g.item()) < 1e-4 if sign == 0 else g.item() * sign > 0
        assert (metrics["guard"].item() == 1) == (sign < 0) or sign == 0  # the way back is not guarded


def test_labels():
    """Where nobody voted, a difference that was made is certain; votes never are."""
    assert [label(s, human=True) for s in (0.5, 0.8, 0.97, 1.0)] == [0.5, 0.8, 0.95, 0.95]
    assert [label(s, human=False) for s in (0.01, 0.8, 0.97, 1.0)] == [0.05, 0.8, 0.95, 1.0]


def test_pairs_are_not_averaged_inside_the_logarithm():
    given = tensors(4, pairs=6)
    (together_w, together_l), _ = gradient(*given, **STPO)
    for i in range(6):
        (g_w, g_l), _ = gradient(*(x[i : i + 1] for x in given), **STPO)
        torch.testing.assert_close((together_w[i : i + 1], together_l[i : i + 1]), (g_w, g_l))


def test_low_precision_is_computed_in_fp32():
    given = [x.bfloat16() for x in tensors(5)]
    (a, _), metrics = gradient(*given, **STPO)
    (b, _), expected = gradient(*(x.float() for x in given), **STPO)
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert all(torch.equal(metrics[name], expected[name]) for name in metrics)
    assert a.dtype == torch.bfloat16 and torch.allclose(a.float(), b, rtol=1e-2)


# exact mode


@pytest.mark.parametrize(
    ("winner", "loser", "kept"), [(1.0, 2.0, 0.2), (1.0, 0.3, 1.0), (1.0, -1.0, 1.0), (1.0, 0.0, 1.0), (-1.0, 1.0, 0.0)]
)
def test_exact_guard(winner, loser, kept):
    assert exact_guard(winner, loser, 0.6) == pytest.approx(kept)


def test_no_exact_step_raises_the_errors_of_the_chosen():
    """100 random batches on a network that is not linear, at weights away from the reference: to first order, a plain
    gradient step lowers the sum of the chosen pictures' errors, and by mu of what it would without the rejected."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    parameters = list(net.parameters())
    rises = conflicts = 0
    for _ in range(100):
        x_w = torch.randn(8, 1, 6)
        x_l = x_w + 0.3 * torch.randn(8, 1, 6)  # alike, as with one noise for both; and so the errors point alike
        u_w, u_l = torch.randn(8, 1, 4) + 0.5, torch.randn(8, 1, 4) + 1
        v_w, v_l = net(x_w), net(x_l)
        references = [v.detach() + 0.1 * torch.randn_like(v) for v in (v_w, v_l)]
        terms, _ = preference_terms(v_w, v_l, *references, u_w, u_l, torch.ones(8),
                                    **{**DPO, "beta": 20.0})  # fmt: skip
        g_w, g_l, n = (
            torch.autograd.grad(total, parameters, retain_graph=True)
            for total in (terms["winner"].sum(), -terms["loser"].sum(), error_change(v_w, references[0], u_w).sum())
        )
        alone = inner(g_w, n)
        kept = exact_guard(alone, inner(g_l, n), 0.6)
        step = [w - kept * l for w, l in zip(g_w, g_l)]
        rises += alone - inner(g_l, n) < 0
        if alone < 0:
            conflicts += 1
            continue
        assert inner(step, n) >= 0.6 * alone - 1e-6 * norm(g_w) * norm(n)
    assert rises > 20 and conflicts < 10  # without the guard, and where no guard can help


def test_output_guard_is_exact_where_both_share_a_jacobian():
    """One orthogonal map makes both outputs: no pair's chosen error rises by a step, to first order, and it falls by
    mu of |g_w|^2 at least. Without the guard, some rise."""
    generator = torch.Generator().manual_seed(0)
    rises = 0
    for seed in range(50):
        base = torch.randn(1, 1, 6, generator=generator)
        u_w, u_l = torch.randn(1, 1, 6, generator=generator), 2 * torch.randn(1, 1, 6, generator=generator)
        for guard in (0.6, None):
            delta = torch.zeros(1, 1, 6, requires_grad=True)
            v = base + delta
            reference = base + 0.1 * torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(seed))
            terms, metrics = preference_terms(v, v, reference, reference, u_w, u_l, torch.ones(1),
                                              **{**DPO, "guard": guard, "beta": 10.0})  # fmt: skip
            (step,) = torch.autograd.grad(sum(t.sum() for t in terms.values()), delta, retain_graph=True)  # type: ignore[arg-type]
            (n,) = torch.autograd.grad(error_change(v, reference, u_w).sum(), delta)
            kappa = 5 * metrics["sigma"].item()
            if guard is None:
                rises += float((step * n).sum()) < 0
            else:
                assert float((step * n).sum()) >= kappa * (0.6 - 1e-4) * float(n.square().sum())
    assert rises > 5


def test_norms():
    a = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert norm(a) == 5 and inner(a, [torch.tensor([1.0]), torch.tensor([[-1.0]])]) == -1
    big = [torch.full((1000,), 1e20)]
    assert np.isfinite(inner(big, big))
