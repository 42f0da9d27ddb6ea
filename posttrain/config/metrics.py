"""What each metric means: one definition, which reports, limits and docs/metrics.md take from here.

    python -m posttrain.config.metrics      # prints docs/metrics.md

A metric of an evaluation is logged as `eval/NAME`; a recipe and summary.json call it NAME. A suffix tells how the
images were drawn: `@2.5` with this guidance, `@8steps` in this number of steps, `@turbo` on a Turbo. `pairs/NAME` is
the training metric NAME on held-out pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

EVAL = "eval/"
Sign = Literal["divergence", "hacking"]


@dataclass(frozen=True)
class Metric:
    pattern: str
    """The name; * stands for a name of the recipe or for a part of a longer list."""
    definition: str
    unit: str = ""
    """Unit or range."""
    better: Literal["", "higher", "lower"] = ""
    """Empty: neither, or it depends on what is trained."""
    sign_of: Sign | None = None
    """Drifts while a run diverges, or while a reward is being hacked: reports show it beside the limits."""
    reference: tuple[str, float] | None = None
    """A value to compare it with, and whose value that is."""


METRICS = (
    # Training, in the order of a report's curves.
    Metric("reward", "Weighted mean of the rewards trained on, over the images of a step", "", "higher"),
    Metric("reward/*", "Mean score of the reward of this name over the images of a step", "", "higher"),
    Metric("loss", "The loss that the step minimised", "", "lower"),
    Metric("ratio", "Mean probability ratio of the policy to the one that sampled", "> 0, 1 before the update"),
    Metric("ratio_error", "Largest distance of a ratio from 1 before the first update of a step", ">= 0", "lower"),
    Metric("log_ratio_std", "Standard deviation of the log probability ratios", ">= 0", "", "divergence"),
    Metric("kl", "Mean squared distance of the policy's velocity from the reference's", ">= 0", "", "divergence"),
    Metric("clip_low", "Share of ratios below the lower clip with a negative advantage", "[0, 1]"),
    Metric("clip_high", "Share of ratios above the upper clip with a positive advantage", "[0, 1]"),
    Metric("clip_ratio/*", "Share of tokens whose ratio TRL clipped, by side", "[0, 1]"),
    Metric("truncated", "Share of ratios above loss.max_weight, which weigh no more than that", "[0, 1]"),
    Metric("rollout_gap", "Relative distance of the velocities of fp8 rollouts from the policy's own", ">= 0", "lower"),
    Metric("policy_age", "Updates of the policy since it drew the images of this step", "updates"),
    Metric("advantage", "Mean absolute advantage of the images of a step", ">= 0"),
    Metric("*grad_norm", "Norm of the gradient before clipping: of the policy, the fake score or the student", ">= 0"),
    Metric("*clipped_updates", "Updates so far whose gradient was scaled down", "updates"),
    Metric(
        "skipped_updates", "Updates so far left out because a gradient was not finite", "updates", "lower", "divergence"
    ),
    Metric("skipped", "Updates so far left out because a gradient was not finite", "updates", "lower", "divergence"),
    Metric("*sqrt_v", "Median root of AdamW's second moment, the usual size of a gradient's entry", ">= 0"),
    Metric("*eps_share", "Share of the learning rate that AdamW's eps takes from the median weight", "[0, 1]", "lower"),
    Metric("*spiked_updates", "Updates so far that Muon left out, as the norm was above 5 times the usual", "updates"),
    Metric("*grad_norm_ratio", "Norm of the gradient over the median of those before", "> 0, about 1"),
    Metric("*update_rms", "Root mean square of Muon's update in units of the rate", "about 0.17"),
    Metric("*muon_seconds", "Time of Muon's part of the update, exchanges between processes included", "s", "lower"),
    Metric("images", "Images that the run has sampled so far", "images"),
    Metric("learning_rate", "Learning rate of the update", ">= 0"),
    Metric("non_finite", "Metric values of this row that were NaN or infinite", "values", "lower"),
    Metric("drift_*", "Mean squared distance of the policy's velocity from the reference's", ">= 0", "", "divergence"),
    # Rewards and judges.
    Metric("skipped_steps", "Steps so far without an update, as no image could be scored", "steps", "lower"),
    Metric("missing", "Share of images that no reward could score", "[0, 1]", "lower"),
    Metric("failed", "Share of scores that failed although the reward applies", "[0, 1]", "lower"),
    Metric(
        "flat_groups",
        "Share of the groups drawn whose images all rewards score alike, so that nothing is learned",
        "[0, 1]",
        "lower",
    ),
    Metric("refilled_groups", "Groups drawn in addition in this step, in place of flat ones (groups.refill)", "groups"),
    Metric("flat/*", "Share of groups that the reward of this name scores alike", "[0, 1]", "lower"),
    Metric(
        "noise_share",
        "Share of the advantages' variance that the judges' noise explains",
        "[0, 1]",
        "lower",
        "divergence",
    ),
    Metric("score_hidden", "Share of the scoring time that sampling and training hid", "[0, 1]", "higher"),
    Metric("score_wait", "Time that the step waited for scores", "s", "lower"),
    Metric(
        "repeatability/*",
        "How far a judge's answers to the same question differ, in P(yes)",
        "[0, 1]",
        "lower",
        "divergence",
    ),
    Metric("noise/*", "Repeatability of the judge that the reward of this name asks, in P(yes)", "[0, 1]", "lower"),
    Metric(
        "injection/image/*",
        "How much text in an image that asks for a good score raises this reward",
        "P(yes)",
        "lower",
    ),
    Metric(
        "injection/prompt/*",
        "How much text in a prompt that asks for a good score raises this reward",
        "P(yes)",
        "lower",
    ),
    Metric("pool/*", "Prompts of the adaptive pool in this class", "prompts"),
    Metric("seconds/*", "Time of this part of the step", "s", "lower"),
    # Preference optimisation.
    Metric(
        "winner",
        "Change of the chosen image's velocity error, relative to the reference's error",
        "",
        "lower",
        None,
        ("the reference", 0.0),
    ),
    Metric("loser", "Change of the rejected image's velocity error, relative to the reference's error"),
    Metric("margin", "Change of the rejected image's velocity error less that of the chosen one's", "", "higher"),
    Metric("accuracy", "Share of pairs or records that the model decides as the annotators did", "[0, 1]", "higher"),
    Metric("z", "Logit of the preference: beta / 2 times the bounded margin"),
    Metric("z10", "10th percentile of the preference logit z"),
    Metric("z50", "Median of the preference logit z"),
    Metric("z90", "90th percentile of the preference logit z"),
    Metric("sigma", "Mean of s(-z), the weight of a pair in the gradient", "[0, 1]"),
    Metric("saturated", "Share of pairs with s(-z) below 0.05, which teach nothing more", "[0, 1]"),
    Metric("guard", "Share of the rejected image's gradient that the guard keeps", "[0, 1]"),
    Metric("guarded", "Share of pairs, or of updates with the exact guard, that the guard scaled down", "[0, 1]"),
    Metric("conflict", "1 if the gradients of both images oppose each other in this update", "0 or 1"),
    Metric("cosine", "Cosine of the velocity errors of the chosen and the rejected image", "[-1, 1]"),
    Metric("gradient/*", "Share of this term in the sum of the terms' gradient norms", "[0, 1]"),
    # Supervised finetuning.
    Metric("cropped", "Share of the step's images that the crop to their bucket cut something off", "[0, 1]"),
    Metric("cropped_area", "Mean share of an image's area that the crop cut off", "[0, 1]"),
    Metric("dropped", "Share of the step's images that were trained with the empty caption", "[0, 1]"),
    Metric("image_tokens", "Image tokens of the step's bucket", "tokens"),
    Metric("references", "Mean number of references that an image of the step was shown", "images"),
    Metric("reference_size", "Side of the step's references", "pixels"),
    # Negative-aware finetuning.
    Metric("clipped_advantages", "Share of images whose advantage is the largest or the least possible", "[0, 1]"),
    Metric(
        "velocity_error_t[1-4]",
        "Mean squared error of the policy's velocity at noised images, over one of four equal parts of the noise"
        " levels, lowest first",
        ">= 0",
    ),
    Metric(
        "old_error",
        "Relative distance of the old policy's velocity from the policy's at the first step, where both are the same",
        ">= 0",
        "lower",
    ),
    Metric(
        "old_distance", "Mean squared distance of the policy's velocity from the old policy's", ">= 0", "", "divergence"
    ),
    Metric(
        "toward_better",
        "Mean product of the old policy's velocity error and the policy's distance from it, of images with a positive"
        " advantage, others counting 0; below 0 the error of these images falls",
        "",
        "lower",
    ),
    Metric(
        "toward_worse",
        "The same of images with a negative advantage; above 0 the error of these images rises",
        "",
        "higher",
    ),
    Metric("latent_norm", "Root mean square of the latents that the step drew", ">= 0, about 1", "", "hacking"),
    # Distillation of teachers.
    Metric(
        "distance/*",
        "Mean squared distance of the student's velocity from this teacher's guided one, at the student's own states",
        ">= 0",
        "lower",
    ),
    Metric("relative/*", "The same over its value in the first step", ">= 0", "lower", None, ("the start", 1.0)),
    Metric(
        "distance_t[1-4]",
        "Mean squared distance of the student's velocity from its teachers', over one of four equal parts of the noise"
        " levels, lowest first",
        ">= 0",
        "lower",
    ),
    Metric("cosine/*", "Cosine of the gradients of these two teachers; below 0 they pull apart", "[-1, 1]", "higher"),
    # Distillation.
    Metric("fake_updates", "Updates of the fake score in this step", "updates"),
    Metric("fake_loss", "Flow-matching loss of the fake score on the student's images", ">= 0", "lower"),
    Metric(
        "generator_loss",
        "Loss of the student: its distance along the difference of teacher and fake score",
        ">= 0",
        "lower",
    ),
    Metric(
        "direction", "Mean absolute difference of the clean images that teacher and fake score predict", ">= 0", "lower"
    ),
    Metric("scale", "Mean absolute distance of the student's image from the teacher's prediction", ">= 0"),
    Metric("omega", "Importance weight of the fake score's noise", "> 0, about 1"),
    Metric("omega_clipped", "Share of importance weights beyond the clip", "[0, 1]", "lower"),
    # Language models: the expander and the judge.
    Metric("mean_token_accuracy", "Share of tokens that the expander predicts right", "[0, 1]", "higher"),
    Metric("entropy", "Entropy of the next token", "nats"),
    Metric("pair_loss", "Bradley-Terry loss of the judge's scores", ">= 0", "lower"),
    Metric("mass", "P(yes) + P(no): how surely the judge answers with one of both", "[0, 1]", "higher"),
    Metric("reward_std", "Standard deviation of the weighted rewards, over a batch", ">= 0"),
    Metric("frac_reward_zero_std", "Share of groups whose weighted rewards are all equal", "[0, 1]", "lower"),
    Metric("rewards/*/mean", "Mean of the reward of this name over a batch", "", "higher"),
    Metric("rewards/*/std", "Mean standard deviation of this reward over a batch", ">= 0"),
    Metric("num_tokens", "Tokens that were trained on so far", "tokens"),
    Metric(
        "completions/clipped_ratio", "Share of expansions that reach the length limit without an end", "[0, 1]", "lower"
    ),
    Metric(
        "completions/*", "Length of expansions: mean, smallest or largest, of all or of those with an end", "tokens"
    ),
    Metric("diversity_weight", "Weight of the diversity reward at this step"),
    Metric("loss_thought", "Mean loss of a token of the thoughts of held-out answers", ">= 0", "lower"),
    Metric("loss_caption", "Mean loss of a token of the captions after a thought", ">= 0", "lower"),
    Metric("thought/tokens", "Mean number of tokens of a thought before a caption", "tokens", "", "divergence"),
    Metric("thought/empty", "Share of answers without a thought", "[0, 1]", "lower", "divergence"),
    Metric("mined/*", "Candidates so far with this verdict of expander mine", "prompts"),
    Metric("format", "Share of expansions without a fault of form", "[0, 1]", "higher", "hacking"),
    Metric("format/*", "Share of expansions with this fault of form", "[0, 1]", "lower", "hacking"),
    Metric("safe", "Share of expansions that the safety check accepts", "[0, 1]", "higher", "hacking"),
    Metric("missing_images", "Share of acceptable expansions whose image could not be drawn", "[0, 1]", "lower"),
    Metric("cut", "Share of expansions longer than the renderer reads", "[0, 1]", "lower"),
    Metric("cut_tokens", "Mean number of tokens cut off from those", "tokens", "lower"),
    Metric("renders", "Images drawn in this step; equal expansions are drawn once", "images"),
    Metric("text/length", "Mean length of an expansion", "tokens"),
    Metric("text/distinct1", "Share of different words among those of a group's expansions", "(0, 1]", "higher"),
    Metric(
        "text/distinct2", "Share of different pairs of words among those of a group's expansions", "(0, 1]", "higher"
    ),
    Metric(
        "text/spread",
        "Mean distance of two expansions of a prompt, 1 - cosine of the base model's hidden states",
        "[0, 2]",
        "higher",
    ),
    Metric(
        "text/verbatim", "Share of expansions that repeat all quoted text of their prompt exactly", "[0, 1]", "higher"
    ),
    Metric("health/*", "Health of the GPUs, of the worst one; posttrain/training/gpu_health.py has the units"),
    # Making pairs.
    Metric("block", "Number of the block of candidates", ""),
    Metric("source", "Number of the source of the block", ""),
    Metric("fate/*", "Candidates of the block with this outcome", "candidates"),
)
"""What training logs. The first pattern that matches counts."""

EVALUATION = (
    Metric("image/brightness", "Mean luma of the images", "[0, 1]", "", "hacking"),
    Metric("image/saturation", "Mean difference of a pixel's largest and smallest channel", "[0, 1]", "", "hacking"),
    Metric(
        "image/high_frequency",
        "Share of the luma's energy above half the finest frequency",
        "[0, 1], noise has 0.8",
        "",
        "hacking",
    ),
    Metric("image/latent_norm", "Root mean square of the final latents", ">= 0, about 1", "", "hacking"),
    Metric("image/diversity", "Mean distance of two images of one prompt", "[0, 1]", "higher", "hacking"),
    Metric("image/contrast", "Mean standard deviation of the images' luma", "[0, 0.5]", "", "hacking"),
    Metric("image/high_energy", "Energy of the luma above half the finest frequency", "[0, 1]", "", "hacking"),
    Metric(
        "image/high_energy_ratio",
        "The same as a ratio to the first evaluation",
        ">= 0",
        "",
        "hacking",
        ("the start", 1.0),
    ),
    Metric(
        "to_teacher/*",
        "Ratio of this metric to that of the teacher's images",
        ">= 0",
        "",
        "hacking",
        ("the teacher", 1.0),
    ),
    Metric(
        "diversity",
        "Mean distance of the images of a prompt's expansions from each other",
        "[0, 1]",
        "higher",
        "hacking",
    ),
    Metric("average_checkpoints", "Checkpoints that the evaluated policy is the mean of", "checkpoints"),
    Metric(
        "average_error",
        "What the rank leaves out of the mean of adapters, relative to its size",
        "[0, 1]",
        "lower",
    ),
    Metric(
        "heldout/loss",
        "Mean squared error of the velocity on images that are not trained on, at fixed times and noise",
        ">= 0",
        "lower",
    ),
    Metric("heldout/gain", "By what share that error is below the base's", "<= 1", "higher", None, ("the base", 0.0)),
    Metric(
        "heldout/drift",
        "Mean squared distance of the policy's velocity from the base's there",
        ">= 0",
        "",
        "divergence",
    ),
    Metric("heldout/loss_t[1-4]", "That error in one of four parts of the noise levels, lowest first", ">= 0", "lower"),
    Metric("heldout/*_t[1-4]", "The same over one of four equal parts of the noise levels, lowest first"),
    Metric(
        "retention/*",
        "Share of this teacher's gain that the student keeps on the teacher's prompts, or an end of its 95 % interval",
        "1: all of it",
        "higher",
        None,
        ("the teacher", 1.0),
    ),
    Metric("anchor/*", "Mean score of this reward on held-out prompts of no teacher", "", "higher", "hacking"),
    Metric("pairs/*_t[1-4]", "The same over one of four equal parts of the noise levels, lowest first"),
)
"""What evaluations log besides: `eval/NAME`, and `teacher/NAME` for the teacher of a distillation."""

SCORE = Metric("*", "Mean score of the reward of this name on held-out prompts", "", "higher")
"""Any other metric of an evaluation is a reward of the recipe."""


def find(name: str) -> Metric | None:
    """The definition of a logged metric; None if there is none."""
    if not name.startswith((EVAL, "teacher/")):
        return _first(METRICS, name)
    # Without the suffix, which says how the images were drawn.
    figure = name.partition("/")[2].partition("@")[0]
    found = _first(EVALUATION, figure) or _first(METRICS, figure.removeprefix("pairs/"))
    # Rewards have names of the user's choice, but none of them is in a group.
    return found or (None if figure.startswith(("pairs/", "heldout/")) else SCORE)


def _first(metrics: Iterable[Metric], name: str) -> Metric | None:
    # The tables go from the particular to the general, such as heldout/loss_t1 before heldout/*_t1.
    return next((metric for metric in metrics if fnmatchcase(name, metric.pattern)), None)


def describe(name: str) -> str:
    """The definition with its unit and direction on one line; empty if there is none."""
    metric = find(name)
    if metric is None:
        return ""
    better = f"{metric.better} is better" if metric.better else ""
    notes = "; ".join(filter(None, [metric.unit, better]))
    return f"{metric.definition} ({notes})" if notes else metric.definition


def rank(name: str) -> int:
    """The place of a metric in the tables, by which reports order their charts."""
    metric = find(name)
    order = (*METRICS, *EVALUATION, SCORE)
    return order.index(metric) if metric else len(order)


def by_section(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Metrics by what stands before their last slash, those of training first, each in the order of the tables."""
    sections: dict[str, list[str]] = {}
    for name in names:
        sections.setdefault(name.rpartition("/")[0], []).append(name)
    # sorted keeps the order of the others.
    ordered = sorted(sections.items(), key=lambda section: section[0] != "")
    return [(title or "training", sorted(members, key=rank)) for title, members in ordered]


def definitions(names: Iterable[str]) -> list[Metric]:
    """Those of some metrics, each once, in the order of the tables."""
    # Many names share a definition, such as those of all rewards.
    found = {find(name) for name in names}
    return [metric for metric in (*METRICS, *EVALUATION, SCORE) if metric in found]


def page() -> str:
    """docs/metrics.md."""
    parts = [
        "# Metrics",
        "Made by `python -m posttrain.config.metrics`. Each run logs its metrics in `metrics.jsonl` and TensorBoard;\n"
        "its report shows these definitions.",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip(),
        "## Training",
        _table(METRICS),
        "## Evaluation",
        _table((*EVALUATION, SCORE)),
    ]
    return "\n\n".join(parts) + "\n"


def _table(metrics: Iterable[Metric]) -> str:
    lines = ["| metric | definition | unit or range | better |", "|---|---|---|---|"]
    lines += [f"| `{metric.pattern}` | {metric.definition} | {metric.unit} | {metric.better} |" for metric in metrics]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
