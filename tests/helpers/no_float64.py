"""A device without float64, as Apple's GPUs are, emulated on the CPU.

What is computed from the marked parameters lies on the device, until it becomes numbers (`item`, `tolist`, `numpy`) or
is moved by `cpu()`.
An operation that makes a float64 tensor of such a tensor raises what torch raises there.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoFloat64(TorchDispatchMode):
    """Inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, torch.UntypedStorage] = {}
        """By address; kept alive, so that no address is given away again."""

    def mark(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage

    def mark_all(self, module: torch.nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self.mark(tensor.data)

    def _is_on_device(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            return result
        if any(map(self._is_on_device, tree_leaves((args, kwargs)))):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    if tensor.dtype == torch.float64:
                        raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({func})")
                    self.mark(tensor)
        return result


def emulated(monkeypatch) -> NoFloat64:
    """The mode, into which K2, expanders and judges come as they are made."""
    from posttrain.expander.policy import Policy
    from posttrain.model.k2 import K2
    from rewards.vlm import VLM

    device = NoFloat64()

    def marking(kind, *parts):
        init = kind.__init__

        def marked(self, *args, **kwargs):
            init(self, *args, **kwargs)
            for name in parts:
                if getattr(self, name) is not None:
                    device.mark_all(getattr(self, name))

        monkeypatch.setattr(kind, "__init__", marked)

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    marking(K2, "transformer", "vae", "text_encoder")
    marking(Policy, "model")
    marking(VLM, "model")
    return device
