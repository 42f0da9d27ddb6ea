"""Offloading of the text encoder and the VAE: they are on the GPU only while they are used."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


class Offloaded:
    """A frozen module whose weights and buffers are on `device` only inside `on_device`.

    The device gets a copy, so nothing is copied back. For a GPU the originals are pinned, which makes copying faster.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        module.cpu()
        self._originals: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in (*module.parameters(), *module.buffers()):
            original = tensor.data.pin_memory() if device.type == "cuda" else tensor.data
            self._originals.append((tensor, original))
        self._restore()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        for tensor, original in self._originals:
            # In the order of the stream: kernels that use the copy wait for it, the CPU does not.
            tensor.data = original.to(self.device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        # The copies on the device are freed with this: nothing else refers to them.
        for tensor, original in self._originals:
            tensor.data = original


def uses(name: str) -> Callable[[F], F]:
    """Decorates a method of K2: that part is on its device while the method runs."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
            part = self.offloaded.get(name)
            with contextlib.nullcontext() if part is None else part.on_device():
                return method(self, *args, **kwargs)

        return cast("F", inner)

    return wrap


def place(k2: Any, offload: Sequence[str], device: torch.device) -> None:
    """Puts a K2's text encoder and VAE on the device, or offloads them if they are named in `offload`."""
    for name, part in {"text_encoder": k2.text_encoder, "vae": k2.vae}.items():
        if part is None:
            continue
        # On the CPU there is nowhere else to put them.
        if name in offload and device.type != "cpu":
            k2.offloaded[name] = Offloaded(part, device)
        else:
            part.to(device)
