"""What references cost, by arithmetic."""

import pytest

from posttrain.bench import counts
from posttrain.config.load import load_config
from posttrain.model import flops


def test_a_step_with_references():
    """Two of three images shown one reference as large as the image: their part of a forward is counted."""
    config, _ = load_config("style", ["--config", "recipes/k2/style.yaml", "--references.sizes", "[512]"])
    config.references.drop, config.references.drop_both, config.references.two = 1 / 3, 0.0, 0.0
    shape = flops.Shape(28, 6144, 1536, 16384, 64, 256)
    cost = counts.Cost(shape, 16, 128, 64)
    one = flops.forward_with_references(shape, 1024, 128, [1024], cached=False, rank=64)
    ratio = 1 + 2 / 3 * (one / flops.forward(shape, 1024, 128, 64) - 1)
    assert counts._shown(config, cost, (512, 512)) == pytest.approx(ratio) and 1.5 < ratio < 1.7
