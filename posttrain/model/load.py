"""Loads K2 checkpoints into a Krea2Pipeline, with errors that name the file; makes random weights of K2's size.

Only safetensors are read, and no code from a checkpoint runs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLModel

from posttrain.errors import UserError, counted
from posttrain.loading import (
    PIPELINE,
    check_finite,
    check_json,
    check_tensors,
    load_model,
    local,
    quiet,
    reading,
)
from posttrain.model import key_names
from posttrain.model.files import UNUSED, check_directory, scale_of
from posttrain.tokenizer import check_tokenizer


def load_pipeline(
    path: str | Path,
    transformer_file: str | Path | None,
    dtype: torch.dtype,
    device: str | torch.device,
    transformer_format: str | None = None,
) -> Krea2Pipeline:
    """See `K2.load`."""
    patterns = PIPELINE
    if transformer_file is not None:  # of the other one only the settings are read
        patterns = [pattern.replace("transformer/*", "transformer/*.json") for pattern in PIPELINE]
    where, folder = str(path), local(str(path), patterns)
    check_directory(str(folder), transformer_file, transformer_format)
    if transformer_file is not None:
        transformer = _read_original(Path(transformer_file), folder, where, dtype, device)
    else:
        transformer = load_model(
            Krea2Transformer2DModel, folder / "transformer", f"{where}/transformer", device, _try_network, dtype=dtype
        )
    encoder = load_model(Qwen3VLModel, folder / "text_encoder", f"{where}/text_encoder", device, _try_text, dtype=dtype)
    vae = load_model(AutoencoderKLQwenImage, folder / "vae", f"{where}/vae", device, _try_vae, dtype=dtype)
    for part in ("", "scheduler", "tokenizer"):
        check_json(folder / part)
    with quiet(), reading(where, "a K2 pipeline"):
        parts = {"transformer": transformer, "text_encoder": encoder, "vae": vae}
        pipe: Any = Krea2Pipeline.from_pretrained(str(folder), **parts)
        check_tokenizer(pipe.tokenizer, f"{where}/tokenizer", encoder.get_input_embeddings().num_embeddings)
        problem = _wrong_with(pipe) or _wrong_with_template(pipe) or _wrong_with_schedule(pipe.scheduler)
    if problem:
        raise UserError(f"{where}: {problem}")
    flatten_time(pipe.vae)
    return pipe


@torch.no_grad()
def _try_network(network: Any) -> None:
    """One forward of the transformer on the meta device, with four tokens of each kind."""
    config = network.config
    with torch.device("meta"):
        image, time, positions = torch.zeros(1, 4, config["in_channels"]), torch.zeros(1), torch.zeros(8, 3)
        text = torch.zeros(1, 4, config["num_text_layers"], config["text_hidden_dim"])
        network(hidden_states=image, encoder_hidden_states=text, timestep=time, position_ids=positions)


@torch.no_grad()
def _try_text(encoder: Any) -> None:
    with torch.device("meta"):
        ids, positions = torch.zeros(1, 4, dtype=torch.long), torch.zeros(3, 1, 4, dtype=torch.long)
        encoder(input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False)


@torch.no_grad()
def _try_vae(vae: Any) -> None:
    """To latents and back."""
    side = 2 ** len(vae.temperal_downsample)  # pixels of a latent
    with torch.device("meta"):
        mode = vae.encode(torch.zeros(1, 3, 1, side, side)).latent_dist.mode()
        pixels = vae.decode(mode).sample
    if tuple(mode.shape) != (1, vae.config["z_dim"], 1, 1, 1) or tuple(pixels.shape) != (1, 3, 1, side, side):
        raise ValueError(f"an image of {side} pixels becomes {list(mode.shape)} and {list(pixels.shape)}")


def _wrong_with(pipe: Any) -> str:
    """What of a pipeline's settings does not fit its parts; empty if all does."""
    config, transformer, vae = pipe.config, pipe.transformer.config, pipe.vae.config
    if not isinstance(config["is_distilled"], bool):
        return f"model_index.json: is_distilled is {config['is_distilled']!r}; make it true or false"
    taps, text = pipe.text_encoder_select_layers, pipe.text_encoder.config.get_text_config()
    states = text.num_hidden_layers + 1  # the embedding's output is the first
    if len(taps) != transformer["num_text_layers"] or not all(type(i) is int and 0 <= i < states for i in taps):
        return (
            f"model_index.json: text_encoder_select_layers {list(taps)} must be {transformer['num_text_layers']} of the"
            f" text encoder's {states} states"
        )
    if text.hidden_size != transformer["text_hidden_dim"]:
        return (
            f"the text encoder has {text.hidden_size} channels, the transformer reads {transformer['text_hidden_dim']}"
        )
    if vae["z_dim"] * config["patch_size"] ** 2 != transformer["in_channels"]:
        return (
            f"model_index.json: patches of {config['patch_size']} x {config['patch_size']} of the VAE's {vae['z_dim']}"
            f" channels do not make the transformer's {transformer['in_channels']}"
        )
    for name in ("latents_mean", "latents_std"):
        values = vae[name]
        if len(values) != vae["z_dim"] or not all(map(math.isfinite, values)) or (name[-3:] == "std" and 0 in values):
            return f"vae/config.json: {name} must be {vae['z_dim']} finite numbers; copy or download it again"
    return ""


