"""Draws images of expansions with a frozen K2: in this process, or on servers with OpenAI's images endpoint.

A renderer takes prompts with one seed each and returns an image or None for each. It never substitutes another image.
If too many images are missing, the run ends with the server's own message.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from openai import APIResponseValidationError, AsyncOpenAI
from PIL import Image
from torch import Tensor

from posttrain.errors import UserError, counted
from posttrain.expander.gdpo_config import RendererConfig
from posttrain.image_reader import read_image
from posttrain.loading import local
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.runs import startup
from posttrain.tokenizer import load_tokenizer
from rewards.base import WINDOW
from rewards.endpoints import Endpoints, JudgeError, share
from rewards.serve import read_key, refuse_keys
from rewards.traffic import Sent

SUFFIX_TOKENS = 5
"""Tokens that K2's template puts after the prompt, within the text length."""
SEEDS = 2**31
"""Servers accept seeds below this."""


@dataclass
class Rendering:
    """The images of N prompts."""

    images: list[Image.Image | None]
    cut: list[int]
    """Tokens of each prompt beyond K2's text length, which K2 does not see."""
    failures: Counter[str] = field(default_factory=Counter)
    """Reasons for missing images."""


class Renderer(Protocol):
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Rendering:
        """One image for each prompt; equal seeds give equal noise."""
        ...


def make_renderer(config: RendererConfig, device: torch.device) -> Renderer:
    return EndpointRenderer(config) if config.urls else K2Renderer(config, device)


class K2Renderer:
    """A K2 in this process, sampled deterministically. Fused text is computed once a prompt."""

    def __init__(self, config: RendererConfig, device: torch.device):
        self.config = config
        startup.lap("prepare")
        self.k2 = K2.load(config.path, None, getattr(torch, config.dtype), device)
        startup.lap("read")
        self.k2.blocks.compiled = None  # on a GPU in bf16, as for a recipe's model
        turbo = self.k2.is_distilled
        self.steps = sampler.STEPS[turbo] if config.steps is None else config.steps
        self.guidance = sampler.GUIDANCE[turbo] if config.guidance is None else config.guidance
        self.k2.grid(*config.size)  # refuses a size that K2 cannot draw
        self._null = self.k2.text([""]) if self.guidance else None  # what guidance leads away from

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Rendering:
        encoding = self.k2.encode(prompts, self.config.max_tokens)
        fused = [self.k2.text_tokens(features) for features in encoding.features]
        height, width = self.config.size
        images: list[Image.Image | None] = [None] * len(prompts)
        batches = draw_in_batches(
            self.k2, fused, seeds, (height, width), self.steps, self.config.micro_batch, self.guidance, self._null
        )
        for rows, latents in batches:
            for i, image in zip(rows, to_pil(self.k2.decode(latents, height, width))):
                images[i] = image
        return Rendering(images, encoding.cut)


def draw_in_batches(
    k2: K2,
    fused: Sequence[Tensor],
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    micro_batch: int,
    guidance: float = 0.0,
    null: Text | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Draws batches under the active role; yields (indices of the prompts, latents (B, N, C)).

    Prompts of similar length are drawn together, since they need little padding.
    """
    shape = (k2.image_tokens(*size), k2.latent_channels)
    order = sorted(range(len(fused)), key=lambda i: len(fused[i]))
    for first in range(0, len(order), micro_batch):
        rows = order[first : first + micro_batch]
        text = Text.of([fused[i] for i in rows])
        noise = sampler.noise([seeds[i] for i in rows], shape)
        yield rows, k2.sample(text, noise, steps, *size, guidance, null)


class EndpointRenderer:
    """Draws on servers with POST /v1/images/generations, such as SGLang's and vLLM-Omni's, balanced by load.

    Requests have OpenAI's fields and `seed`, and `num_inference_steps` and `guidance_scale` if the recipe sets them.
    """

    def __init__(self, config: RendererConfig):
        self.config = config
        refuse_keys(config.urls, "renderer.urls")
        folder = local(config.path, ("tokenizer/*",)) / "tokenizer"
        self._tokenizer: Any = load_tokenizer(folder, f"renderer.path: {config.path}/tokenizer", None)
        key = read_key(config.api_key_env, "renderer.api_key_env") if config.api_key_env is not None else "none"
        if key is None:
            raise UserError(f"renderer.api_key_env: {config.api_key_env} is not set: export it")
        self._key = key
        self._failed: deque[bool] = deque(maxlen=WINDOW)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Rendering:
        """Raises UserError when too many images are missing."""
        # Servers do not say what they cut, so tokens are counted here.
        cut = []
        for ids in self._tokenizer(list(prompts)).input_ids if prompts else []:
            cut.append(max(0, len(ids) + SUFFIX_TOKENS - self.config.max_tokens))
        images: list[Image.Image | None] = []
        failures: Counter[str] = Counter()
        for answer in asyncio.run(self._all(prompts, seeds)):
            if isinstance(answer, str):
                # a server may repeat the request, and this message goes into logs
                failures[answer.replace(self._key, "***") if self._key != "none" else answer] += 1
            images.append(None if isinstance(answer, str) else answer)
        self._check([image is None for image in images], failures)
        return Rendering(images, cut, failures)

    async def _all(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | str]:
        c = self.config
        endpoints = Endpoints(c.urls, self._key, c.timeout, c.deadline, c.retries)  # clients belong to one event loop
        slots = asyncio.Semaphore(share(c.concurrency))  # this process's share of the run's limit

        async def one(prompt: str, seed: int) -> Image.Image | str:
            async with slots:
                return await self._draw(endpoints, prompt, seed)

        try:
            return list(await asyncio.gather(*map(one, prompts, seeds)))
        finally:
            for endpoint in endpoints.endpoints:
                await endpoint.client.close()

    async def _draw(self, endpoints: Endpoints, prompt: str, seed: int) -> Image.Image | str:
        """The image, or why there is none."""
        c = self.config
        height, width = c.size
        body: dict[str, Any] = {
            "model": c.model or c.path, "prompt": prompt, "n": 1, "size": f"{width}x{height}",
            "response_format": "b64_json", "seed": seed % SEEDS,
        }  # fmt: skip
        if c.steps is not None:
            body["num_inference_steps"] = c.steps
        if c.guidance is not None:
            body["guidance_scale"] = c.guidance

        async def send(client: AsyncOpenAI, _: Sent) -> Any:
            return await client.post("/images/generations", body=body, cast_to=object)

        try:
            answer = await endpoints.request(send)
            data = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
            image = read_image(data)
        except JudgeError as error:
            return str(error)
        except (APIResponseValidationError, KeyError, IndexError, TypeError, binascii.Error, ValueError) as error:
            return f"the server's answer is not an image: {type(error).__name__}: {error}"
        if image.size != (width, height):
            return f"the server drew {image.width} x {image.height} pixels, not {width} x {height}"
        return image

    def _check(self, failed: Sequence[bool], failures: Counter[str]) -> None:
        self._failed.extend(failed)
        bad, limit = sum(self._failed), self.config.max_failures
        # over a window of calls, except that a call without any image ends the run at once
        if failures and limit < 1 and (bad > limit * WINDOW or all(failed)):
            raise UserError(
                f"renderer: {bad} of the last {counted(len(self._failed), 'image')} missing (renderer.max_failures"
                f" {limit:g} of {WINDOW}): {failures.most_common(1)[0][0]}"
            )
