"""Measures a nano pipeline directory with stock diffusers and the oracles.

    python -m posttrain.nano.build.evaluate posttrain/nano/weights/k2-nano --out DIR --guidance 0 1.5

Writes DIR/figures.json and an image grid for each guidance. Held-out prompts, 28 steps, seeds by prompt index.
The images are kept in DIR/images-*.npz and not drawn again: drawing wants a GPU, judging does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Krea2Pipeline
from PIL import Image

from posttrain.model import sampler
from posttrain.model.load import flatten_time
from posttrain.nano.build import build
from posttrain.nano.world import oracles, prompts, scenes, statements


def load(model: Path | str, device: str) -> Krea2Pipeline:
    """The stock pipeline; its autoencoder, which is one of videos, as one of images."""
    pipe: Any = Krea2Pipeline.from_pretrained(model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    flatten_time(pipe.vae)
    return pipe


@torch.no_grad()
def generate(pipe: Krea2Pipeline, texts: list[str], seeds: list[int], steps: int, guidance: float, batch: int):
    """Images (N,64,64,3) uint8 by the stock pipeline; noise depends on the seed alone."""
    out = []
    for i in range(0, len(texts), batch):
        # 64 tokens of 64 channels: an image of 64 x 64 pixels.
        noise = sampler.noise(seeds[i : i + batch], (64, 64))
        images: Any = pipe(
            texts[i : i + batch],
            height=64,
            width=64,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise,
            output_type="np",
            max_sequence_length=48,
            return_dict=False,
        )
        out.append((images[0] * 255 + 0.5).astype(np.uint8))
    return np.concatenate(out)


def perceive(pool, images: np.ndarray) -> list[oracles.Percept]:
    """Runs the oracle on all processes of a pool."""
    parts = pool.map(oracles.perceive, np.array_split(images, max(1, len(images) // 20)))
    return list(itertools.chain(*parts))


def figures(pool, images: np.ndarray, records: list[dict]) -> dict[str, float]:
    """Oracle accuracy overall, by kind of statement and of scene, words read, share free of artifacts."""
    seen = perceive(pool, images)
    met: dict[str, list[float]] = {}
    for percept, record in zip(seen, records):
        marks = []
        for requirement in record["requirements"]:
            marks.append(statements.meets(percept, requirement))
            met.setdefault(f"statement/{statements.parse(requirement)[0]}", []).append(marks[-1])
        # An image counts once, however much its prompt requires.
        accuracy = float(np.mean(marks))
        met.setdefault("accuracy", []).append(accuracy)
        met.setdefault(f"scene/{record['tags'][0]}", []).append(accuracy)
        met.setdefault("clean", []).append(percept.clean)
        if record["texts"]:
            met.setdefault("text", []).append(percept.scene.text == record["texts"][0])
    return {name: round(float(np.mean(values)), 4) for name, values in sorted(met.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.5])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--draw-only", action="store_true", help="stop after drawing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    records = prompts.read("heldout")[: args.prompts]
    groups_of = [record["prompt"] for record in prompts.read("open")[:10]]
    pipe = load(args.model, args.device)
    # After the held-out prompts, groups of 16 images of one prompt that leaves the style open, for diversity.
    texts = [record["prompt"] for record in records] + np.repeat(groups_of, 16).tolist()
    seeds = [*range(len(records)), *range(160)]
    for guidance in args.guidance:
        path = args.out / f"images-{guidance:g}.npz"
        if not path.exists():
            images = generate(pipe, texts, seeds, args.steps, guidance, args.batch)
            np.savez_compressed(path, images=images)
    if args.draw_only:
        return
    # Spawned: a fork of a process that has CUDA or threads of torch may hang. One thread each: a process a core.
    pool = multiprocessing.get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, (1,))
    rng = np.random.default_rng(77)
    true = [scenes.random_scene(rng) for _ in range(500)]
    drawn = np.stack(list(map(scenes.render, true)))
    pixels = torch.from_numpy(drawn).to(args.device)
    result: dict = {"psnr": round(build.psnr(pipe.vae, pixels), 2)}
    back = build.autoencoded(pipe.vae, pixels)
    rows = []
    for scene in true:
        description = scenes.describe(scene, rng)
        rows.append({"requirements": description.requirements, "texts": description.texts, "tags": [scene.kind]})
    # The first is the oracle's own error, the second adds the VAE's.
    result["true scenes"] = figures(pool, drawn, rows)
    result["reconstructed"] = figures(pool, back, rows)
    Image.fromarray(_tile(np.concatenate([drawn[:20], back[:20]]), 20)).save(args.out / "vae.png")
    for guidance in args.guidance:
        images = np.load(args.out / f"images-{guidance:g}.npz")["images"]
        images, groups = images[: len(records)], images[len(records) :]
        row = figures(pool, images, records)
        styles = [percept.scene.style for percept in perceive(pool, groups)]
        # How many styles each group of 16 has: what the prompt leaves open should vary.
        kinds = [len(set(styles[i : i + 16])) for i in range(0, 160, 16)]
        row |= {"styles in a group of 16": float(np.mean(kinds)), "fewest styles in a group": min(kinds)}
        result[f"guidance {guidance:g}"] = row
        name = f"guidance-{guidance:g}.png"
        Image.fromarray(_tile(np.concatenate([images[:60], groups[:40]]), 20)).save(args.out / name)
    (args.out / "figures.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _tile(images: np.ndarray, columns: int) -> np.ndarray:
    n, h, w, c = images.shape
    return images.reshape(n // columns, columns, h, w, c).swapaxes(1, 2).reshape(n // columns * h, columns * w, c)


if __name__ == "__main__":
    main()
