"""Finds prompts that are hard but not hopeless: `posttrain expander mine`.

    posttrain expander mine --config recipes/nano/expander_mine.yaml

Each candidate is expanded `group_size` times by the current expander, each expansion is drawn and scored as in
`expander gdpo`, gates included, and its composite is the weighted mean of its rewards. Prompts are kept whose
composites have a middling mean and a real spread (quotas.py). With `rounds` they are scored again, since of many
candidates some look so by chance. Failure classes share the kept prompts by the square root
of their size, and none gets less than `floor`; of each class the prompts nearest to a mean of 0.5 are taken. Traffic is
mixed in as it comes.

The directory has train.jsonl and heldout.jsonl for `prompts` of expander gdpo, in which each row has its class as a
tag; pool.yaml, a recipe to give after expander gdpo's own, with the pool's quotas; mined.json, with all counts; and
scores.jsonl, a line for each candidate and round, from which --resume goes on.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from posttrain.config.sections import LoraConfig
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.expander.mining.config import CandidatesConfig, ExpanderMineConfig
from posttrain.expander.mining.quotas import VERDICTS, Verdict, composites, moments, pooled, shares, slots, verdict
from posttrain.expander.policy import Policy
from posttrain.expander.renderer import make_renderer
from posttrain.expander.score import Scored, Scorer
from posttrain.log import log
from posttrain.model import sampler
from posttrain.preferences.heldout import in_share
from posttrain.runs.files import append_line, replace_text
from posttrain.runs.guard import check_unchanged
from posttrain.runs.run import Run
from posttrain.training.loop import open_run, resuming, try_rewards
from prompts.parse import json_line, whole_lines
from prompts.records import PromptRecord, as_row, read_prompts
from rewards.base import RewardError
from rewards.diversity import Features

SCORES, CARD = "scores.jsonl", "mined.json"
TRAFFIC, MINED = "traffic", "mined/"
"""Tags: of traffic, and before the name of a failure class."""
MAY_CHANGE = (
    "output", "candidates", "traffic", "traffic_share", "count", "batch", "rounds", "low", "high", "spread", "safe",
    "floor", "servers", "track",
)  # fmt: skip
"""Settings that may change on resume, as no score depends on them."""


def mine(config: ExpanderMineConfig, resume: bool = False) -> None:
    """Writes `config.output`. Raises UserError for mistakes that the user can correct, and if nothing is kept."""
    procs = Processes()
    resume = resuming(config, resume, procs)
    if resume and (Path(config.output) / SCORES).exists():
        check_unchanged(config, "; restore it", free=MAY_CHANGE)
    candidates, heldout, traffic = read_candidates(config)
    records = [record for record, _ in candidates]
    try_rewards(config, records, records, ["expansion"])
    # A model without an adapter is scored as it is: a new adapter changes nothing.
    policy = Policy(config.model, LoraConfig(), config.seed, procs.device)
    renderer = make_renderer(config.renderer, procs.device)
    features = Features(config.diversity.path, config.diversity.batch, str(procs.device))
    with open_run(config, resume, procs) as run:
        scorer = Scorer(config, renderer, features, policy.template, run.urls)
        rows = _score(config, run, procs, policy, scorer, candidates)
        if procs.main:
            run.summary(write(config, Path(config.output), candidates, rows, heldout, traffic))


# ---- candidates -------------------------------------------------------------------------------------------

Candidate = tuple[PromptRecord, str]
"""A prompt and its failure class."""


def read_candidates(config: ExpanderMineConfig) -> tuple[list[Candidate], list[Candidate], list[PromptRecord]]:
    """(candidates to score, held-out candidates and traffic, traffic to train on).

    Raises UserError for a row without a failure class, and if nothing is left to score.
    """
    found: dict[str, Candidate] = {}
    for i, source in enumerate(config.candidates):
        for record in read_prompts(source.path, repeats=True):
            found.setdefault(record.prompt, (record, _failure(source, record, i)))
    kept, heldout, traffic = [], [], []
    for record, failure in found.values():
        (heldout if _is_heldout(config, record) else kept).append((record, failure))
    for record in read_prompts(config.traffic, repeats=True) if config.traffic is not None else ():
        if not _is_heldout(config, record):
            traffic.append(record)
        elif record.prompt not in found:  # else it is held out as a candidate
            heldout.append((record, TRAFFIC))
    if not kept:
        raise UserError("candidates: all candidates are held out; give more, or lower heldout")
    return kept, heldout, traffic


def _is_heldout(config: ExpanderMineConfig, record: PromptRecord) -> bool:
    # By the prompt alone, so that it is held out of every source.
    return in_share(f"{config.seed}:{record.prompt}", config.heldout)


def _failure(source: CandidatesConfig, record: PromptRecord, i: int) -> str:
    if source.failure is not None:
        return source.failure
    value = record.tags if source.column == "tags" else record.columns.get(source.column)
    name = value[0] if isinstance(value, list) and value else value
    if not isinstance(name, str) or not name.strip():
        raise UserError(
            f"candidates[{i}].column: {source.path}: '{record.prompt[:60]}' has no failure class in"
            f" '{source.column}'; add it, or name one for the whole file as failure"
        )
    return name.strip()


# ---- scores -----------------------------------------------------------------------------------------------


def _score(
    config: ExpanderMineConfig,
    run: Run,
    procs: Processes,
    policy: Policy,
    scorer: Scorer,
    candidates: Sequence[Candidate],
) -> list[dict[str, Any]]:
    """A row for each candidate, in their order, of all its scores together; those that were made before are read."""
    scores: list[dict[str, dict[str, Any]]] = [{} for _ in range(config.rounds)]
    for row in procs.from_main(_done(run.path / SCORES) if procs.main else None):
        if row["round"] <= config.rounds:
            scores[row["round"] - 1][row["prompt"]] = row
    found: list[dict[str, Any]] = []
    places = list(range(len(candidates)))
    for number in range(1, config.rounds + 1):
        if number > 1:
            log.info(f"round {number}: {counted(len(places), 'prompt')} kept so far, scored again by other expansions")
        _score_round(config, run, procs, policy, scorer, candidates, number, places, scores[number - 1])
        found = [_together(scores[:number], record.prompt) for record, _ in candidates]
        places = [i for i, row in enumerate(found) if _verdict(config, row) == "kept"]
    # Under the class that a prompt has now: it may have been scored under another one.
    return [row | {"failure": failure} for row, (_, failure) in zip(found, candidates)]


def _score_round(
    config: ExpanderMineConfig,
    run: Run,
    procs: Processes,
    policy: Policy,
    scorer: Scorer,
    candidates: Sequence[Candidate],
    number: int,
    places: Sequence[int],
    done: dict[str, dict[str, Any]],
) -> None:
    """Adds to `done` a row for each of the candidates at `places` that has none in this round, and to the file."""
    # Batches by position in the round's whole list, since their seeds come from it.
    jobs, chunks = list(enumerate(places)), []
    for first in range(0, len(jobs), config.batch):
        batch = jobs[first : first + config.batch]
        if todo := [job for job in batch if candidates[job[1]][0].prompt not in done]:
            chunks.append(todo)
    if number == 1 and chunks:
        run.start(math.ceil(len(chunks) / procs.size))
    for step, first in enumerate(range(0, len(chunks), procs.size), start=1):
        place = first + procs.rank  # at the end some processes may have nothing to do
        rows = _rows(config, policy, scorer, number, chunks[place], candidates) if place < len(chunks) else []
        for row in itertools.chain.from_iterable(procs.all_gather(rows)):
            done[row["prompt"]] = row
            if procs.main:
                append_line(run.path / SCORES, json_line(row))
        if number == 1:
            verdicts = Counter(_verdict(config, row) for row in done.values())
            run.log(step, {f"mined/{name}": verdicts[name] for name in VERDICTS})


def _verdict(config: ExpanderMineConfig, row: Mapping[str, Any]) -> Verdict:
    # Not kept with the scores, so that limits may change and nothing has to be drawn again.
    return verdict(row["mean"], row["std"], row["safe"], config.low, config.high, config.spread, config.safe)


def _together(scores: Sequence[Mapping[str, dict[str, Any]]], prompt: str) -> dict[str, Any]:
    """One row of a prompt's scores in all rounds that it came to."""
    rows = [of_round[prompt] for of_round in scores if prompt in of_round]
    mean, std = pooled([(row["scored"], row["mean"], row["std"]) for row in rows])
    return rows[0] | {"mean": mean, "std": std, "safe": float(np.mean([row["safe"] for row in rows]))}


