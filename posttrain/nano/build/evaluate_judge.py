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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from posttrain.judge.calibration import brier, expected_calibration_error
from posttrain.nano.world import oracles, prompts, questions, scenes, statements
from posttrain.nano.world.scenes import Scene
from prompts.templates import load_template
from rewards.vlm import VLM

SEED = 4242


def true_and_false(scene: Scene, rng: np.random.Generator) -> list[tuple[str, bool]]:
    """Equally many true requirements of a scene and false ones, from the same scene with some attributes changed."""
    true = list(scenes.describe(scene, rng).requirements)
    false: list[str] = []
    while len(false) < len(true):
        changed = scenes.mutate(scene, rng, 0.3)
        # A chance of 0.3 a letter often leaves a short word as it is, and words are what is hardest to read.
        if scene.text and changed.text == scene.text:
            changed = replace(changed, text=questions.misspell(scene.text, rng))
        # A changed scene still has true statements in common with the first.
        for statement in scenes.describe(changed, rng).requirements:
            if not questions.is_true(scene, statement) and statement not in false:
                false.append(statement)
    # The last of the changed scenes may give more than are wanted.
    rng.shuffle(false)
    answers = []
    for statement in true + false[: len(true)]:
        answers.append((statement, questions.is_true(scene, statement)))
    return answers


def heldout(n: int, seed: int = SEED) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.random_scene(rng, prompts.HELDOUT_WORDS) for _ in range(n)]


def on_scenes(vlm: VLM, n: int, images: Sequence[np.ndarray] | None = None) -> dict[str, Any]:
    """Figures on n held-out scenes, drawn cleanly or given as images."""
    drawn = heldout(n)
    rng = np.random.default_rng(SEED + 1)
    rows = [true_and_false(scene, rng) for scene in drawn]
    arrays = images if images is not None else list(map(scenes.render, drawn))
    return _judge(vlm, list(map(Image.fromarray, arrays)), rows, [scene.text for scene in drawn])


def on_generated(vlm: VLM, images: Sequence[np.ndarray], records: Sequence[dict]) -> dict[str, Any]:
    """Figures on generated images: whether the prompt's requirements are met, says the oracle."""
    rows: list[list[tuple[str, bool]]] = []
    truth: list[list[bool]] = []
    words: list[str] = []
    for percept, record in zip(oracles.perceive(images), records):
        met = [statements.meets(percept, requirement) for requirement in record["requirements"]]
        rows.append(list(zip(record["requirements"], met)))
        truth.append(met)
        words.append(percept.scene.text if record["texts"] else "")
    figures = _judge(vlm, list(map(Image.fromarray, images)), rows, words)
    figures["oracle_says_true"] = _mean(np.concatenate(truth))
    figures["oracle_met"] = _mean(list(map(np.mean, truth)))
    return figures


def _judge(vlm: VLM, images: list[Image.Image], rows: list[list[tuple[str, bool]]], words: list[str]):
    template = load_template("rubric")
    asked: list[Image.Image] = []
    texts: list[str] = []
    answers: list[bool] = []
    kinds: list[str] = []
    for image, row in zip(images, rows):
        for statement, met in row:
            asked.append(image)
            texts.append(template.render(requirement=statement))
            answers.append(met)
            kinds.append(statements.parse(statement)[0])
    p, truth = np.array(vlm.p_yes(asked, texts, 64)), np.array(answers)
    right = (p > 0.5) == truth
    figures: dict[str, Any] = {"questions": len(asked), "accuracy": _mean(right)}
    for kind in sorted(set(kinds)):
        figures[f"accuracy/{kind}"] = _mean(right[np.array(kinds) == kind])
    figures |= {
        "accuracy/said true": _mean(right[truth]),
        "accuracy/said false": _mean(right[~truth]),
        "brier": round(brier(p, truth), 4),
        "ece": round(expected_calibration_error(p, truth), 4),
    }
    # A judge that always reads a word would be right on every image with one.
    wordy = [i for i, word in enumerate(words) if word]
    blank = [i for i, word in enumerate(words) if not word][: max(20, len(wordy))]
    read = wordy + blank
    question = load_template("transcribe").render()
    replies = vlm.complete([images[i] for i in read], [question] * len(read), 20, 64)
    exact = [reply == questions.transcript(words[i]) for i, reply in zip(read, replies)]
    figures["words"] = len(wordy)
    figures["words_exact"] = _mean(exact[: len(wordy)]) if wordy else None
    figures["no_words_exact"] = _mean(exact[len(wordy) :]) if blank else None
    return figures


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4)


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
        from posttrain.nano.build import build, evaluate

        pipe = evaluate.load(args.k2, args.device)
        drawn = torch.from_numpy(np.stack(list(map(scenes.render, heldout(args.scenes))))).to(args.device)
        # Judges see what K2-nano draws, so its autoencoder must not cost them answers.
        figures["autoencoded"] = on_scenes(vlm, args.scenes, list(build.autoencoded(pipe.vae, drawn)))
        records = prompts.read("heldout")[: args.scenes]
        images = evaluate.generate(pipe, [r["prompt"] for r in records], [*range(len(records))], 28, 0.0, 50)
        figures["generated"] = on_generated(vlm, list(images), records)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
