"""How the transformer's blocks run: compiled or as they are, and their activations kept or computed again in backward.

All blocks share one compiled function, so what is compiled for one serves all. It is compiled once for each way it is
used: role, with or without gradient, with or without mask. Batch and text length are dynamic, so that another size does
not have it compiled again. Only a batch of one torch compiles apart: where there have been larger ones, a single sample
(a shared start, a remainder) goes through theirs, twice. Nothing is compiled before it runs, and torch keeps what it
compiled on disk (TORCHINDUCTOR_CACHE_DIR), so that later runs begin sooner.

Backward through a compiled block writes over what the block kept, so a graph of the network is walked once: with
retain_graph=True torch ends the run. Several gradients of one batch need a forward each (stpo.py).
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from posttrain.errors import UserError
from posttrain.model.roles import STAGES, switched

WAYS = 64
"""Ways to use a block that are compiled, at most; torch runs any further one uncompiled, with a warning."""
KEPT = 0.9
"""What a compiled block may keep for backward on a GPU, in parts of what torch would keep by itself. Below 1 torch goes
through what costs least to compute again: casts and sums, not products."""
RESERVE = 0.1
"""Share of a GPU's memory that kept activations leave free."""


class Blocks:
    """Runs blocks one after the other, under the active role, and recomputes them under the same."""

    def __init__(self, active: list[str]) -> None:
        self.active = active
        self.compiled: bool | None = False
        """None: on a GPU in bfloat16."""
        self.recompute: int | None = None
        """How many blocks, the last ones, are computed again in backward instead of keeping their activations; None: as
        many as do not fit into a GPU's free memory, at the first backward of a size, and on the CPU none."""
        self.memory: Memory | None = None
        """Which decides then; None: that of the GPU that the inputs are on."""
        self.bytes_a_token: float | None = None
        """What a block last kept for backward, a token, where that was measured."""
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
        if not (by_default(hidden.device, hidden.dtype) if self.compiled is None else self.compiled):
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
        shape, count = tuple(hidden.shape), len(blocks)
        memory = self.memory or (Memory(hidden.device) if hidden.is_cuda else None)
        kept = self._keep(shape, count, memory)
        before = again = 0
        for i, block in enumerate(blocks):
            if kept is None and i == 1 and not hidden.requires_grad:
                kept = count  # nothing is trained now, so nothing is kept either
            # Of a new size the second and third block keep theirs: the first may have less to keep, and the second may
            # be compiled, which leaves things behind.
            if kept is None and memory is not None and i == 2:
                before = memory.allocated()
            if kept is None and memory is not None and i == 3:
                each = memory.allocated() - before
                self.bytes_a_token = each / (shape[0] * shape[1])
                room = memory.free(blocks) + 2 * each + hidden.nbytes  # of these three, which have theirs already
                kept = self._kept[shape] = kept_blocks(room, each, count, hidden.nbytes)
            if i < kept if kept is not None else i > 0:
                hidden = run(block, hidden, *others)
            else:
                again += 1
                hidden = checkpoint(
                    self._again, run, list(self.active), block, hidden, *others,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
        self.recomputed = again if hidden.requires_grad else 0
        return hidden

    def _keep(self, shape: tuple[int, ...], blocks: int, memory: Memory | None) -> int | None:
        """How many keep their activations; None: that is to be found out."""
        if not torch.is_grad_enabled():
            return blocks
        if self.recompute is not None:
            return max(0, blocks - self.recompute)
        return blocks if memory is None else self._kept.get(shape)

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
    return _compiled(hidden.device.type)(block, hidden, modulation, rope, mask)


@functools.cache
def _compiled(device: str) -> Callable[..., Tensor]:
    """Raises UserError where there is no compiler of C, or of C++ on a CPU, to build what torch writes."""
    names = [os.environ.get("CXX", "g++")] if device == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, names)):
        raise UserError(f"model.compile: needs {names[0]}, which is not in the PATH; install it, or set it to false")
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, WAYS)
    functorch: Any = functorch_config
    functorch.activation_memory_budget = 1.0 if device == "cpu" else KEPT
    return torch.compile(_run)


def by_default(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks are compiled where nothing says so: a CPU's compiler takes minutes, and fp32 models are small."""
    return device.type == "cuda" and dtype == torch.bfloat16


def set_attention(transformer: Krea2Transformer2DModel, kernels: str) -> None:
    """`native` or `cudnn`; see model.attention of a recipe."""
    transformer.set_attention_backend({"native": "native", "cudnn": "_native_cudnn"}[kernels])


def graphs() -> int:
    """How many graphs torch has compiled in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def kept_blocks(free: float, each: float, blocks: int, carried: float = 0.0) -> int:
    """How many of `blocks` can keep their activations in `free` bytes, if one takes `each`; the others keep their
    input, of `carried` bytes.

    A block that is computed again needs as much while it is, and about as much for its gradients.
    """
    if each <= carried:
        return blocks
    return max(0, min(blocks, int((free - 2 * each - blocks * carried) / (each - carried))))


class Memory:
    """A GPU's, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def free(self, blocks: Sequence[nn.Module]) -> float:
        """What activations may take: all but a reserve, and gradients and moments that may be to come."""
        free, total = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + unused - RESERVE * total - to_come(blocks)


def to_come(blocks: Sequence[nn.Module]) -> int:
    """Bytes of the gradients that these blocks' trained parameters do not have yet, and of AdamW's moments in fp32 of
    all that are trained or will be: of several roles one is trained at a time, and earlier stages never are. Whether
    moments are there already cannot be seen."""
    named = [(name, p) for block in blocks for name, p in block.named_parameters() if not name.endswith(f"_{STAGES}")]
    gradients = sum(4 * p.numel() for _, p in named if p.requires_grad and p.grad is None)
    return gradients + sum(8 * p.numel() for name, p in named if p.requires_grad or "lora_" in name)