def _done(file: Path) -> list[dict[str, Any]]:
    """Rows of an interrupted command, without an incomplete last line."""
    if not file.exists():
        return []
    rows = list(map(json.loads, whole_lines(file)))
    replace_text(file, "".join(map(json_line, rows)))
    return rows


def _rows(
    config: ExpanderMineConfig,
    policy: Policy,
    scorer: Scorer,
    number: int,
    own: Sequence[tuple[int, int]],
    candidates: Sequence[Candidate],
) -> list[dict[str, Any]]:
    """Expands, draws and scores these candidates, (position in the round's list, index) each, in a round from 1."""
    size, generation = config.group_size, config.generation
    # Another round has other words and noise: what was kept by chance is not kept again.
    seed = config.seed if number == 1 else sampler.seed_for(config.seed, -number)
    records: list[PromptRecord] = []
    seeds: list[int] = []
    for position, i in own:
        records.append(candidates[i][0])
        seeds += [sampler.seed_for(seed, position)] * size  # one noise for all expansions of a prompt
    # Seeds come from the position in the list, so that a resumed command draws the same.
    first = own[0][0]
    expansions = policy.write(
        records, size, first * size, generation.max_tokens, generation.temperature, seed, len(own) * size
    )
    scored = scorer(expansions, seeds, size)
    composite_N = composite(config, scored)
    rows = []
    for g, (_, i) in enumerate(own):
        group = slice(g * size, (g + 1) * size)
        safe = scored.unsafe_N[group].count([]) / size
        mean, std = moments(composite_N[group])
        record, failure = candidates[i]
        known = int((~np.isnan(composite_N[group])).sum())
        facts = {"round": number, "scored": known, "mean": mean, "std": std, "safe": safe}
        rows.append({"prompt": record.prompt, "failure": failure, **facts})
    return rows


