"""A reward study: scores every image of a folder by several rewards, and shows how far they agree.

    posttrain sample --config recipes/nano/demo.yaml --prompts prompts/nano/heldout.jsonl --output out/images
    python examples/score_folder.py out/images

Prompts come from the folder's prompts.json, as `posttrain sample` writes it; without one they are empty. Writes
scores.json beside the images: by image, each reward's score, or null where it has none.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from posttrain import load_rewards, read_image, score
from posttrain.nano.world import oracles


def brightness(images, prompts):
    """Mean brightness in [0, 1]."""
    return [np.asarray(image.convert("L")).mean() / 255 for image in images]


def detail(images, prompts):
    """Mean absolute difference of pixels one above the other, in [0, 1]."""
    gray = [np.asarray(image.convert("L"), dtype=float) / 255 for image in images]
    return np.array([np.abs(np.diff(pixels, axis=0)).mean() for pixels in gray])


parser = argparse.ArgumentParser(description="Scores the images of a folder.")
parser.add_argument("folder", type=Path)
folder = parser.parse_args().folder

files = sorted(file for file in folder.iterdir() if file.suffix in (".png", ".jpg", ".webp"))
images = [read_image(file) for file in files]
table = folder / "prompts.json"
prompts = [row["prompt"] for row in json.loads(table.read_text())] if table.exists() else [""] * len(files)
scores = score(load_rewards([brightness, detail, oracles.artifact_free]), images, prompts)

values_NK = np.where(scores.valid_NK, scores.values_NK, np.nan)  # missing is not zero
rows = [dict(zip(scores.names, row)) for row in values_NK.tolist()]
known = [{name: None if np.isnan(value) else value for name, value in row.items()} for row in rows]
(folder / "scores.json").write_text(json.dumps(dict(zip([file.name for file in files], known)), indent=1) + "\n")

print(f"{'reward':<16}{'mean':>8}{'std':>8}   correlation with {', '.join(scores.names)}")
complete = values_NK[scores.valid_NK.all(1)]
for k, name in enumerate(scores.names):
    # A reward that is the same for all images has no correlation.
    related = [
        np.corrcoef(complete[:, k], other)[0, 1] if complete[:, k].std() * other.std() > 0 else np.nan
        for other in complete.T
    ]
    told = "  ".join(f"{value:5.2f}" for value in related)
    print(f"{name:<16}{np.nanmean(values_NK[:, k]):>8.3f}{np.nanstd(values_NK[:, k]):>8.3f}   {told}")
