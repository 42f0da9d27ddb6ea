"""The network as a module, and how its blocks run: compiled or not, with activations kept or recomputed in backward.

All blocks share one compiled function. It is compiled once for each combination of role, gradient and mask. Batch and
text length are dynamic, so another size does not recompile it. torch compiles a batch of one separately; after a larger
batch, a single sample (a shared start, a remainder) is therefore repeated to a batch of two. Compilation happens at the
first call, and torch caches the result on disk (TORCHINDUCTOR_CACHE_DIR), so later runs start sooner.

Backward through a compiled block overwrites the activations that the block kept. A graph can be walked only once: torch
raises with retain_graph=True. Several gradients of one batch need a forward each (stpo/train.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from posttrain.errors import UserError
from posttrain.model import packed, references
from posttrain.model.references import KeysValues, References, cached_block, joint_block, own_block, packed_block
from posttrain.model.roles import STAGES, switched

if TYPE_CHECKING:
    from posttrain.model.sequence import SequenceParallel

MAX_VARIANTS = 64
"""Most variants of a block that are compiled. torch runs any further one uncompiled, with a warning."""
ACTIVATION_BUDGET = 0.9
"""Activations that a compiled block may keep for backward on a GPU, as a share of what torch would keep. Below 1 torch
recomputes what is cheapest: casts and sums, not matrix products."""
RESERVE = 0.1
"""Share of a GPU's memory that kept activations leave free."""


