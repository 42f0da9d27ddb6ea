"""Parts of a model that are used now and then and live in CPU memory in between: text encoder and VAE."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


class Offloaded:
    """A frozen module whose weights and buffers are on `device` only inside `here`.

    What is there is a copy, so that nothing is copied back; the originals are pinned for a GPU.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        module.cpu()
        tensors = [*module.parameters(), *module.buffers()]
        kept = [tensor.data.pin_memory() if device.type == "cuda" else tensor.data for tensor in tensors]
        self._kept = list(zip(tensors, kept))
        self._put_back()

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        for tensor, kept in self._kept:
            tensor.data = kept.to(self.device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for tensor, kept in self._kept:
            tensor.data = kept


def uses(name: str) -> Callable[[F], F]:
    """Of a method of a K2, during which that part is on its device."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
            part = self.offloaded.get(name)
            with contextlib.nullcontext() if part is None else part.here():
                return method(self, *args, **kwargs)

        return cast("F", inner)

    return wrap


def place(k2: Any, offload: Sequence[str], device: torch.device) -> None:
    """Puts a K2's text encoder and VAE on the device, or, if named in `offload`, there only while they are used. A CPU
    has nowhere else to put them."""
    for name, part in {"text_encoder": k2.text_encoder, "vae": k2.vae}.items():
        if part is None:
            continue
        if name in offload and device.type != "cpu":
            k2.offloaded[name] = Offloaded(part, device)
        else:
            part.to(device)