def composite(config: ExpanderMineConfig, scored: Scored) -> np.ndarray:
    """(N,) the weighted mean of the trained rewards, diversity aside; NaN without a score. Raises RewardError for a
    score outside [0, 1], where low and high have no meaning."""
    columns = [scored.names.index(reward.name) for reward in config.trained]
    values_NK, valid_NK = scored.values_NK[:, columns], scored.valid_NK[:, columns]
    # Rounding may take a score of 1 a little above it.
    outside_K = (valid_NK & ((values_NK < -1e-6) | (values_NK > 1 + 1e-6))).any(0)
    if outside_K.any():
        name = config.trained[int(outside_K.argmax())].name
        raise RewardError(f"reward {name}: a score is outside [0, 1], which mining needs; set its scale and offset")
    return composites(values_NK, valid_NK, np.array([reward.weight for reward in config.trained]))


# ---- what is written --------------------------------------------------------------------------------------


def select(config: ExpanderMineConfig, rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, float]]:
    """(indices of the rows to train on, share of each failure class among them as the quotas want it).

    Where a class has fewer kept prompts than its share, the others take its places; the pool draws by the shares.
    """
    by_class: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if _verdict(config, row) == "kept":
            by_class.setdefault(row["failure"], []).append(i)
    sizes = {name: len(kept) for name, kept in by_class.items()}
    share_of = shares(sizes, config.floor)
    chosen: list[int] = []
    for name, places in slots(share_of, sizes, min(config.count, sum(sizes.values()))).items():
        nearest = sorted(by_class[name], key=lambda i: abs(rows[i]["mean"] - 0.5))
        chosen += nearest[:places]
    return sorted(chosen), share_of


def write(
    config: ExpanderMineConfig,
    output: Path,
    candidates: Sequence[Candidate],
    rows: Sequence[Mapping[str, Any]],
    heldout: Sequence[Candidate],
    traffic: Sequence[PromptRecord],
) -> dict[str, Any]:
    """Writes the prompts, the recipe of the pool and the counts, which it returns, and prints a summary."""
    verdicts = Counter(_verdict(config, row) for row in rows)
    chosen, share_of = select(config, rows)
    if not chosen:
        found = ", ".join(f"{count} {name}" for name, count in verdicts.most_common())
        raise UserError(
            f"candidates: no candidate is hard but not hopeless ({found}; see {output / SCORES}); give others, or"
            " change low, high or spread"
        )
    mined = [candidates[i] for i in chosen]
    kept = {record.prompt for record, _ in mined}
    others = [record for record in traffic if record.prompt not in kept]
    # mixed / (mined + mixed) is to be the share of traffic.
    wanted = round(len(mined) * config.traffic_share / (1 - config.traffic_share)) if others else 0
    places = np.random.default_rng(config.seed).permutation(len(others))[:wanted]
    mixed = [(others[i], TRAFFIC) for i in sorted(places)]
    _write_prompts(output / "train.jsonl", [*mined, *mixed])
    _write_prompts(output / "heldout.jsonl", heldout)
    traffic_share = config.traffic_share if mixed else 0.0
    quotas, rounded = {}, {}
    for name, share in share_of.items():
        quotas[MINED + name] = round((1 - traffic_share) * share, 4)  # of all draws; traffic gets the rest
        rounded[name] = round(share, 4)
    pool = {"prompts": {"train": str(output / "train.jsonl")}, "pool": {"kind": "adaptive", "quotas": quotas}}
    if len(heldout) > 0:
        pool["prompts"]["heldout"] = str(output / "heldout.jsonl")
    replace_text(output / "pool.yaml", yaml.safe_dump(pool, sort_keys=False, allow_unicode=True))
    classes = Counter(rows[i]["failure"] for i in chosen)
    counts = {
        "candidates": len(rows),
        "verdicts": {name: verdicts[name] for name in VERDICTS},
        "shares": rounded,
        "mined": {name: classes[name] for name in share_of},
        "traffic": len(mixed),
        "heldout": len(heldout),
    }
    replace_text(output / CARD, json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
    listed = ", ".join(f"{verdicts[name]} {name}" for name in VERDICTS)
    print(
        f"posttrain: {counted(len(rows), 'candidate')}: {listed}; wrote {counted(len(mined), 'prompt')} and"
        f" {len(mixed)} of traffic to {output / 'train.jsonl'}"
    )
    return counts


def _write_prompts(path: Path, prompts: Sequence[Candidate]) -> None:
    """A file of prompts, each with its class as its first tag, which the pool's quotas are of."""
    lines = []
    for record, failure in prompts:
        tag = TRAFFIC if failure == TRAFFIC else MINED + failure
        lines.append(json_line(as_row(record) | {"tags": [tag, *record.tags]}))
    replace_text(path, "".join(lines))
