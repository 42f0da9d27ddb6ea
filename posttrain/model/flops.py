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
base, and one product of three less in the adapters; unless a layer before the blocks is adapted (`before`). Backward of
all weights costs twice the forward, less the gradients of the latents and of the time.

Where adapters reach the layers that fuse text, `fuse` and `fuse_backward` are added for each forward and backward of a
text: c wide, of n tapped states, g feed-forward width. Blocks across the states have n tokens for each of the L, those
across the text have L; then a projector of the states, and txt_in.

    fuse        2 L (n a + b) (3 c^2 + 2 c c_kv + 3 c g) + 4 (n^2 L a + L^2 b) c + 2 L (n c + c d + d^2)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.model.adapters.targets import TARGETS
from posttrain.model.k2 import K2

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
        return dict(zip(TARGETS, sizes))  # q, k, v, gate, out; gate, up, down of the feed-forward


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


def forward_with_references(
    shape: Shape, image: int, text: int, references: Sequence[int], cached: bool = True, rank: int = 0
) -> int:
    """As `forward`, with references of so many tokens each: read from a cache, or carried along in this forward."""
    others = sum(references)
    # Text and target see the references' keys too.
    operations = forward(shape, image, text, rank) + shape.blocks * 4 * (image + text) * others * shape.width
    if not cached:
        for tokens in references:  # one pass at time 0, without an output
            operations += shape.blocks * block(shape, tokens, rank) + 2 * tokens * shape.channels * shape.width
    return operations


def of_sizes(k2: K2, sizes: Iterable[Sequence[int]]) -> list[float]:
    """Operations of an image's forward at each (height, width) in pixels, without text: the relative cost of sizes."""
    shape = Shape.of(k2)
    return [float(forward(shape, k2.image_tokens(height, width), 0)) for height, width in sizes]


def backward(shape: Shape, image: int, text: int, rank: int | None, before: bool = False) -> int:
    """Operations of one sample's backward, where only adapters of this rank on all linears of the blocks are trained,
    or with `before` layers before the blocks too; rank None: all weights but the text fusion's."""
    d, tokens = shape.width, image + text
    if rank is None:
        return 2 * forward(shape, image, text) - 2 * (image * shape.channels + shape.time) * d
    each_block = 8 * tokens * tokens * d
    saved = 0
    for name, (a, b) in shape.linears().items():
        each_block += 2 * tokens * (a * b + 2 * rank * (a + b))
        # The first block's input has no gradient.
        if name in INPUTS and not before:
            saved += 2 * tokens * (a * b + rank * a)
    return shape.blocks * each_block - saved + 2 * image * shape.channels * d


# ---- text that is fused in every forward ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TextShape:
    """The sizes of what fuses the text; by default those of the released model."""

    width: int = 2560
    kv: int = 2560
    ff: int = 6912
    taps: int = 12
    across_taps: int = 2
    """Blocks that attend across the tapped states of a token."""
    across_text: int = 2
    """Blocks that attend across the tokens."""
    out: int = 6144

    @staticmethod
    def of(k2: K2) -> TextShape:
        config = k2.transformer.config
        width, heads = config["text_hidden_dim"], config["text_num_attention_heads"]
        kv, ff = width // heads * config["text_num_key_value_heads"], config["text_intermediate_size"]
        blocks = config["num_layerwise_text_blocks"], config["num_refiner_text_blocks"]
        return TextShape(width, kv, ff, config["num_text_layers"], *blocks, Shape.of(k2).width)

    def rows(self, tokens: int) -> int:
        """Rows that pass through a linear of all blocks together."""
        return tokens * (self.taps * self.across_taps + self.across_text)

    def block_linears(self) -> list[tuple[int, int]]:
        """Width of input and output, in the order of TARGETS."""
        c, kv, ff = self.width, self.kv, self.ff
        return [(c, c), (c, kv), (c, kv), (c, c), (c, c), (c, ff), (c, ff), (ff, c)]

    def attention(self, tokens: int) -> int:
        across_taps = self.across_taps * self.taps**2 * tokens
        return 4 * (across_taps + self.across_text * tokens**2) * self.width

    def products(self, tokens: int) -> list[tuple[int, int, int]]:
        """Rows, width of input and of output of all linears: of the blocks, the projector and the two of txt_in."""
        c, d = self.width, self.out
        of_blocks = [(self.rows(tokens), a, b) for a, b in self.block_linears()]
        # The projector makes one state of the taps, for each channel by itself: c rows a token.
        return [*of_blocks, (tokens * c, self.taps, 1), (tokens, c, d), (tokens, d, d)]


def fuse(shape: TextShape, tokens: int, rank: int = 0) -> int:
    """Operations of fusing one text. `rank` is that of adapters on all its linears; 0: none."""
    operations = shape.attention(tokens)
    for rows, a, b in shape.products(tokens):
        operations += 2 * rows * (a * b + rank * (a + b))
    return operations


def fuse_backward(shape: TextShape, tokens: int, rank: int) -> int:
    """Operations of its backward, where adapters of this rank on all its linears are trained."""
    operations = 2 * shape.attention(tokens)
    for rows, a, b in shape.products(tokens):
        operations += 2 * rows * (a * b + 2 * rank * (a + b))
    # Features have no gradient, so the linears that read them have none of their inputs.
    for a, b in shape.block_linears()[: len(INPUTS)]:
        operations -= 2 * tokens * shape.taps * (a * b + rank * a)
    return operations
