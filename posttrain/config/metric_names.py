"""Names of the metrics of evaluations, as recipes and reports give them. training/image_metrics.py computes them."""

from __future__ import annotations

from collections.abc import Sequence

LOOK = ("image/brightness", "image/saturation", "image/high_frequency", "image/latent_norm")
DIVERSITY = "image/diversity"
CHANGES = ("image/contrast", "image/high_energy", "image/high_energy_ratio")
"""What preference optimisation reports besides."""
PAIRS = (
    "pairs/winner", "pairs/loser", "pairs/margin", "pairs/accuracy", "pairs/z", "pairs/z10", "pairs/z50", "pairs/z90",
    "pairs/sigma", "pairs/saturated", "pairs/guard", "pairs/guarded", "pairs/cosine", "pairs/drift_winner",
    "pairs/drift_loser", "pairs/loss",
)  # fmt: skip
"""What it measures of held-out pairs; stpo/train.py defines them."""
HELDOUT = (
    "heldout/loss", "heldout/gain", "heldout/drift",
    "heldout/loss_t1", "heldout/loss_t2", "heldout/loss_t3", "heldout/loss_t4",
)  # fmt: skip
"""What finetuning measures of held-out images; sft/heldout.py defines them."""
TURBO = "@turbo"
"""What is put behind a metric's name where finetuning drew its images on Turbo."""
TO_TEACHER = {
    "saturation": "image/saturation", "contrast": "image/contrast", "high_energy": "image/high_energy",
    "diversity": DIVERSITY,
}  # fmt: skip
"""What distillation compares with the teacher's images, as `to_teacher/...`: the ratio of these metrics."""
FAKE_LOSS = "fake_loss"


def names(rewards: Sequence[str], guidance: Sequence[float], groups: int) -> list[str]:
    """All metrics of an evaluation, as it will name them."""
    of_one = [*rewards, *LOOK, *([DIVERSITY] if groups else [])]
    found: list[str] = []
    for scale in guidance:
        found += [name + suffix(scale) for name in of_one]
    return found


def distilled_names(rewards: Sequence[str], steps: Sequence[int], groups: int) -> list[str]:
    """All metrics of an evaluation of a student, which is drawn in each of these numbers of steps."""
    # Without groups there is no diversity, of the student's images or of the teacher's.
    compared = [f"to_teacher/{name}" for name in TO_TEACHER if groups or name != "diversity"]
    of_one = [*names(rewards, [0.0], groups), "image/contrast", "image/high_energy", *compared]
    found: list[str] = []
    for count in steps:
        found += [name + steps_suffix(count, steps) for name in of_one]
    return [*found, FAKE_LOSS]


def steps_suffix(count: int, steps: Sequence[int]) -> str:
    """What is put behind a metric's name where the student took other than the first of its numbers of steps."""
    return "" if count == steps[0] else f"@{count}steps"


def suffix(guidance: float) -> str:
    """What is put behind a metric's name where the images were drawn with guidance."""
    return f"@{guidance:g}" if guidance else ""
