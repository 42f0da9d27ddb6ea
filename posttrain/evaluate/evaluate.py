"""Evaluation of models, adapters, exports, endpoints and folders of images on the same prompts and noise.

    posttrain evaluate base stpo=runs/stpo turbo=out/turbo --prompts prompts/k2/heldout.jsonl --config judges.yaml \\
        --output runs/evaluation

Images first, one model after the other; then the judges, which all see the same files; then table.md, evaluation.json
and report.html: each figure with its standard error over prompts, each subject against the first by paired tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.config import metric_names
from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.evaluate import page
from posttrain.evaluate.config import EvaluateConfig
from posttrain.evaluate.scoring import LOOKS, Scored, figures
from posttrain.evaluate.subjects import Images, Subject, read_subjects
from posttrain.evaluate.suites import Suite
from posttrain.evaluate.suites import read as read_suite
from posttrain.report.statistics import mean_and_error, paired
from posttrain.report.verdict import verdict
from posttrain.runs.files import replace_text
from posttrain.training.loop import try_rewards
from prompts.records import read_prompts
from rewards.base import RewardSpec
from rewards.load import check_rewards, load_rewards
from rewards.serve import serve

RESULTS = "evaluation.json"


def evaluate(config: EvaluateConfig) -> int:
    """The command. 1 if a subject falls below `least_change`, else 0."""
    procs, output = Processes(), Path(config.output)
    begun = (output / "images").is_dir() or (output / "scores").is_dir()
    if output.exists() and not begun and any(output.iterdir()):
        raise UserError(f"output: {output} is there and holds no evaluation; choose another name")
    suite = read_suite(config.suite.kind, config.suite.path) if config.suite else None
    records = suite.records if suite else read_prompts(config.prompts or "")
    records = list(records[: config.first])
    specs = _rewards(config, suite)
    # All that can be refused is refused here, before a model of many GB is read.
    check_rewards(specs, [server.name for server in config.servers])
    subjects = read_subjects(config)
    try_rewards(changed(config, rewards=specs), records)
    drawn = []
    for subject in subjects:
        images = Images(subject, config, records, procs)
        images.draw()
        drawn.append(images)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next model, or a judge of this process, takes its place
    # The judges start only now: while images were drawn, the model had the GPUs for itself.
    with serve(config.servers if procs.main else [], output / "servers") as urls:
        rewards = load_rewards(specs, procs.from_main(urls))
        scored = [Scored(images, rewards, config) for images in drawn]
        for one in scored:
            one.score(records, procs)
    results = summary(config, scored, [spec.name for spec in specs], suite)
    if procs.main:
        replace_text(output / RESULTS, json.dumps(results, indent=1) + "\n")
        text = page.table(results)
        replace_text(output / "table.md", text)
        page.write(output / "report.html", config, scored, results)
        print(text, end="")
        print(f"{output / 'report.html'}")
    return int(bool(results["failed"]))


def _rewards(config: EvaluateConfig, suite: Suite | None) -> list[RewardSpec]:
    """Those of the recipe, and the suite's own with its judge."""
    specs = list(config.rewards)
    if suite is None or config.suite is None or config.suite.judge is None:
        if not specs:
            raise UserError("rewards: there is none, and the suite has no judge; name one of them")
        return specs
    function = dict(suite.reward)
    function["init_args"] = {**function["init_args"], "judge": config.suite.judge}
    return [*specs, RewardSpec(suite.kind, function)]


def summary(
    config: EvaluateConfig, scored: Sequence[Scored], names: Sequence[str], suite: Suite | None
) -> dict[str, Any]:
    """What evaluation.json holds."""
    by_subject: dict[str, dict[str, np.ndarray]] = {}
    results: dict[str, Any] = {"prompts": len(scored[0].images.records), "images": config.images, "subjects": {}}
    for one in scored:
        subject, own = one.images.subject, figures(one, one.rewards)
        by_subject[subject.name] = own
        told: dict[str, Any] = {"place": subject.place, "kind": subject.kind, **one.images.facts, "figures": {}}
        failed = one.missing()
        # A prompt without a score lowers the number of prompts, never the mean.
        for name, values in own.items():
            mean, error = mean_and_error(values)
            known = int((~np.isnan(values)).sum())
            told["figures"][name] = {"mean": mean, "error": error, "prompts": known, "failed": failed.get(name, 0)}
        # Without a judge of its own the suite has no reward, and so no answers to aggregate.
        if suite is not None and suite.kind in one.rows:
            told["suite"] = suite.aggregate(_suite_rows(one, suite.kind))
        results["subjects"][subject.name] = told
    if suite is not None:
        results["suite"] = {"kind": suite.kind, "about": suite.about}
    # Only prompts that both subjects have a score of are compared: they had the same noise.
    results["paired"], results["verdicts"], results["failed"] = {}, {}, []
    firsts = against([one.images.subject for one in scored])
    for name, first in firsts.items():
        differences: dict[str, dict[str, Any] | None] = {}
        for figure, values in by_subject[name].items():
            found = paired(values, by_subject[first][figure], config.seed)
            differences[figure] = None if found is None else asdict(found)
            least = config.least_change.get(figure)
            # No score to compare fails too: a judge that did not answer must not let a worse model pass.
            if least is not None and (found is None or found.difference < least):
                change = "has no score to compare" if found is None else f"{found.difference:+.4f}"
                results["failed"].append(f"{name}: {figure} {change}, and least_change is {least:+g}")
        results["paired"][name] = {"against": first, "figures": differences}
        results["verdicts"][name] = _verdict(by_subject[first], by_subject[name], names)
    return results


def against(subjects: Sequence[Subject]) -> dict[str, str]:
    """By subject, but the first: what it is compared with, the first one, drawn with the same guidance if it was."""
    first = subjects[0]
    by_guidance: dict[float | None, Subject] = {}
    for subject in subjects:
        if subject.place == first.place:
            by_guidance.setdefault(subject.guidance, subject)
    found = {}
    for subject in subjects[1:]:
        # Other guidances of the first model itself are compared with its first one, to show what guidance changes.
        same_model = subject.place == first.place
        reference = first if same_model else by_guidance.get(subject.guidance, first)
        found[subject.name] = reference.name
    return found


def _verdict(before: dict[str, np.ndarray], after: dict[str, np.ndarray], names: Sequence[str]) -> str:
    measured = list(names)
    if metric_names.DIVERSITY in after:
        measured.append(metric_names.DIVERSITY)
    scores = {name: (before[name].tolist(), after[name].tolist()) for name in measured}
    looks = {}
    for name in LOOKS:
        # A look is not good or bad by itself, so its mean is enough: there is no test of it.
        looks[name] = float(np.nanmean(before[name])), float(np.nanmean(after[name]))
    return verdict(scores, looks).text


def _suite_rows(one: Scored, kind: str) -> list[dict[str, Any]]:
    """Of each image that has a score: its prompt's number, its score and details."""
    rows = []
    for key, row in one.rows[kind].items():
        if row is not None and row.get("score") is not None:
            prompt, _ = key.split("-")
            rows.append({**row, "prompt": int(prompt)})
    return rows
