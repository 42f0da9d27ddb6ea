"""The bench on a tiny K2: what it counts against torch's own counter, what it writes, and its plans."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from posttrain import flops
from posttrain.k2 import K2, Text
from posttrain.policy import POLICY

N, L, B, RANK = 12, 7, 2, 4


@pytest.fixture(scope="module")
def k2():
    made = K2.random("cpu", torch.float32, "tiny", text=False)
    made.add_role(POLICY, RANK, 4.0)
    return made


def counted(k2, role, backward):
    x, text = torch.randn(B, N, k2.latent_channels), Text(k2.fuse(k2.random_features(L))[None])
    k2.train_role(POLICY)
    # The math kernel is made of products that the counter knows on every device.
    with FlopCounterMode(display=False) as counter, k2.role(role), sdpa_kernel(SDPBackend.MATH):
        with torch.set_grad_enabled(backward):
            v = k2.velocity(x, 0.5, text, 3 * k2.pixel_multiple, 4 * k2.pixel_multiple)
        if backward:
            v.square().mean().backward()
    return counter.get_total_flops()


def test_forward_is_what_torch_counts(k2):
    shape = flops.Shape.of(k2)
    assert counted(k2, None, False) == B * flops.forward(shape, N, L)
    assert counted(k2, POLICY, False) == B * flops.forward(shape, N, L, RANK)


def test_backward_is_what_torch_counts(k2):
    shape = flops.Shape.of(k2)
    assert counted(k2, POLICY, True) == B * (flops.forward(shape, N, L, RANK) + flops.backward(shape, N, L, RANK))


def test_true_size():
    """512 x 512 has 1024 image tokens: T = 1129, d = 6144, d_kv = 1536, f = 16384, 28 blocks.

    Linears 2 T (3 d^2 + 2 d d_kv + 3 d f) = 2 * 1129 * 434,110,464 = 980.2 G, attention 4 T^2 d = 31.3 G.
    """
    k2_size = flops.Shape(28, 6144, 1536, 16384, 64, 256)
    assert flops.forward(k2_size, 1024, 105) == pytest.approx(28 * (980.22e9 + 31.33e9) + 2.14e9, rel=1e-4)
