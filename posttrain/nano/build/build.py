"""Builds K2-nano from nothing: a real Krea2Pipeline directory whose weights are trained on scenes.

    python -m posttrain.nano.build.build OUT --device cuda --vae-minutes 1.5 --minutes 6

    python -m posttrain.nano.build.build OUT --start EARLIER/k2-nano --seed 1 --minutes 6

One pass on one GPU takes under ten minutes, and --start trains one on; on a CPU the same code runs, slower.
Stages: scenes and captions (all cores), a tokenizer, an autoencoder (pixel error and a little KL), then transformer
and text encoder together on the rectified-flow loss with caption dropout. Captions are wrong about as often as those
of the web, and some images are damaged: so Raw is good, not perfect, and guidance helps.

Shapes: images (N,64,64,3) uint8, latents (N,16,16,16), captions (N,V,L) token ids. t in [0,1], 1 is noise.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline
from transformers import Qwen3VLModel

from posttrain.model import architecture
from posttrain.model.architecture import pack
from posttrain.model.load import flatten_time
from posttrain.nano.build.parts import (
    PREFIX,
    SUFFIX,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
)
from posttrain.nano.world import damage, scenes

CAPTION_NOISE, LETTER_NOISE, DAMAGED = 0.25, 0.03, 0.05
VARIANTS = 4
"""Captions drawn for an image."""


# ---- data -------------------------------------------------------------------------------------------------


def _make_chunk(job: tuple[int, int]) -> tuple[np.ndarray, list[list[str]]]:
    seed, n = job
    rng = np.random.default_rng(seed)
    images, captions = np.empty((n, scenes.SIZE, scenes.SIZE, 3), np.uint8), []
    for i in range(n):
        scene = scenes.random_scene(rng)
        images[i] = scenes.render(scene)
        if rng.random() < DAMAGED:
            images[i] = damage.damage(images[i], scene, rng)
        # Captions of the web are often wrong, and these are too: guidance then helps, as it does for K2.
        variants = []
        for _ in range(VARIANTS):
            mutated = scenes.mutate(scene, rng, CAPTION_NOISE, LETTER_NOISE)
            variants.append(scenes.describe(mutated, rng, rng.choice([0.2, 0.6, 1.0])).prompt)
        captions.append(variants)
    return images, captions


def chunks(total: int, size: int, seed: int) -> list[tuple[int, int]]:
    """(seed, count) of each part. A seed for each, so that the result does not depend on who makes which."""
    parts = []
    for i, first in enumerate(range(0, total, size)):
        # The wide step keeps the seeds of two runs apart.
        parts.append((seed * 100_003 + i, min(size, total - first)))
    return parts


def make_data(n: int, seed: int, workers: int) -> tuple[np.ndarray, list[list[str]]]:
    """n images (n,64,64,3) uint8 and VARIANTS captions for each, the same for any number of workers."""
    images: list[np.ndarray] = []
    captions: list[list[str]] = []
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for drawn, described in pool.map(_make_chunk, chunks(n, 500, seed)):
            images.append(drawn)
            captions += described
    return np.concatenate(images), captions


# ---- training ---------------------------------------------------------------------------------------------


def rate(elapsed: float, peak: float) -> float:
    """Warm-up over the first 3 % of the time, then half a cosine down to 2 %."""
    return peak * min(1.0, elapsed / 0.03) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(1.0, elapsed))))


def adamw(params: list[torch.nn.Parameter], weight_decay: float, **options: Any) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: norms and biases have no size to keep small."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for p in params:
        (matrices if p.ndim > 1 else others).append(p)
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}], **options
    )


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B,H,W,3) -> float (B,3,1,H,W) in [-1,1]."""
    return (images.permute(0, 3, 1, 2)[:, :, None].float() / 127.5) - 1


