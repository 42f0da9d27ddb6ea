"""Loads K2 checkpoints into a Krea2Pipeline, with errors that name the file; makes random weights of K2's size.

Only safetensors are read, and no code from a checkpoint runs.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLModel

from posttrain.errors import UserError
from posttrain.model import key_names
from posttrain.model.files import check_directory, is_hub_id


def load_pipeline(
    path: str | Path, transformer_file: str | Path | None, dtype: torch.dtype, device: str | torch.device
) -> Krea2Pipeline:
    """See `K2.load`."""
    path = str(path)
    check_directory(path, transformer_file)
    try:
        with contextlib.nullcontext() if is_hub_id(path) else quiet():
            pipe = _read(path, transformer_file, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "" if Path(path).exists() else "no such directory here, and as a hub id it "
        raise UserError(f"{path}: {what}cannot be loaded as a K2 pipeline: {reason}") from error
    for name in ("transformer", "vae", "text_encoder"):
        pipe.components[name].to(device)
    flatten_time(pipe.vae)
    return pipe


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the libraries' progress bars and their warnings to developers, which bury the messages of a run."""
    # Only bars that are on are put back: the user may have switched them off.
    loggers = [log for log in (diffusers.utils.logging, transformers.utils.logging) if log.is_progress_bar_enabled()]
    for log in loggers:
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log in loggers:
            log.enable_progress_bar()


def check_names(
    where: str,
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    remedy: str,
    original_names: bool = False,
) -> None:
    """Raises UserError for missing, unexpected and misshapen keys, with their numbers and the first few of each."""
    missing = [key for key in expected if key not in got]
    extra = [key for key in got if key not in expected]
    misshapen = [key for key in expected if key in got and got[key].shape != expected[key].shape]
    lists = {"missing": missing, "unexpected": extra, "of another shape": misshapen}
    problems = []
    for what, keys in lists.items():
        names = [key_names.original_name(key) if original_names else key for key in keys[:3]]
        if keys:
            problems.append(f"{len(keys)} {what} ({', '.join(names)}{', ...' if len(keys) > 3 else ''})")
    if problems:
        raise UserError(f"{where}: keys do not match this model: {'; '.join(problems)}; {remedy}")


def keeps_fp32(name: str) -> bool:
    """Whether diffusers keeps this transformer parameter, a scale of a norm, in fp32 on a bf16 model."""
    return not set(Krea2Transformer2DModel._keep_in_fp32_modules).isdisjoint(name.split("."))


def empty_transformer(path: str | Path) -> Any:
    """The transformer of a pipeline on the meta device: names and shapes without values."""
    config: Any = Krea2Transformer2DModel.load_config(str(path), subfolder="transformer")
    with torch.device("meta"):
        return Krea2Transformer2DModel.from_config(config)


def _read(path: str, transformer_file: str | Path | None, dtype: torch.dtype) -> Krea2Pipeline:
    if transformer_file is not None:
        transformer = _read_original(Path(transformer_file), path, dtype)
    else:
        transformer = _read_diffusers(path, dtype)
    return Krea2Pipeline.from_pretrained(path, transformer=transformer, dtype=dtype, use_safetensors=True)


def _read_diffusers(path: str, dtype: torch.dtype) -> Krea2Transformer2DModel:
    loaded: Any = Krea2Transformer2DModel.from_pretrained(
        path, subfolder="transformer", dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    transformer, info = loaded
    # diffusers only warns, and leaves missing weights at random values.
    for what in ("missing", "unexpected"):
        if keys := info[f"{what}_keys"]:
            first = ", ".join(sorted(keys)[:3])
            raise UserError(f"{path}/transformer: {len(keys)} {what} keys ({first}, ...); give a whole K2 checkpoint")
    return transformer


def _read_original(file: Path, path: str, dtype: torch.dtype) -> Krea2Transformer2DModel:
    """Reads one file in the original key names. diffusers' own reader ignores missing and extra keys."""
    transformer = empty_transformer(path)
    weights = key_names.from_original(load_file(file))
    remedy = f"give a file in the original key names that belongs to {path}/transformer"
    check_names(str(file), transformer.state_dict(), weights, remedy, original_names=True)
    # Copied: otherwise the weights stay mapped to the file, which someone may replace.
    weights = {key: value.to(torch.float32 if keeps_fp32(key) else dtype, copy=True) for key, value in weights.items()}
    transformer.load_state_dict(weights, assign=True)
    return transformer


# random weights


def random_pipeline(
    device: str | torch.device, dtype: torch.dtype, scale: Literal["k2", "tiny"], text: bool, seed: int
) -> Krea2Pipeline:
    """See `K2.random`. Weights are made on the device and in the dtype that they run in, so there is no second copy."""
    transformer_config, text_config, vae_config, taps = sizes_of(scale)
    device, default = torch.device(device), torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            transformer = Krea2Transformer2DModel(**transformer_config)
            vae = AutoencoderKLQwenImage(**vae_config)
            encoder = Qwen3VLModel(Qwen3VLConfig(**text_config)) if text else None
        finally:
            torch.set_default_dtype(default)
        for name, parameter in transformer.named_parameters():
            # diffusers leaves these uninitialised: it expects a checkpoint.
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=0.02)
            if keeps_fp32(name):
                parameter.data = parameter.data.float()
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": None,
        "transformer": transformer,
    }
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return Krea2Pipeline(scheduler=scheduler, text_encoder_select_layers=tuple(taps), **parts)


SCHEDULER = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 6400,
}
"""The scheduler configuration of the released checkpoints."""


def sizes_of(scale: str) -> tuple[dict, dict, dict, Sequence[int]]:
    """Configurations of transformer, text encoder and VAE, and the tapped layers; {} is diffusers' default, K2's
    own."""
    # The vision tower is never run; it is as small as the class allows.
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "num_heads": 1,
        "intermediate_size": 64,
        "deepstack_visual_indexes": [0],
    }
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    if scale == "k2":  # the language model of Qwen3-VL-4B
        qwen = {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": rope,
        }
        configs = {"text_config": qwen, "vision_config": vision | {"out_hidden_size": 2560}}
        return {}, configs, {}, range(2, 36, 3)
    if scale != "tiny":
        raise UserError(f"scale {scale!r}: choose k2 or tiny")
    qwen = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": rope | {"mrope_section": [4, 2, 2]},
    }
    transformer = {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 64,
        "num_text_layers": 3,
        "text_num_attention_heads": 4,
        "text_num_key_value_heads": 4,
        "text_intermediate_size": 256,
        "axes_dims_rope": (8, 12, 12),
    }
    vae = {"base_dim": 8, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, False]}
    configs = {"text_config": qwen, "vision_config": vision | {"out_hidden_size": 64}}
    return transformer, configs, vae, (1, 2, 3)


def flatten_time(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Makes the convolutions of `vae` two-dimensional where there is one frame. Several frames run as before.

    The VAE is a video model, and an image is a video of one frame. Its causal 3-D convolutions pad a single frame with
    zeros in the past, so all but their last tap in time multiply zeros: two thirds of the work. A 2-D convolution with
    that last tap gives the same image, up to rounding.
    """
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
