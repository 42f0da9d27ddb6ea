"""Useful floating-point operations of K2's transformer: those of image tokens and real text tokens.

A product of (m, k) and (k, n) counts 2 m k n, as in torch's FlopCounterMode. Padding, recomputation in backward and
what an attention kernel does twice are not counted, nor are norms, activations and the text fusion, which runs once a
prompt. Legend: L text tokens, N image tokens of C channels, T = L + N; d width, d_kv width of keys and values, f
feed-forward width, r rank of adapters. A block's forward costs

    linears     2 T (3 d^2 + 2 d d_kv + 3 d f)          q, gate, out; k, v; gate, up, down
    attention   4 T^2 d                                 scores, and sums of the values
    adapters    2 T r (in + out) for each linear

Around the blocks, the tokens cost 4 N C d and a sample's time embedding, e wide, 2 (e d + d^2 + 6 d^2). Backward with
frozen weights costs the linears once, attention twice (both of its factors have gradients) and the adapters twice (for
inputs and factors). The input of the first block has no gradient. Its q, k, v and gate therefore cost nothing in the
base, and one product of three less in the adapters. Backward of all weights costs twice the forward, less the
gradients of the latents and of the time.
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
    """The sizes of a transformer that its cost depends on."""

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
    """Operations of one sample's forward through one block. `rank` is that of adapters on all linears; 0: none."""
    operations = 4 * tokens * tokens * shape.width
    for a, b in shape.linears().values():
        operations += 2 * tokens * (a * b + rank * (a + b))
    return operations


def forward(shape: Shape, image: int, text: int, rank: int = 0) -> int:
    """Operations of the forward of one sample of `image` and `text` tokens."""
    d = shape.width
    # Tokens in and out; the time embedding's two layers, and its projection to six modulations.
    around = 4 * image * shape.channels * d + 2 * (shape.time * d + d * d + 6 * d * d)
    return shape.blocks * block(shape, image + text, rank) + around


def of_sizes(k2: K2, sizes: Iterable[Sequence[int]]) -> list[float]:
    """Operations of an image's forward at each (height, width) in pixels, without text: the relative cost of sizes."""
    shape = Shape.of(k2)
    return [float(forward(shape, k2.image_tokens(height, width), 0)) for height, width in sizes]


def backward(shape: Shape, image: int, text: int, rank: int | None) -> int:
    """Operations of one sample's backward, where only adapters of this rank on all linears are trained; None: all
    weights but the text fusion's."""
    d, tokens = shape.width, image + text
    if rank is None:
        return 2 * forward(shape, image, text) - 2 * (image * shape.channels + shape.time) * d
    each_block = 8 * tokens * tokens * d
    saved = 0
    for name, (a, b) in shape.linears().items():
        each_block += 2 * tokens * (a * b + 2 * rank * (a + b))
        # The first block's input has no gradient.
        if name in INPUTS:
            saved += 2 * tokens * (a * b + rank * a)
    return shape.blocks * each_block - saved + 2 * image * shape.channels * d
