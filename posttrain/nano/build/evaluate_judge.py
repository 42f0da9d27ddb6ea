"""Measures a nano judge on held-out scenes, through its chat template as a server would ask it.

    python -m posttrain.nano.build.evaluate_judge posttrain/nano/weights/judge-nano [--k2 K2_NANO]

Statements are the requirements of a scene's description and of a description with single attributes changed, half of
them true; words are held out. With --k2 also on the autoencoder's images of the same scenes, and on images that
K2-nano generates for the held-out prompts, where the oracle says what is true.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from posttrain.judge.calibration import brier, expected_calibration_error
from posttrain.nano.world import oracles, prompts, questions, scenes
from posttrain.nano.world.scenes import Scene
from prompts.templates import load_template
from rewards.vlm import VLM

SEED = 4242


def statements(scene: Scene, rng: np.random.Generator) -> list[tuple[str, bool]]:
    """As many true requirements of a scene as false ones of the same scene with attributes changed."""
    true = list(scenes.describe(scene, rng).requirements)
    false: list[str] = []
    while len(false) < len(true):
        changed = scenes.mutate(scene, rng, 0.3)
        if scene.text and changed.text == scene.text:
            changed = scenes.replace(changed, text=questions.misspell(scene.text, rng))
        said = scenes.describe(changed, rng).requirements
        false += [s for s in said if not questions.is_true(scene, s) and s not in false]
    rng.shuffle(false)
    return [(s, questions.is_true(scene, s)) for s in true] + [(s, False) for s in false[: len(true)]]


def heldout(n: int, seed: int = SEED) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.random_scene(rng, prompts.HELDOUT_WORDS) for _ in range(n)]


def on_scenes(vlm: VLM, n: int, images: Sequence[np.ndarray] | None = None) -> dict[str, Any]:
    """Figures on n held-out scenes, drawn cleanly or given as images."""
    drawn = heldout(n)
    rng = np.random.default_rng(SEED + 1)
    rows = [statements(scene, rng) for scene in drawn]
    images = [Image.fromarray(p) for p in (images if images is not None else map(scenes.render, drawn))]
    return _judge(vlm, images, rows, [scene.text for scene in drawn])


def on_generated(vlm: VLM, images: Sequence[np.ndarray], records: Sequence[dict]) -> dict[str, Any]:
    """Figures on generated images: the truth is what the oracle sees, of the prompt's own requirements."""
    seen = oracles.perceive(images)
    rows = [[(r, oracles.meets(p, r)) for r in record["requirements"]] for p, record in zip(seen, records)]
    words = [p.scene.text if record["texts"] else "" for p, record in zip(seen, records)]
    figures = _judge(vlm, [Image.fromarray(p) for p in images], rows, words)
    figures["oracle_says_true"] = round(float(np.mean([t for row in rows for _, t in row])), 4)
    figures["oracle_met"] = round(float(np.mean([np.mean([t for _, t in row]) for row in rows])), 4)
    return figures


def _judge(vlm: VLM, images: list[Image.Image], rows: list[list[tuple[str, bool]]], words: list[str]):
    template = load_template("rubric")
    asked = [(i, s, t) for i, row in enumerate(rows) for s, t in row]
    texts = [template.render(requirement=s) for _, s, _ in asked]
    p = np.array(vlm.p_yes([images[i] for i, _, _ in asked], texts, 64))
    truth = np.array([t for _, _, t in asked])
    right = (p > 0.5) == truth
    kinds = np.array([oracles.parse(s)[0] for _, s, _ in asked])
    wordy = [i for i, word in enumerate(words) if word]
    blank = [i for i, word in enumerate(words) if not word][: max(20, len(wordy))]
    ask = load_template("transcribe").render()
    read = vlm.complete([images[i] for i in wordy + blank], [ask] * len(wordy + blank), 20, 64)
    exact = [r == json.dumps({"lines": [words[i]] if words[i] else []}) for i, r in zip(wordy + blank, read)]
    return {
        "questions": len(asked),
        "accuracy": round(float(right.mean()), 4),
        **{f"accuracy/{k}": round(float(right[kinds == k].mean()), 4) for k in sorted(set(kinds))},
        "accuracy/said true": round(float(right[truth].mean()), 4),
        "accuracy/said false": round(float(right[~truth].mean()), 4),
        "brier": round(brier(p, truth), 4),
        "ece": round(expected_calibration_error(p, truth), 4),
        "words": len(wordy),
        "words_exact": round(float(np.mean(exact[: len(wordy)])), 4) if wordy else None,
        "no_words_exact": round(float(np.mean(exact[len(wordy) :])), 4) if blank else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--k2", help="K2-nano directory")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    vlm = VLM.load(args.model, device=args.device)
    figures = {"clean": on_scenes(vlm, args.scenes)}
    if args.k2:
        from diffusers import Krea2Pipeline

        from posttrain.model.vae import flatten_time
        from posttrain.nano.build import build, evaluate

        pipe = Krea2Pipeline.from_pretrained(args.k2, dtype=torch.float32).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        flatten_time(pipe.vae)
        drawn = torch.from_numpy(np.stack([scenes.render(s) for s in heldout(args.scenes)])).to(args.device)
        back = torch.cat([build.reconstruct(pipe.vae, part) for part in drawn.split(50)])
        pixels = ((back.permute(0, 2, 3, 1).clamp(-1, 1).cpu().numpy() + 1) * 127.5 + 0.5).astype(np.uint8)
        figures["autoencoded"] = on_scenes(vlm, args.scenes, list(pixels))
        lines = (prompts.FOLDER / "heldout.jsonl").read_text().splitlines()[: args.scenes]
        records = [json.loads(line) for line in lines]
        images = evaluate.generate(pipe, [r["prompt"] for r in records], [*range(len(records))], 28, 0.0, 50)
        figures["generated"] = on_generated(vlm, list(images), records)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
