"""The K2 model as post-training uses it: load, encode, velocity, sample, decode. Adapters are in roles.py.

diffusers owns the network; this file calls its parts in an order that saves work. Two savings are exact. Padding is
dropped: every text token has rotary position 0, and nothing reads a masked token. The fused text, which sees no t and
no image, is computed once a prompt for all steps and roles; unless a role adapts the layers that fuse it: then each
forward fuses it under its own role.

Shapes: B samples, L text tokens, N image tokens, C channels. Latents x are packed and fp32, (B, N, C); the
released checkpoint has N = H W / 256 and C = 64. Velocities are fp32 too, whatever dtype the network runs in.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.image_reader import to_rgb
from posttrain.model import architecture, references, sampler
from posttrain.model.architecture import Encoding, Text, pack, unpack
from posttrain.model.blocks import Blocks, VelocityModel
from posttrain.model.fingerprint import fingerprint
from posttrain.model.linears import FP8
from posttrain.model.load import load_pipeline, random_pipeline
from posttrain.model.offload import Offloaded, uses
from posttrain.model.references import References
from posttrain.model.roles import Roles, switched

DECODED = 2**20
"""Pixels that are decoded at a time, in 1 to 16 images. Each takes about 3 kB of memory in K2."""
ENCODED = 64
"""Images that are encoded at a time, at most; of more than DECODED pixels together, fewer."""


class K2(Roles):
    """One Krea2Pipeline and the roles on its transformer."""

    def __init__(self, pipe: Krea2Pipeline) -> None:
        super().__init__(pipe.components["transformer"])
        self.pipe = pipe
        self.vae: AutoencoderKLQwenImage = pipe.components["vae"]
        self.text_encoder: PreTrainedModel | None = pipe.components["text_encoder"]
        self.tokenizer: PreTrainedTokenizerBase | None = pipe.components["tokenizer"]
        self.dtype: torch.dtype = self.transformer.img_in.weight.dtype
        """The type that the network computes in, and of its frozen weights."""
        self.time_dtype = torch.float32
        """The precision of the time that the network gets; see `sampler.model_time`."""
        self.blocks = Blocks(self._active)
        """How the network's blocks run: compiled or not, and what they keep for backward."""
        self.velocity_model = VelocityModel(self.transformer, self.blocks)
        self.net: nn.Module = self.velocity_model
        """The network that `velocity` calls. A sharded run replaces it by its wrapped module."""
        self.reference: nn.Module | None = None
        """The network of role None, where all weights are a role and `reference` was asked for."""
        self.copies: dict[str, nn.Module] = {}
        """The networks of the roles of `add_full_copy`, by name."""
        self.offloaded: dict[str, Offloaded] = {}
        """Parts that are on the device only while they are used, by name; see `offload.place`."""
        self.sequence_parallel = 1  # processes that share a sample's tokens in training; see sequence.py
        self.begins_with: dict[str, Tensor] = {}
        """Factors, with scales in B, that the policy begins with when it is added; see training/policy.py."""
        self.origin: dict[str, Any] = {"base": None, "merged": []}
        """Fingerprint of the base, and the checkpoints that are stacked on it; see training/policy.py."""
        # Nothing is trained until a role is: a forgotten call cannot train the base.
        for module in (self.transformer, self.vae, self.text_encoder):
            if module is not None:
                module.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        transformer_file: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        transformer_format: str | None = None,
    ) -> "K2":
        """Loads a diffusers directory or a hub id; raises UserError for anything else.

        With `transformer_file`, the transformer's weights come from that safetensors file, in the original key names,
        in `transformer_format` (see ModelConfig). Everything else, its configuration too, comes from `path`.
        """
        return cls(load_pipeline(path, transformer_file, dtype, device, transformer_format))

    @classmethod
    def random(
        cls,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        scale: Literal["k2", "tiny"] = "k2",
        text: bool = True,
        seed: int = 0,
    ) -> "K2":
        """Random weights at the size of the released model (or tiny), for benchmarks. There is no tokenizer.

        text=False leaves the text encoder out. `random_features` replaces encoded prompts.
        """
        return cls(random_pipeline(device, dtype, scale, text, seed))

    def add_full_role(self, name: str, reference: bool = False) -> None:
        """See `Roles`. With `reference`, the role None is a frozen copy of the current weights."""
        copied = super().add_full_role(name, reference)
        self.reference = None if copied is None else VelocityModel(copied, self.blocks)

    def add_full_copy(self, name: str) -> None:
        super().add_full_copy(name)
        self.copies[name] = VelocityModel(self._copies[name], self.blocks)

    # shapes and schedule

    @property
    def device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def is_distilled(self) -> bool:
        return bool(self.pipe.config["is_distilled"])

    @property
    def pixel_multiple(self) -> int:
        """Pixels along one side of an image token. Heights and widths are multiples of it."""
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    @property
    def latent_channels(self) -> int:
        """Channels of a packed image token."""
        return self.transformer.config["in_channels"]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of image tokens for an image of that size in pixels."""
        multiple = self.pixel_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise UserError(f"resolution {height}x{width}: both must be multiples of {multiple} pixels")
        return height // multiple, width // multiple

    def image_tokens(self, height: int, width: int) -> int:
        rows, columns = self.grid(height, width)
        return rows * columns

    def mu(self, height: int, width: int) -> float:
        """The schedule's shift: fixed for a distilled checkpoint, by resolution for Raw."""
        if self.is_distilled:
            return sampler.TURBO_MU
        config = self.pipe.scheduler.config
        # The defaults are those of Krea2Pipeline, for checkpoints whose scheduler leaves them out.
        return sampler.resolution_mu(
            self.image_tokens(height, width),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 6400),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def config_fingerprint(self) -> str:
        """A short hash of the architecture. Adapters and resumed runs must match it."""
        # Keys with an underscore say where a checkpoint lies and by which version it was written. The tapped states are
        # a setting of the pipeline, but what fuses them has learnt these.
        config = {key: value for key, value in self.transformer.config.items() if not key.startswith("_")}
        config["taps"] = self.pipe.text_encoder_select_layers
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]

    # text

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_tokens: int = 512, batch: int = 16) -> Encoding:
        """The tapped hidden states of the text encoder, unpadded. Guidance uses the empty prompt."""
        ids, cut = self.tokenize(prompts, max_tokens)
        return Encoding(self.encode_tokens(ids, batch), cut)

    def tokenize(self, prompts: Sequence[str], max_tokens: int = 512) -> tuple[list[list[int]], list[int]]:
        """Token ids with the template, and how many tokens of each prompt did not fit into max_tokens."""
        if self.tokenizer is None:
            raise RuntimeError("this model has no tokenizer: use random_features")
        prefix, suffix = self.pipe.prompt_template_encode_prefix, self.pipe.prompt_template_encode_suffix
        suffix_ids = self.tokenizer(suffix)["input_ids"]
        # max_tokens counts prompt and suffix, as the pipeline does; the prefix, whose features are dropped, is extra.
        room = max_tokens + self.pipe.prompt_template_encode_start_idx - len(suffix_ids)
        ids: list[list[int]] = []
        cut: list[int] = []
        if not prompts:  # not every tokenizer takes an empty batch
            return ids, cut
        texts = [prefix + prompt for prompt in prompts]
        for row in self.tokenizer(texts)["input_ids"]:
            ids.append(row[:room] + suffix_ids)
            cut.append(max(0, len(row) - room))
        return ids, cut

    @torch.no_grad()
    @uses("text_encoder")
    def encode_tokens(self, ids: Sequence[list[int]], batch: int = 16) -> list[Tensor]:
        """Features of token ids with the template; those of its prefix are left out."""
        if self.text_encoder is None:
            raise RuntimeError("this model has no text encoder: use random_features")
        start = self.pipe.prompt_template_encode_start_idx
        features: dict[int, Tensor] = {}
        # Prompts of like lengths go together, so that little is padded.
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for first in range(0, len(ids), batch):
            chosen = by_length[first : first + batch]
            rows = [torch.tensor(ids[i], device=self.text_encoder.device) for i in chosen]
            # Padding on the right and causal attention: no real token sees padding, and positions count real tokens.
            tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)
            states = self.text_encoder(
                input_ids=tokens, position_ids=positions, output_hidden_states=True, use_cache=False
            ).hidden_states
            taps = torch.stack([states[i] for i in self.pipe.text_encoder_select_layers], dim=2)
            for row, i in enumerate(chosen):
                features[i] = taps[row, start : len(ids[i])].clone()  # a view would keep the padded batch in memory
        return [features[i] for i in range(len(ids))]

    def random_features(self, length: int, seed: int = 0) -> Tensor:
        """Random (length, taps, text_dim) features in place of an encoded prompt."""
        config = self.transformer.config
        shape = (length, config["num_text_layers"], config["text_hidden_dim"])
        return sampler.noise([seed], shape)[0].to(self.device, self.dtype)

    @torch.no_grad()
    def fuse(self, features: Tensor) -> Tensor:
        """One prompt's (L, taps, text_dim) to (L, C), through the part of the network that sees no t and no image.

        For `Text` use `text_tokens`: a role that adapts that part makes this wrong, and an error.
        """
        return self._fuse_each([features])[0]

    @torch.no_grad()
    def _fuse_each(self, features: Sequence[Tensor]) -> list[Tensor]:
        if not self.fused_text_is_constant():
            raise RuntimeError("text_fusion or txt_in is trained or adapted: fused text cannot be cached")
        with self.role(None):
            return architecture.fuse_each(self.transformer, features, self.device, self.dtype)

    def fused_text_is_constant(self) -> bool:
        """Whether `fuse` depends on no trainable parameter and no role."""
        trained = any(p.requires_grad for p in architecture.text_parameters(self.transformer))
        return not (trained or self.adapts_text)

    def text_tokens(self, features: Tensor) -> Tensor:
        """What a `Text` holds of one prompt's features (L, taps, text_dim): fused tokens (L, C); or the features, in
        the network's type, where a role adapts the layers that fuse them.

        All roles must be there already: text that was fused before is refused by `velocity`.
        """
        return features.to(self.device, self.dtype) if self.adapts_text else self.fuse(features)

    def all_text_tokens(self, features: Sequence[Tensor]) -> list[Tensor]:
        """`text_tokens` of several prompts, in their order. Those of one length are fused together."""
        return list(map(self.text_tokens, features)) if self.adapts_text else self._fuse_each(features)

    def fused(self, text: Text) -> Text:
        """The text as the active role reads it. `velocity` does this too; call it once before several forwards of one
        role without gradient."""
        if not self.adapts_text:
            return text
        # FP8 is no adapter: it changes how the blocks multiply, and nothing of what fuses the text.
        under = tuple(name for name in self._active if name != FP8)
        if text.is_fused:
            if text.under != under:
                raise RuntimeError(f"text was fused under {text.under} and is read under {under}: fuse it later")
            return text
        return replace(text, tokens=architecture.fuse(self.transformer, text.tokens, text.mask), under=under)

    def text_fingerprint(self) -> str:
        """Of all that `text_tokens` adds to features; for caches."""
        return "features" if self.adapts_text else fingerprint(architecture.text_weights(self.transformer))

    def text(self, prompts: Sequence[str], max_tokens: int = 512) -> Text:
        """Prompts encoded, fused where no role adapts that, and batched."""
        return Text.of([self.text_tokens(features) for features in self.encode(prompts, max_tokens).features])

    # the network

    def velocity(
        self, x: Tensor, t: sampler.Time, text: Text, height: int, width: int, *, shown: References | None = None
    ) -> Tensor:
        """The velocity (B, N, C), fp32, at latents x and time t, under the active role; `shown` are references."""
        grid, batch = self.grid(height, width), x.shape[0]
        if x.shape[1:] != (grid[0] * grid[1], self.latent_channels) or len(text) not in (1, batch):
            raise ValueError(f"latents {tuple(x.shape)}, {len(text)} texts: not for {height}x{width} pixels")
        if shown is not None and shown.cached is None and self._on_references:
            # What acts on references alone is off for all other rows, so these have a pass of their own.
            shown = self.keys_and_values(shown)
        text = self.fused(text)
        t = sampler.model_time(t, self.time_dtype).to(x.device).expand(batch)
        tokens = text.tokens.expand(batch, -1, -1)
        mask = None if text.mask is None else text.mask.expand(batch, -1)
        return self._network()(x.to(self.dtype), t, tokens, mask, grid, shown).float()

    def keys_and_values(self, shown: References) -> References:
        """The references with their keys and values in each block under the active role, in fp32 or the network's type.
        They are void when the role changes, or what it has learnt."""
        with switched(self._active, [*self._active, *self._on_references]):
            return references.keys_and_values(self.transformer, shown, self.dtype)

    @torch.no_grad()
    def cached(self, shown: References) -> References:
        """`keys_and_values` without gradient: one pass serves all steps, prompts and branches of guidance."""
        return self.keys_and_values(shown)

    def _network(self) -> nn.Module:
        role = self.active
        if role in self.copies:
            return self.copies[role]
        # An adapter, or an untrained base: switching roles needs no other network.
        if role is not None or None not in self.roles.values():
            return self.net
        if self.reference is None:
            raise ValueError(f"all weights are the role {next(iter(self.roles))!r}, and no reference was kept")
        return self.reference

    def guided_velocity(
        self,
        x: Tensor,
        t: sampler.Time,
        text: Text,
        null_text: Text | None,
        scale: float,
        height: int,
        width: int,
    ) -> Tensor:
        """The velocity guided towards `text` and away from `null_text`. Scale 0 costs a single forward."""
        v = self.velocity(x, t, text, height, width)
        if scale <= 0:
            return v
        if null_text is None:
            raise ValueError(f"guidance {scale} needs null_text, the fused empty prompt")
        return sampler.guide(v, self.velocity(x, t, null_text, height, width), scale)

    @torch.no_grad()
    def sample(
        self,
        text: Text,
        noise: Tensor,
        steps: int,
        height: int,
        width: int,
        guidance: float = 0.0,
        null_text: Text | None = None,
        mu: float | None = None,
    ) -> Tensor:
        """Latents (B, N, C) of the deterministic sampler, from noise of that shape; the same as stock Krea2Pipeline.

        `mu` is the schedule's shift; None: the model's own.
        """
        # The state stays fp32 from step to step; in bf16 the small steps of a long schedule would be rounded away.
        x = noise.to(self.device, torch.float32)
        text, null_text = self.fused(text), None if null_text is None else self.fused(null_text)
        times = sampler.schedule(steps, self.mu(height, width) if mu is None else mu)
        for t, t_next in itertools.pairwise(times):
            v = self.guided_velocity(x, t, text, null_text, guidance, height, width)
            x = sampler.ode_step(x, v, t, t_next)
        return x

    # images

    @torch.no_grad()
    @uses("vae")
    def decode(self, latents: Tensor, height: int, width: int, batch: int | None = None) -> Tensor:
        """Packed latents (B, N, C) to uint8 images (B, height, width, 3), `batch` at a time; None: see DECODED.

        Raises UserError if a pixel is not finite. All that is drawn passes here, and NaN would become black.
        """
        mean, std = self._latent_statistics()
        images, finite = [], []
        for part in latents.split(batch or max(1, min(16, DECODED // (height * width)))):
            part = part.to(self.vae.device, torch.float32)
            z = unpack(part, *self.grid(height, width), self.pipe.patch_size) * std + mean
            # The VAE is one of videos: an image is a video of one frame.
            pixels = self.vae.decode(z[:, :, None].to(self.vae.dtype), return_dict=False)[0][:, :, 0]
            finite.append(pixels.isfinite().all())
            # Rounded, not cut off: otherwise all images would be half a level darker.
            pixels = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
            images.append(pixels.round().to(torch.uint8).permute(0, 2, 3, 1))
        # One question for all: a GPU is waited for where images are fetched from it anyway.
        if not bool(torch.stack(finite).all()):
            raise UserError(
                "model: draws numbers that are not finite; copy or download it again, or go on from an earlier"
                " checkpoint with a lower optim.lr"
            )
        return torch.cat(images)

    @torch.no_grad()
    @uses("vae")
    def encode_images(self, images: Tensor | Sequence[Image.Image], batch: int | None = None) -> Tensor:
        """uint8 images (B, height, width, 3), or PIL images of one size, to packed latents: the mode of the
        posterior. `batch` at a time; None: see ENCODED."""
        if not isinstance(images, Tensor):
            arrays = [np.asarray(to_rgb(image)) for image in images]
            images = torch.from_numpy(np.stack(arrays))
        height, width = images.shape[1:3]
        self.grid(height, width)
        mean, std = self._latent_statistics()
        latents = []
        for part in images.split(batch or max(1, min(ENCODED, DECODED // (height * width)))):
            pixels = part.to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = self.vae.encode(pixels[:, :, None].to(self.vae.dtype), return_dict=False)[0]
            z = posterior.mode()[:, :, 0].float()
            latents.append(pack((z - mean) / std, self.pipe.patch_size))
        return torch.cat(latents)

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, c, 1, 1): the network sees latents normalised by them."""
        mean = torch.tensor(self.vae.config["latents_mean"], device=self.vae.device)
        std = torch.tensor(self.vae.config["latents_std"], device=self.vae.device)
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 (B, height, width, 3) to PIL images."""
    return [Image.fromarray(image) for image in images.cpu().numpy()]