def train_vae(vae: AutoencoderKLQwenImage, images: torch.Tensor, minutes: float, batch: int, log) -> None:
    """Pixel error, coloured pixels weighing up to three times as much (most of an image is grey), and a little KL."""
    device = images.device
    flatten_time(vae).to(device).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    # By time and not by steps: the recipe is made for a budget of minutes on whatever there is.
    start, step = time.time(), 0
    while (elapsed := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(elapsed, 3e-3)
        x = to_pixels(images[torch.randint(len(images), (batch,), device=device)])
        with torch.autocast(device.type, torch.bfloat16):
            # Clamped as diffusers does it, so that the exponential below stays finite.
            mean, log_variance = vae.quant_conv(vae.encoder(x)).float().clamp(-30, 20).chunk(2, dim=1)
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            y = vae.decoder(vae.post_quant_conv(z))
        error = y.float() - x
        # The range of a pixel's channels, in [0, 2], is how coloured it is.
        weight = 1 + x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = (weight * (error.square() + 0.1 * error.abs())).mean() + 1e-5 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            mse = error.square().mean().item()
            log(stage="vae", step=step, seconds=time.time() - start, loss=loss.item(), mse=mse)
        step += 1
    log(stage="vae", step=step, seconds=time.time() - start)
    vae.eval()
    # An image is one frame, so the two earlier taps in time only ever meet zeros and were never trained.
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d) and module.weight.shape[2] > 1:
                module.weight[:, :, :-1] = 0


