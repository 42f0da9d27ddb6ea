"""Simulated human choices: pairs of a policy's images, of which a hidden taste prefers one.

    python -m posttrain.nano.world.choices runs/nano-stpo-synthetic --output runs/nano-choices --pairs 500

It replaces `posttrain annotate` where there are no annotators. The taste is that of judge_data.py, which no judge was
trained on. The better image is chosen with probability sigma(SHARPNESS * difference), one vote a pair. Prompts take
turns.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from posttrain.export.export import load_checkpoint
from posttrain.model import sampler
from posttrain.model.k2 import to_pil
from posttrain.nano.world import judge_data, oracles
from posttrain.preferences.dataset import Preference
from posttrain.preferences.writer import PreferenceWriter
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY
from posttrain.training.prompt_source import in_turn
from prompts.records import read_prompts

TRAIN = "prompts/nano/train.jsonl"
BATCH = 128


def tasteful(images: Sequence, prompts: Sequence[str], **_) -> list[float | None]:
    """The hidden taste as a reward, about -4 to 5; None where no object can be made out."""
    scores: list[float | None] = []
    for percept in oracles.perceive(images):
        scores.append(judge_data.taste(percept.scene) if percept.scene.objects else None)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("policy", help="run directory or checkpoint that draws")
    parser.add_argument("--output", required=True, help="directory of the preference set")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    k2 = load_checkpoint(checkpoint.load(checkpoint.find(args.policy)), "cuda" if torch.cuda.is_available() else "cpu")
    records = read_prompts(TRAIN)
    shape = (k2.image_tokens(64, 64), k2.latent_channels)
    rng = np.random.default_rng(args.seed)
    made = 0
    with PreferenceWriter(args.output, card={"policy": args.policy, "chosen by": "a hidden taste"}) as writer:
        # Up to three times as many as are wanted: a pair with an image that shows nothing is left out.
        for first in range(0, 3 * args.pairs, min(BATCH, args.pairs)):
            rows = range(first, first + min(BATCH, args.pairs))
            prompts = [records[in_turn(args.seed, row, len(records))].prompt for row in rows]
            seeds = [sampler.seed_for(args.seed, row, i) for row, i in itertools.product(rows, range(2))]
            with torch.no_grad(), k2.role(POLICY):
                text = k2.text(prompts, 64).repeat(2)  # each prompt twice in a row, as the seeds are
                latents = k2.sample(text, sampler.noise(seeds, shape), args.steps, 64, 64)
            images = to_pil(k2.decode(latents, 64, 64))
            tastes = tasteful(images, [])
            for i, prompt in enumerate(prompts):
                left, right = tastes[2 * i], tastes[2 * i + 1]
                if left is None or right is None or made == args.pairs:
                    continue
                better = rng.random() < 1 / (1 + math.exp(judge_data.SHARPNESS * (right - left)))
                # The better one first.
                shown = images[2 * i : 2 * i + 2][:: 1 if better else -1]
                policy = {"chosen_policy": args.policy, "rejected_policy": args.policy}
                on = {"chosen_on_policy": True, "rejected_on_policy": True}
                writer.add(Preference(prompt, *shown, source="human", **policy, **on))
                made += 1
            if made == args.pairs:
                return
    raise SystemExit(f"{args.policy}: only {made} of {args.pairs} pairs show something to choose by")


if __name__ == "__main__":
    main()
