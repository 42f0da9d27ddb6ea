"""How the transformer's blocks run: compiled or as they are, and their activations kept or computed again in backward.

All blocks share one compiled function, so what is compiled for one serves all. It is compiled once for each way it is
used: role, with or without gradient, with or without mask. Batch and text length are dynamic, so that another size does
not have it compiled again. Only a batch of one torch compiles apart: where there have been larger ones, a single sample
(a shared start, a remainder) goes through theirs, twice. Nothing is compiled before it runs, and torch keeps what it
compiled on disk (TORCHINDUCTOR_CACHE_DIR), so that later runs begin sooner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.roles import switched

WAYS = 64
"""Ways to use a block that are compiled, at most; torch runs any further one uncompiled, with a warning."""
RESERVE = 0.1
"""Share of a GPU's memory that kept activations leave free."""


class Blocks:
    """Runs blocks one after the other, under the active role, and recomputes them under the same."""

    def __init__(self, active: list[str]) -> None:
        self.active = active
        self.compiled = False
        self.recompute: int | None = None
        """How many blocks, the last ones, are computed again in backward instead of keeping their activations; None: as
        many as do not fit into a GPU's free memory, and on the CPU none."""
        self._kept: dict[tuple[int, ...], int] = {}
        self._several = False
        self.recomputed = 0
        """How many blocks of the last forward will be computed again in backward."""

    def __call__(
        self,
        blocks: Sequence[nn.Module],
        hidden: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """(B, T, C) through the blocks; modulation (B, 1, 6 C), rope of (T, head) each, mask (B, 1, 1, T) or None."""
        if not self.compiled:
            return self._each(_run, blocks, hidden, modulation, rope, mask)
        samples = len(hidden)
        if samples == 1 and self._several:
            hidden, modulation = hidden.repeat(2, 1, 1), modulation.repeat(2, 1, 1)
            mask = None if mask is None else mask.repeat(2, 1, 1, 1)
        self._several |= samples > 1
        # A view of something else would be compiled apart from what is none, and one for each way that it is cut.
        modulation, rope = modulation.clone(), (rope[0].clone(), rope[1].clone())
        mask = None if mask is None else mask.clone()
        return self._each(_run_compiled, blocks, hidden, modulation, rope, mask)[:samples]

    def _each(self, run: Callable[..., Tensor], blocks: Sequence[nn.Module], hidden: Tensor, *others: Any) -> Tensor:
        kept, shape, before = self._keep(hidden, len(blocks)), tuple(hidden.shape), 0
        for i, block in enumerate(blocks):
            if kept is None and i == 1:  # the first has less to keep where only adapters are trained
                before = torch.cuda.memory_allocated(hidden.device)
            if kept is None and i == 2:
                each = torch.cuda.memory_allocated(hidden.device) - before
                trained = [p for other in blocks for p in other.parameters() if p.requires_grad]
                kept = 2 + kept_blocks(free_memory(hidden.device, trained), each, len(blocks) - 2)
                if each > 0:  # else nothing is trained now, and a later forward may be
                    self._kept[shape] = kept
            self.recomputed = 0 if kept is None else len(blocks) - min(max(kept, 0), len(blocks))
            if kept is None or i < kept:
                hidden = run(block, hidden, *others)
            else:
                hidden = checkpoint(
                    self._again, run, list(self.active), block, hidden, *others,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
        return hidden

    def _keep(self, hidden: Tensor, blocks: int) -> int | None:
        """How many keep their activations; None: that is to be found out."""
        if not torch.is_grad_enabled():
            return blocks
        if self.recompute is not None:
            return blocks - self.recompute
        return self._kept.get(tuple(hidden.shape)) if hidden.is_cuda else blocks

    def _again(self, run: Callable[..., Tensor], active: list[str], *inputs: Any) -> Tensor:
        # Recomputation happens in backward, when another role may be active.
        with switched(self.active, active):
            return run(*inputs)


def _run(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def _run_compiled(
    block: nn.Module, hidden: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Within rounding of `_run`: results that are fused away are not rounded to the arithmetic's type."""
    for tensor, sizes in ((hidden, (0, 1)), (modulation, (0,)), (rope[0], (0,)), (rope[1], (0,)), (mask, (0, 3))):
        for size in sizes if tensor is not None else ():
            torch._dynamo.maybe_mark_dynamic(tensor, size)
    return _compiled()(block, hidden, modulation, rope, mask)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, WAYS)
    return torch.compile(_run)


def set_attention(transformer: Krea2Transformer2DModel, kernels: str) -> None:
    """`native` or `cudnn`; see model.attention of a recipe."""
    transformer.set_attention_backend({"native": "native", "cudnn": "_native_cudnn"}[kernels])


def graphs() -> int:
    """How many graphs torch has compiled in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def kept_blocks(free: float, each: float, blocks: int) -> int:
    """How many of `blocks` can keep their activations in `free` bytes, if one takes `each`.

    A block that is computed again needs as much while it is, and about as much for its gradients.
    """
    return blocks if each <= 0 else max(0, min(blocks, int(free / each) - 2))


def free_memory(device: torch.device, trained: Sequence[Tensor]) -> float:
    """Bytes of a GPU that activations may take, less a reserve, and less gradients and AdamW's moments in fp32."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused - RESERVE * total - 12 * sum(p.numel() for p in trained)