def _wrong_with_template(pipe: Any) -> str:
    """Whether the tokenizer makes as many tokens of K2's template as the model was trained with; empty if it does."""
    for text, count in (
        (pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx),
        (pipe.prompt_template_encode_suffix, pipe.prompt_template_encode_num_suffix_tokens),
    ):
        if (found := len(pipe.tokenizer(text)["input_ids"])) != count:
            return (
                f"tokenizer: makes {counted(found, 'token')} of a part of K2's prompt template that has {count}; copy"
                " or download the pipeline's own again"
            )
    return ""


def _wrong_with_schedule(scheduler: Any) -> str:
    """What `sampler.schedule` does not do of a scheduler's settings; empty if it does all of them."""
    name = type(scheduler).__name__
    if name != "FlowMatchEulerDiscreteScheduler":
        return f"scheduler: {name} is not sampled; use FlowMatchEulerDiscreteScheduler, K2's own"
    for key, wanted in HONOURED.items():
        if scheduler.config[key] != wanted:
            return (
                f"scheduler/scheduler_config.json: {key} is {json.dumps(scheduler.config[key])}, and only"
                f" {json.dumps(wanted)} is sampled; use K2's own schedule"
            )
    numbers = [scheduler.config[key] for key in SCHEDULER if key.startswith(("base_", "max_"))]
    # The numbers of tokens for the two shifts must differ: the shift is a line through both.
    whole = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    if not whole or scheduler.config["base_image_seq_len"] == scheduler.config["max_image_seq_len"]:
        return "scheduler/scheduler_config.json: base_ and max_shift and _image_seq_len must be numbers; copy it again"
    return ""


def check_names(
    where: str,
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    remedy: str,
    original_names: bool = False,
) -> None:
    """Raises UserError for missing, unexpected and misshapen keys, with their numbers and the first few of each."""
    check_tensors(where, expected, got, remedy, key_names.original_name if original_names else str)


def keeps_fp32(name: str) -> bool:
    """Whether diffusers keeps this transformer parameter, a scale of a norm, in fp32 on a bf16 model."""
    return not set(Krea2Transformer2DModel._keep_in_fp32_modules).isdisjoint(name.split("."))


def empty_transformer(path: str | Path) -> Any:
    """The transformer of a pipeline on the meta device: names and shapes without values."""
    folder = local(str(path), ("transformer/*.json",))
    config: Any = Krea2Transformer2DModel.load_config(str(folder), subfolder="transformer")
    with torch.device("meta"):
        return Krea2Transformer2DModel.from_config(config)


def _read_original(
    file: Path, folder: Path, where: str, dtype: torch.dtype, device: str | torch.device
) -> Krea2Transformer2DModel:
    """Reads one file in the original key names. diffusers' own reader ignores missing and extra keys."""
    with reading(f"{where}/transformer/config.json", "the transformer's settings"):
        transformer = empty_transformer(folder)
    tensors = load_file(file)
    for name, value in tensors.items():
        # ComfyUI's name of a weight's format, as JSON: some other formats have 8 bits and a scale too.
        if name.endswith(".comfy_quant") and b'"float8_e' not in (text := bytes(value.flatten().byte().tolist())):
            raise UserError(f"{file}: {name} is {text!r}, which is not fp8_scaled; give such a file, or bfloat16")
    weights = key_names.from_original(dequantized(tensors, dtype))
    remedy = f"give a file in the original key names that belongs to {where}/transformer"
    check_names(str(file), transformer.state_dict(), weights, remedy, original_names=True)
    # Copied: otherwise the weights stay mapped to the file, which someone may replace.
    weights = {key: value.to(torch.float32 if keeps_fp32(key) else dtype, copy=True) for key, value in weights.items()}
    transformer.load_state_dict(weights, assign=True)
    transformer.to(device)
    check_finite(file, transformer.state_dict())
    return transformer


def dequantized(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file that `check_directory` has passed: weights in 8 bits times their scales, the product in
    float32 and rounded to `dtype` once. A file without such weights stays as it is."""
    scales: dict[str, str] = {}
    for name, value in tensors.items():
        if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and (scale := scale_of(name, tensors)):
            scales[name] = scale
    if not scales:
        return dict(tensors)
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in scales:
            scale = tensors[scales[name]].float()
            # A scale for each output stands for its row.
            scale = scale.reshape([-1] + [1] * (value.ndim - 1))
            plain[name] = (value.float() * scale).to(dtype)
        elif name not in scales.values() and not name.endswith(UNUSED):
            plain[name] = value
    return plain


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
HONOURED = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
"""Settings of a scheduler that change its times or steps, with what the sampler does."""


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