def _mean(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> torch.Tensor:
    return vae.encode(to_pixels(images), return_dict=False)[0].mode()


@torch.no_grad()
def reconstruct(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> torch.Tensor:
    """uint8 (B,H,W,3) -> float (B,3,H,W) in [-1,1], through the autoencoder."""
    decoded: torch.Tensor = vae.decode(_mean(vae, images), return_dict=False)[0]  # type: ignore[assignment]
    return decoded[:, :, 0].float()


def autoencoded(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> np.ndarray:
    """uint8 (N,H,W,3) -> the same, through the autoencoder."""
    back = torch.cat([reconstruct(vae, part) for part in images.split(50)]).clamp(-1, 1)
    return ((back.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5 + 0.5).astype(np.uint8)


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, images: torch.Tensor, batch: int = 512) -> torch.Tensor:
    """Latent means (N,16,h,w) fp32, not normalised."""
    return torch.cat([_mean(vae, i)[:, :, 0].float() for i in images.split(batch)])


@torch.no_grad()
def psnr(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio of the reconstruction, decibels."""
    values = []
    for part in images.split(250):
        # Halved: pixels are in [-1, 1], and the peak is meant to be 1.
        y = reconstruct(vae, part)
        error = ((y - to_pixels(part)[:, :, 0]) / 2).square().mean((1, 2, 3))
        values.append(-10 * error.log10())
    return torch.cat(values).mean().item()


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    """[prefix | prompt | suffix | PAD], int16 (N, L) with L a multiple of 16 after the prefix."""
    texts = [PREFIX + c + SUFFIX for c in captions]
    tokenizer.padding_side = "right"
    parts: list[np.ndarray] = []
    for i in range(0, len(texts), 20_000):
        ids = tokenizer(texts[i : i + 20_000], padding="longest", return_tensors="np").input_ids
        parts.append(ids.astype(np.int16))
    # The prefix has 34 tokens; few lengths after it mean few compiled graphs.
    longest = -(-(max(part.shape[1] for part in parts) - 34) // 16) * 16 + 34
    rows = np.full((len(texts), longest), tokenizer.pad_token_id, np.int16)
    first = 0
    for part in parts:
        rows[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return torch.from_numpy(rows)


def text_states(text_encoder: Qwen3VLModel, ids: torch.Tensor) -> torch.Tensor:
    """Tapped states of token ids (B, L), prefix dropped: (B, L-34, 3, 96). Causal, so padding on the right is mute."""
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()[None, None]
    states = text_encoder.language_model(
        input_ids=ids, attention_mask=causal, output_hidden_states=True, use_cache=False
    ).hidden_states
    return torch.stack([states[i] for i in (1, 2, 4)], dim=2)[:, 34:]


def captured(update, pool):
    """A training update as one CUDA graph: at this size launching its kernels takes longer than running them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates what later updates reuse
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = update()

    def replay():
        graph.replay()
        return results

    return replay


def train_transformer(pipe: Krea2Pipeline, latents, ids, minutes: float, batch: int, peak: float, log, graphs: bool):
    """Rectified flow: v = noise - latent at logit-normal t (mean 0.5), 10 % of captions dropped, weights averaged."""
    device = latents.device
    text_encoder, transformer = pipe.text_encoder.to(device), pipe.transformer.to(device)
    # Captions are text alone, so the vision half would get no gradient.
    for p in text_encoder.visual.parameters():
        p.requires_grad_(False)
    if device.type == "cuda":
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        architecture.compile_text_fusion(transformer)
    params = [*transformer.parameters(), *text_encoder.language_model.parameters()]
    lr = torch.zeros((), device=device)  # a tensor, so that a captured update reads the rate of its moment
    cuda = device.type == "cuda"
    optimizer = adamw(params, 0.01, lr=lr, betas=(0.9, 0.99), fused=True, capturable=cuda)
    weights = [p.detach() for p in params]  # the same memory, so they follow the optimiser
    averages = [weight.clone() for weight in weights]
    pad = pipe.tokenizer.pad_token_id
    lengths = (-(-((ids != pad).sum(-1) - 34) // 16) * 16 + 34).to(device)  # padded length of each caption
    empty = tokenize(pipe.tokenizer, [""])[0].to(device)

    def update(n: int, bucket: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        picks = bucket[torch.randint(len(bucket), (batch,), device=device)]
        rows = ids[picks[:, 0], picks[:, 1], :n].long()
        blank = torch.full((n,), pad, device=device)
        blank[: min(n, len(empty))] = empty[:n].long()
        # Guidance needs the velocity without a caption, which is that of the empty one.
        rows = torch.where(torch.rand(batch, 1, device=device) < 0.1, blank, rows)
        x0 = latents[picks[:, 0]].float()
        t = torch.sigmoid(torch.randn(batch, device=device) + 0.5)
        noise = torch.randn_like(x0)
        x = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        # Casted weights must not be cached where a CUDA graph is captured.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            states = text_states(text_encoder, rows)
            v = transformer(x, states, t, positions[n], (rows != pad)[:, 34:], return_dict=False)[0]
        loss = (v.float() - (noise - x0)).pow(2).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.detach(), norm

    buckets: dict[int, torch.Tensor] = {}  # by length: where its captions are in ids
    positions: dict[int, torch.Tensor] = {}
    for n in lengths.unique().tolist():
        buckets[n] = (lengths == n).nonzero()
        positions[n] = pipe.prepare_position_ids(n - 34, 8, 8, device)
    updates = [partial(update, n, bucket) for n, bucket in buckets.items()]
    if graphs:
        # One pool of memory: the graphs never run at the same time.
        pool = torch.cuda.graph_pool_handle()
        updates = [captured(u, pool) for u in updates]
    else:
        for u in updates:  # the first of each length compiles: that is not counted
            u()
    order = random.Random(0)
    sizes = list(map(len, buckets.values()))
    start, step = time.time(), 0
    while (elapsed := (time.time() - start) / (60 * minutes)) < 1:
        lr.fill_(rate(elapsed, peak))
        # A batch of one length, drawn as often as captions have it: so all captions are equally likely.
        loss, norm = order.choices(updates, sizes)[0]()
        step += 1
        if step % 10 == 0:
            # The mean of all steps at first, later of about the last 500.
            torch._foreach_lerp_(averages, weights, max(0.02, 10 / (step + 10)))
        if step % 100 == 0:
            log(stage="transformer", step=step, seconds=time.time() - start, loss=loss.item(), norm=norm.item())
    torch._foreach_copy_(weights, averages)
    log(stage="transformer", step=step, seconds=time.time() - start)


# ---- all of it --------------------------------------------------------------------------------------------


def save(pipe: Krea2Pipeline, folder: Path) -> None:
    """Writes the pipeline in bfloat16, as safetensors."""
    # Copies, since `to` would change the modules themselves.
    parts = {}
    for name in ("vae", "text_encoder", "transformer"):
        parts[name] = copy.deepcopy(getattr(pipe, name)).to("cpu", torch.bfloat16)
    make_pipeline(pipe.tokenizer, **parts).save_pretrained(folder, safe_serialization=True)


def begin(out: Path, device: str, seed: int) -> tuple[Callable[..., None], torch.device]:
    """Makes the directory and sets seed and precision; returns what logs a row to the terminal and to log.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()

    def log(**row) -> None:
        row["total"] = round(time.time() - started, 1)
        print(json.dumps(row), flush=True)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return log, torch.device(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write k2-nano and log.jsonl to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=120_000, help="images to train on")
    parser.add_argument("--vae-minutes", type=float, default=1.5)
    parser.add_argument("--minutes", type=float, default=6.0, help="transformer and text encoder")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--vae-batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-graphs", action="store_true", help="launch kernels one by one on a GPU too")
    parser.add_argument("--start", type=Path, help="an earlier k2-nano: keep its tokenizer and autoencoder, train on")
    args = parser.parse_args()
    log, device = begin(args.out, args.device, args.seed)
    pixels, captions = make_data(args.scenes, args.seed, os.cpu_count() or 1)
    start: Any = Krea2Pipeline.from_pretrained(args.start, dtype=torch.float32) if args.start else None
    # A part is enough for a tokenizer of 640 tokens.
    tokenizer = start.tokenizer if start else make_tokenizer(list(itertools.chain(*captions[:4_000])))
    flat = tokenize(tokenizer, list(itertools.chain(*captions)))
    ids = flat.view(len(captions), VARIANTS, -1).to(device)
    log(stage="data", scenes=len(pixels), vocabulary=len(tokenizer), longest=ids.shape[-1])
    images = torch.from_numpy(pixels).to(device)

    vae = start.vae.to(device) if start else make_vae()
    if not start:
        # The first 500 images are left for the PSNR.
        train_vae(vae, images[500:], args.vae_minutes, args.vae_batch, log)
    log(stage="vae", psnr=psnr(flatten_time(vae), images[:500]))
    latents = encode(vae, images)
    # Latents of mean 0 and variance 1 in each channel, as the noise has: K2's config has the same fields.
    if not start:
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    # By channel, (16, 1, 1), as the pipeline takes it back when it decodes.
    mean = torch.tensor(vae.config["latents_mean"], device=device)[:, None, None]
    std = torch.tensor(vae.config["latents_std"], device=device)[:, None, None]
    latents = pack((latents - mean) / std).bfloat16()

    if start:
        pipe = start
    else:
        transformer = make_transformer(args.layers)
        # At zero, as the class begins, the layers before would get no gradient in the first step.
        architecture.randomise_output(transformer, std=0.02)
        pipe = make_pipeline(tokenizer, vae, make_text_encoder(len(tokenizer), tokenizer), transformer)
    parts = ("vae", "text_encoder", "transformer")
    log(stage="shapes", **{name: getattr(pipe, name).num_parameters() for name in parts})
    for p in [*pipe.transformer.parameters(), *pipe.text_encoder.parameters()]:
        p.requires_grad_(True)
    graphs = device.type == "cuda" and not args.no_graphs
    train_transformer(pipe, latents, ids, args.minutes, args.batch, args.lr, log, graphs)
    save(pipe, args.out / "k2-nano")


if __name__ == "__main__":
    main()
