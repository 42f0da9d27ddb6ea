"""Useful floating-point operations of K2's transformer: those of image tokens and real text tokens, and no others.

A product of (m, k) and (k, n) counts 2 m k n, as in torch's FlopCounterMode. What is padded, masked, recomputed in
backward or done a second time by an attention kernel is not counted, nor are norms, activations and the text fusion,
which a prompt needs once. Of T = L + N tokens, of which N are of the image and C their channels, width d, d_kv of keys
and values, feed-forward width f, a block of the forward costs

    linears     2 T (3 d^2 + 2 d d_kv + 3 d f)          q, gate, out; k, v; gate, up, down
    attention   4 T^2 d                                 scores, and sums of the values
    adapters    2 T r (in + out) for each linear

and around the blocks 4 N C d for the tokens, 2 (e d + d^2 + 6 d^2) a sample for its time, e wide. Backward with frozen
weights costs as much again as linears and attention, once more for attention, whose both factors have gradients, and
twice the adapters: they too have two. What the first block reads has no gradient: for its q, k, v and gate the base
costs nothing then, and its adapters, of which only the factors' own gradients are left, one product of three less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.model.k2 import K2
from posttrain.model.roles import TARGETS

INPUTS = TARGETS[:4]
"""The linears that read a block's input: q, k, v and gate."""


@dataclass(frozen=True)
class Shape:
    """Of a transformer."""

    blocks: int
    width: int
    kv: int
    ff: int
    channels: int
    time: int

    @staticmethod
    def of(k2: K2) -> Shape:
        config = k2.transformer.config
        head, heads = config["attention_head_dim"], config["num_attention_heads"]
        kv, time = head * config["num_key_value_heads"], config["timestep_embed_dim"]
        ff, channels = config["intermediate_size"], config["in_channels"]
        return Shape(config["num_layers"], head * heads, kv, ff, channels, time)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Width of input and output of each linear of a block."""
        d, kv, ff = self.width, self.kv, self.ff
        sizes = [(d, d), (d, kv), (d, kv), (d, d), (d, d), (d, ff), (d, ff), (ff, d)]
        return dict(zip(TARGETS, sizes))


def block(shape: Shape, tokens: int, rank: int = 0) -> int:
    """Of one sample's forward through one block; `rank` of adapters on all linears, 0 for none."""
    linears = sum(2 * tokens * (a * b + rank * (a + b)) for a, b in shape.linears().values())
    return linears + 4 * tokens * tokens * shape.width


def forward(shape: Shape, image: int, text: int, rank: int = 0) -> int:
    """Of one sample of `image` and `text` tokens."""
    d = shape.width
    around = 4 * image * shape.channels * d + 2 * (shape.time * d + d * d + 6 * d * d)
    return shape.blocks * block(shape, image + text, rank) + around


def of_sizes(k2: K2, sizes: Iterable[Sequence[int]]) -> list[float]:
    """Of an image's forward at each (height, width) in pixels, without text: what one costs beside another."""
    shape = Shape.of(k2)
    return [float(forward(shape, k2.image_tokens(height, width), 0)) for height, width in sizes]


def backward(shape: Shape, image: int, text: int, rank: int) -> int:
    """Of one sample, where adapters of this rank on all linears are trained, and nothing else."""
    d, tokens = shape.width, image + text
    linears = sum(2 * tokens * (a * b + 2 * rank * (a + b)) for a, b in shape.linears().values())
    first = sum(2 * tokens * (a * b + rank * a) for name, (a, b) in shape.linears().items() if name in INPUTS)
    return shape.blocks * (linears + 8 * tokens * tokens * d) - first + 2 * image * shape.channels * d
