"""Checks of the machine before weights are read: CUDA, bfloat16, fp8, free memory."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from posttrain.errors import UserError
from posttrain.model.files import TYPES, Base, Weight, weights

BF16, FP8 = (8, 0), (8, 9)
"""Compute capability of the first NVIDIA GPUs with bfloat16 arithmetic (Ampere) and with fp8 (Ada)."""
GIB = 2**30
BLOCK = re.compile(r"(transformer_)?blocks\.\d+\.")
ON_CPU = "set CUDA_VISIBLE_DEVICES= to run on the CPU instead"


def check(bases: Sequence[Base], types: dict[str, str]) -> None:
    """Raises UserError if the GPU cannot be used, does not support what the recipe asks for, or if the weights do not
    fit. `types` holds the value of each dtype setting by its name."""
    check_cuda()
    device = _device()
    if device is not None:
        _check_bf16(device, types)
        if any(base.quantize for base in bases):
            check_fp8(device, "model.quantize")
    for base in bases:
        tensors = weights(base.path, base.transformer_file)
        if tensors:
            check_memory(base, tensors, device)


def check_cuda() -> None:
    """Raises UserError if there is a GPU that torch cannot use, so that nothing runs on the CPU by mistake."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("ACCELERATE_USE_CPU") == "true"
    # A torch without CUDA sees no GPU, so they are looked for in /dev.
    if hidden or not _gpus():
        return
    if not torch.backends.cuda.is_built():
        raise UserError(
            f"torch: there is a GPU, and torch {torch.__version__} is built without CUDA; install a build with it"
            f" (pytorch.org/get-started), or {ON_CPU}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"torch: there is a GPU, and CUDA {torch.version.cuda} cannot use it: {reason}; update the NVIDIA driver,"
            f" or install a torch for its CUDA (pytorch.org/get-started); or {ON_CPU}"
        ) from error
    device = _device()
    if device is not None and torch.version.hip is None and not _has_kernels(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            f"torch: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and this torch is"
            f" built for {', '.join(torch.cuda.get_arch_list())}; install a build for it, or {ON_CPU}"
        )


def check_fp8(device: torch.device, field: str) -> None:
    """Raises UserError for an NVIDIA GPU without fp8."""
    if torch.cuda.get_device_capability(device) < FP8:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{field}: fp8: {name} has none; use a GPU of compute capability 8.9 or more, or null")


def check_memory(base: Base, tensors: Sequence[Weight], device: torch.device | None) -> None:
    """Raises UserError if the free memory, of the GPU or of the machine, is smaller than the weights alone."""
    total = offloaded = 0.0
    # A lower bound: what has no room for the weights has none for activations either.
    for weight in tensors:
        size = _bytes(base, weight)
        total += size
        if weight.part in base.offload:
            offloaded += size
    if device is not None:
        free, whole = torch.cuda.mem_get_info(device)
        remedies = []
        if base.field == "model" and not base.quantize:
            remedies.append("set model.quantize: fp8")
        if base.field == "model" and not base.offload:
            remedies.append("set model.offload: [text_encoder, vae]")
        remedies.append("use a larger GPU")
        if total - offloaded > free:
            raise UserError(
                f"{base.field}.path: {base.path}: its weights take {(total - offloaded) / GIB:.1f} GiB of the GPU, and"
                f" {free / GIB:.1f} of {whole / GIB:.1f} GiB are free; {' or '.join(remedies)}"
            )
    # Each process on this machine has its own copy; on a GPU only of what is offloaded.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need = processes * (total if device is None else offloaded)
    if need > (there := host_memory()):
        raise UserError(
            f"{base.field}.path: {base.path}: its weights take {need / GIB:.1f} GiB of this machine's memory"
            f"{' for all processes' if processes > 1 else ''}, and {there / GIB:.1f} GiB are free;"
            f" {'use a machine with more' if device is None else 'set model.offload: []'}"
        )


def host_memory() -> int:
    """Bytes that this process may still allocate: those free on the machine, or fewer where its container has a
    limit."""
    free = psutil.virtual_memory().available
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    # Cached files count as used, but the kernel gives them up when memory is needed.
    cached = 0
    for line in (folder / "memory.stat").read_text().splitlines():
        name, value = line.split()
        if name == "inactive_file":
            cached = int(value)
    return min(free, limit - used + cached)


def _bytes(base: Base, weight: Weight) -> float:
    # In fp8 the matrices of the blocks take a byte for each weight.
    if base.quantize and weight.part == "transformer" and BLOCK.match(weight.name) and len(weight.shape) == 2:
        return weight.count
    return weight.count * {"F32": 4, "BF16": 2}[TYPES[base.dtype]]


def _check_bf16(device: torch.device, types: dict[str, str]) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    for field, value in types.items():
        if value == "bfloat16" and (major, minor) < BF16:
            raise UserError(
                f"{field}: {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bfloat16"
                " arithmetic; use a GPU of compute capability 8.0 or more, or float32"
            )


def _device() -> torch.device | None:
    """The GPU that this process will run on, chosen as accelerate does; None: the CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _gpus() -> list[Path]:
    """NVIDIA GPUs of this machine or container."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def _has_kernels(device: torch.device) -> bool:
    """Whether this torch has kernels for the GPU: binaries of the same generation, or PTX, which the driver
    compiles."""
    major, minor = torch.cuda.get_device_capability(device)
    for name in torch.cuda.get_arch_list():
        kind, _, number = name.partition("_")
        built = divmod(int(re.sub(r"\D", "", number)), 10)
        # Binaries (sm) run on later GPUs of the same major version; PTX (compute) on any later GPU.
        native = kind == "sm" and built[0] == major and built[1] <= minor
        if native or (kind == "compute" and built <= (major, minor)):
            return True
    return not torch.cuda.get_arch_list()
