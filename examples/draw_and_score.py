"""Draws images with K2-nano and scores them: `python examples/draw_and_score.py`. Seconds on a CPU."""

import numpy as np

from posttrain import draw, load_model, load_rewards, score
from posttrain.nano.world import oracles


def brightness(images, prompts):
    """Mean brightness in [0, 1]: any callable that returns one number for each image is a reward."""
    return np.array([np.asarray(image.convert("L")).mean() / 255 for image in images])


prompts = ["a red circle and a blue star", "two green squares on a dark background"]
rewards = load_rewards([brightness, oracles.artifact_free])
k2 = load_model()  # K2-nano; the released model: load_model("krea/Krea-2-Raw", dtype=torch.bfloat16)
for guidance in (0.0, 1.5):
    images = draw(k2, prompts, size=(64, 64), steps=12, guidance=guidance, seed=0)
    scores = score(rewards, images, prompts)
    for prompt, row in zip(prompts, scores.values_NK):
        print(f"guidance {guidance}: {prompt}: " + ", ".join(f"{n} {v:.2f}" for n, v in zip(scores.names, row)))