class Blocks:
    """Runs blocks in order under the active role, and recomputes them under the same role."""

    def __init__(self, active: list[str]) -> None:
        self.active = active
        self.compiled: bool | None = False
        """None: compiled on a GPU in bfloat16, not elsewhere."""
        self.recompute: int | None = None
        """How many of the last blocks are recomputed in backward instead of keeping their activations. None: as many as
        do not fit into the free memory of the GPU, measured at the first backward of each size; on the CPU none."""
        self.float8: str | None = None
        """How all weights are trained in fp8, tensorwise or rowwise; None: they are not. See fp8.py."""
        self.exact = False
        """Whether to leave fp8 out for now."""
        self.packs = False
        """Whether keys are packed where there is a mask, not the bias of references; see packed.py."""
        self.memory: Memory | None = None
        """The memory that is measured. None: that of the GPU that holds the inputs."""
        self.bytes_a_token: float | None = None
        """Bytes per token that a block last kept for backward, where that was measured."""
        self._kept: dict[tuple[int, ...], int] = {}
        """How many blocks keep their activations, by shape of the hidden states."""
        self._has_seen_batch = False
        self.recomputed = 0
        """How many blocks of the last forward will be recomputed in backward."""

    def __call__(
        self,
        blocks: Sequence[nn.Module],
        hidden: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        lengths: tuple[int, ...] = (),
        cached: Sequence[KeysValues] | None = None,
    ) -> Tensor:
        """(B, T, C) through the blocks; modulation (B, 1, 6 C), rope of (T, head) each, mask (B, 1, 1, T) or None.

        With references (references.py), mask is their bias. Those without a cache stand behind text and target in
        `hidden`; `lengths` are the tokens of each part, and modulation is (B, 2, 6 C). `cached` has those of each block
        that have one.
        """
        compiled = compiles_by_default(hidden.device, hidden.dtype) if self.compiled is None else self.compiled
        if not compiled:
            return self._run_all(_run, blocks, cached, hidden, modulation, rope, self._keys(mask), lengths)
        samples = len(hidden)
        # A batch of one would be compiled separately: two are faster than minutes of compiling.
        if samples == 1 and self._has_seen_batch:
            hidden, modulation = hidden.repeat(2, 1, 1), modulation.repeat(2, 1, 1)
            mask = None if mask is None else mask.repeat(2, 1, 1, 1)
        self._has_seen_batch |= samples > 1
        # torch compiles again for each kind of view that it is given, so inputs are copied out of their views.
        modulation, rope = modulation.clone(), (rope[0].clone(), rope[1].clone())
        mask = None if mask is None else mask.clone()
        ended = self._run_all(_run_compiled, blocks, cached, hidden, modulation, rope, self._keys(mask), lengths)
        return ended[:samples]

    def _keys(self, mask: Tensor | None) -> Tensor | tuple[Tensor, Tensor] | None:
        """The mask, or which keys are real where they are packed. The bias of references is left as it is."""
        packs = self.packs and mask is not None and mask.dtype == torch.bool
        return packed.packed(mask[:, 0, 0]) if packs and mask is not None else mask

    def _run_all(
        self,
        run: Callable[..., Tensor],
        blocks: Sequence[nn.Module],
        cached: Sequence[KeysValues] | None,
        hidden: Tensor,
        *same: Any,
    ) -> Tensor:
        shape, count = tuple(hidden.shape), len(blocks)
        memory = self.memory or (Memory(hidden.device) if hidden.is_cuda else None)
        kept = self._blocks_to_keep(shape, count, memory)
        before = recomputed = 0
        for i, block in enumerate(blocks):
            if kept is None and i == 1 and not hidden.requires_grad:
                kept = count  # nothing is trained, so no activations are kept anyway
            # A new size is measured on block 2 of 0, 1, 2, ...: block 0 may have less to keep, and block 1 may be
            # compiled now, which allocates memory of its own.
            if kept is None and memory is not None and i == 2:
                before = memory.allocated()
            if kept is None and memory is not None and i == 3:
                each = memory.allocated() - before
                self.bytes_a_token = each / (shape[0] * shape[1])
                # Blocks 1 and 2 keep their activations already, block 0 its input.
                room = memory.free(blocks) + 2 * each + hidden.nbytes
                kept = self._kept[shape] = kept_blocks(room, each, count, hidden.nbytes)
            others = same if cached is None else (*same, *cached[i])
            if i < kept if kept is not None else i > 0:
                hidden = run(block, hidden, *others)
            else:
                recomputed += 1
                # A block has no dropout, so there is no random state to restore.
                hidden = checkpoint(
                    self._run_again, run, list(self.active), block, hidden, *others,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
        self.recomputed = recomputed if hidden.requires_grad else 0
        return hidden

    def _blocks_to_keep(self, shape: tuple[int, ...], blocks: int, memory: Memory | None) -> int | None:
        """How many blocks keep their activations; None: this forward has to measure it."""
        if not torch.is_grad_enabled():
            return blocks
        if self.recompute is not None:
            return max(0, blocks - self.recompute)
        return blocks if memory is None else self._kept.get(shape)

    def _run_again(self, run: Callable[..., Tensor], active: list[str], *inputs: Any) -> Tensor:
        # Recomputation happens in backward, when another role may be active.
        with switched(self.active, active):
            return run(*inputs)


def _run(
    block: nn.Module,
    hidden: Tensor,
    modulation: Tensor,
    rope: tuple[Tensor, Tensor],
    mask: Tensor | tuple[Tensor, Tensor] | None,
    lengths: tuple[int, ...] = (),
    *cached: Tensor,
) -> Tensor:
    if isinstance(mask, tuple):
        return packed_block(block, hidden, modulation, rope, *mask)
    if cached:
        return cached_block(block, hidden, modulation, rope, mask, *cached)
    if lengths:
        return joint_block(block, hidden, modulation, rope, mask, lengths, own_block, cached_block)
    return block(hidden, modulation, rope, mask)


def _run_compiled(
    block: nn.Module,
    hidden: Tensor,
    modulation: Tensor,
    rope: tuple[Tensor, Tensor],
    mask: Tensor | tuple[Tensor, Tensor] | None,
    *references: Any,
) -> Tensor:
    """Equals `_run` within rounding: fused operations do not round intermediate results to the type of the inputs."""
    if isinstance(mask, tuple):
        return _call(packed_block, block, hidden, modulation, rope, *mask)
    lengths, cached = (references[0], references[1:]) if references else ((), ())
    if cached:
        return _call(cached_block, block, hidden, modulation, rope, mask, *cached)
    if not lengths:
        return _call(_run, block, hidden, modulation, rope, mask)
    own, seeing = functools.partial(_call, own_block), functools.partial(_call, cached_block)
    return joint_block(block, hidden, modulation, rope, mask, lengths, own, seeing)


def _call(function: Callable[..., Any], block: nn.Module, *inputs: Any) -> Any:
    """function(block, *inputs), compiled: hidden states (B, T, C), modulation (B, 1, 6 C), rope, a mask (B, 1, 1, T),
    keys and values (B, M, heads, head), places and ends of packed keys."""
    hidden, modulation, rope, *others = inputs
    for tensor, axes in ((hidden, (0, 1)), (modulation, (0,)), (rope[0], (0,)), (rope[1], (0,))):
        _may_vary(tensor, axes)
    for tensor in others:
        if isinstance(tensor, Tensor) and tensor.ndim == 1:
            _may_vary(tensor, (0,))
        elif isinstance(tensor, Tensor):
            _may_vary(tensor, (0, 3) if tensor.shape[1] == tensor.shape[2] == 1 else (0, 1))
    return _compiled(function, hidden.device.type)(block, *inputs)


def _may_vary(tensor: Tensor, axes: tuple[int, ...]) -> None:
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)


