"""The VAE on images. It is a video model, and an image is a video of one frame.

Its causal 3-D convolutions pad a single frame with zeros in the past, so all but their last tap in time multiply zeros:
two thirds of the work. A 2-D convolution with that last tap gives the same image, up to rounding.
"""

from __future__ import annotations

from types import MethodType

from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor
from torch.nn import functional as F


def flatten_time(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Makes the convolutions of `vae` two-dimensional where there is one frame. Several frames run as before."""
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = MethodType(_forward, module)
    return vae


def _forward(self: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    # x is (B, c, frames, height, width); a cache holds earlier frames, and a stride in time looks at several.
    if cache_x is not None or x.shape[2] != 1 or self.stride[0] != 1:
        return QwenImageCausalConv3d.forward(self, x, cache_x)
    frame = F.pad(x[:, :, 0], list(self._padding[:4]))  # type: ignore[arg-type]
    return F.conv2d(frame, self.weight[:, :, -1], self.bias, self.stride[1:])[:, :, None]  # type: ignore[arg-type]
