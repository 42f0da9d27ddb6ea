"""The autoencoder on pictures: a video model that is only ever shown one frame.

Its causal 3-D convolutions pad a lone frame with zeros in the past, so all but their last tap in time meet zeros:
two thirds of the work. Convolving in two dimensions with that last tap gives the same picture, up to rounding.
"""

from __future__ import annotations

from types import MethodType

from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor
from torch.nn import functional as F


def flatten_time(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Make the convolutions of `vae` skip the past where there is none; more frames go the way they always went."""
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = MethodType(_forward, module)
    return vae


def _forward(self: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    if cache_x is not None or x.shape[2] != 1 or self.stride[0] != 1:
        return QwenImageCausalConv3d.forward(self, x, cache_x)
    frame = F.pad(x[:, :, 0], list(self._padding[:4]))  # type: ignore[arg-type]
    return F.conv2d(frame, self.weight[:, :, -1], self.bias, self.stride[1:])[:, :, None]  # type: ignore[arg-type]