@functools.cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Raises UserError where there is no compiler of C, or of C++ on a CPU, to build what torch writes."""
    # inductor writes C++ for a CPU; for a GPU, Triton builds its launcher with a C compiler.
    names = [os.environ.get("CXX", "g++")] if device == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, names)):
        raise UserError(f"model.compile: needs {names[0]}, which is not in the PATH; install it, or set it to false")
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_VARIANTS)
    functorch: Any = functorch_config
    functorch.activation_memory_budget = 1.0 if device == "cpu" else ACTIVATION_BUDGET
    return torch.compile(function)


def compiles_by_default(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks are compiled when no setting says so: a CPU's compiler takes minutes, and fp32 models are
    small."""
    return device.type == "cuda" and dtype == torch.bfloat16


def set_attention(transformer: Krea2Transformer2DModel, kernels: str) -> None:
    """`kernels` is native, packed or cudnn; see model.attention of a recipe. Blocks.packs has keys packed."""
    if kernels == "packed":
        references.install(transformer)
    backend = {"native": "native", "packed": "native", "cudnn": "_native_cudnn"}[kernels]
    transformer.set_attention_backend(backend)


def graphs() -> int:
    """How many graphs torch has compiled in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def kept_blocks(free: float, each: float, blocks: int, carried: float = 0.0) -> int:
    """How many of `blocks` can keep their activations in `free` bytes, where one takes `each` bytes. The others keep
    only their input, of `carried` bytes.
    """
    if each <= carried:
        return blocks
    # A block that is recomputed needs `each` bytes while it runs, and about as much again for its gradients.
    room = free - 2 * each - blocks * carried
    return max(0, min(blocks, int(room / (each - carried))))


class Memory:
    """The memory of a GPU, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def free(self, blocks: Sequence[nn.Module]) -> float:
        """Bytes that activations may take: all but a reserve, and the gradients and moments that may still come."""
        free, total = torch.cuda.mem_get_info(self.device)
        # torch holds memory that it does not use, which the driver counts as taken.
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + unused - RESERVE * total - pending_bytes(blocks)


def pending_bytes(blocks: Sequence[nn.Module]) -> int:
    """Bytes of gradients that do not exist yet, and of AdamW's moments, of these blocks' trained parameters."""
    pending = 0
    for block in blocks:
        for name, parameter in block.named_parameters():
            # Earlier stages are adapters too, and never trained.
            if name.endswith(f"_{STAGES}"):
                continue
            if parameter.requires_grad and parameter.grad is None:
                pending += 4 * parameter.numel()
            # Two moments in fp32. Adapters of other roles are trained later, and whether a parameter has its moments
            # already cannot be seen from here.
            if parameter.requires_grad or "lora_" in name:
                pending += 8 * parameter.numel()
    return pending


class VelocityModel(nn.Module):
    """The transformer after the text fusion: from fused text, latents and time to a velocity. Shapes as in k2.py.

    Every forward enters here, so this is the module that is sharded.
    """

    def __init__(self, transformer: Krea2Transformer2DModel, blocks: Blocks) -> None:
        super().__init__()
        self.transformer = transformer
        self.blocks = blocks
        self.sequence: SequenceParallel | None = None
        """Divides tokens over processes; see sequence.py."""
        self._rope: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        grid: tuple[int, int],
        shown: References | None = None,
    ) -> Tensor:
        """x (B, N, C) and tokens (B, L, C) in the network's dtype, t (B,) in fp32, mask (B, L) or None; `shown` are
        references."""
        net, length = self.transformer, tokens.shape[1]
        low_precision = x.dtype != torch.float32
        # Trained weights are fp32: autocast computes in the base's dtype with them. Everything else has it already.
        with torch.autocast(x.device.type, dtype=x.dtype) if low_precision else contextlib.nullcontext():
            temb = net.time_embed(t, dtype=x.dtype)
            modulation = net.time_mod_proj(F.gelu(temb, approximate="tanh"))
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1)
            rope = self._rotary(length, *grid, x.device)
            hidden = torch.cat([tokens, net.img_in(x)], dim=1)
            total = hidden.shape[1]
            if shown is not None:
                return net.final_layer(self._with_references(hidden, modulation, rope, mask, shown)[:, length:], temb)
            mask = None if mask is None else mask[:, None, None, :]
            if self.sequence is not None:
                hidden, rope, mask = self.sequence.split(hidden, rope, mask)
            hidden = self.blocks(list(net.transformer_blocks), hidden, modulation, rope, mask)
            if self.sequence is None:
                return net.final_layer(hidden[:, length:], temb)
            return self.sequence.gather(net.final_layer(hidden, temb))[:, length:total]

    def _with_references(
        self, hidden: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, shown: References
    ) -> Tensor:
        """Text and target (B, T, C) through the blocks, beside the references or with what is cached of them."""
        net, (batch, tokens) = self.transformer, hidden.shape[:2]
        if self.sequence is not None:
            raise UserError("model.sequence_parallel: does not go with references; set it to 1")
        references.install(net)
        blocks, bias = list(net.transformer_blocks), shown.bias(mask, tokens, batch, hidden.dtype)
        if shown.cached is not None:
            return self.blocks(blocks, hidden, modulation, rope, bias, cached=shown.cached)
        if bias is None:  # of texts of one length; with none at times, blocks would be compiled for both
            bias = hidden.new_zeros(batch, 1, 1, tokens + sum(shown.lengths))
        streams = [net.img_in(latents.to(hidden.device, hidden.dtype)) for latents in shown.latents]
        hidden = torch.cat([hidden, *(stream.expand(batch, -1, -1) for stream in streams)], 1)
        clean = references.clean_modulation(net, hidden.dtype, hidden.device).expand(batch, -1, -1)
        ropes = [rope, *references.rotary(net, shown, hidden.device)]
        cos, sin = zip(*ropes)
        joined = torch.cat(cos), torch.cat(sin)
        modulation = torch.cat([modulation.expand(batch, -1, -1), clean], 1)
        lengths = (tokens, *shown.lengths)
        return self.blocks(blocks, hidden, modulation, joined, bias, lengths)[:, :tokens]

    def _rotary(self, length: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # All text tokens have position 0: a table for a long text serves every shorter one by slicing.
        key = (rows, columns, device)
        cached = self._rope.get(key)
        if cached is None or cached[0].shape[0] - rows * columns < length:
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                ids = Krea2Pipeline.prepare_position_ids(max(512, length), rows, columns, device)
                cached = self._rope[key] = self.transformer.rotary_emb(ids)
        start = cached[0].shape[0] - rows * columns - length
        return cached[0][start:], cached[1][start:]
