"""Makes training pairs for the prompt expander: short prompts, as users type them, from long captions.

    posttrain expander data --config recipes/nano/expander_data.yaml

A language model on a server writes each short prompt in a random length and register. The checker then breaks the
prompt into facts and decides for each whether the caption contains it; a prompt with one missing fact is dropped. Some
captions are also used as prompts themselves (kind long). Prompts with text in quotation marks are of kind quoted, and
the caption must contain that text verbatim. Instead of captions, a function package.module:function can be named, which
returns the candidates of caption i itself and needs no server: recipes/nano/expander_data.yaml names the nano world's.

The output directory contains train.parquet and heldout.parquet (columns prompt, completion, kind, register, source; all
pairs of a caption are on one side), a card for `datasets`, expander_data.json with all counts, and candidates.jsonl
with one line for each caption, which says what was dropped and why. That file makes the command resumable.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from posttrain.errors import UserError, counted
from posttrain.expander.config import ExpanderDataConfig, WriterConfig, is_function
from posttrain.expander.pair_data.thoughts import Thinker
from posttrain.expander.pair_data.weights import (
    as_photograph,
    divergence,
    names_medium,
    photograph_weight,
    share,
    weights_with,
)
from posttrain.log import log
from posttrain.preferences.heldout import in_share
from posttrain.runs.files import replace_text
from posttrain.runs.guard import check_unchanged
from prompts.parse import json_line, whole_lines
from prompts.tables import open_table, row_texts
from prompts.templates import load_template
from rewards.endpoints import JudgeError
from rewards.judge import Judge
from rewards.load import import_object, with_servers
from rewards.serve import serve

CANDIDATES, CARD = "candidates.jsonl", "expander_data.json"
COLUMNS = ("prompt", "completion", "kind", "register", "source", "thought", "weight")
MAY_CHANGE = ("output", "servers", "writer", "checker", "max_failures")
"""Settings that may change on resume; of writer and checker, all but the model."""
PHOTOGRAPH = "photograph"
"""Tag of a caption of a photograph."""
QUOTED = re.compile(r'"[^"\n]+"|“[^”\n]+”|«[^»\n]+»|「[^」\n]+」')


@dataclass
class Candidate:
    prompt: str
    completion: str
    kind: str
    """short, quoted (short, with text in quotation marks) or long."""
    register: str
    dropped: str | None = None
    """Why the candidate is not used as a pair; None if it is used."""
    thought: str = ""
    """What stands before the completion; empty: nothing."""
    tags: list[str] = field(default_factory=list)
    """Names of the recipe's tags that its caption has, and PHOTOGRAPH."""
    caption: str = ""
    """What the completion was made from; empty: it is the caption itself."""


def make(config: ExpanderDataConfig, resume: bool = False) -> None:
    """Writes `config.output`. Raises UserError for missing captions, and if too many requests fail."""
    output = Path(config.output)
    _begin(config, output, resume)
    done = _done(output / CANDIDATES)
    with (output / CANDIDATES).open("a", encoding="utf-8") as file:

        def keep(index: int, candidates: list[Candidate] | str) -> None:
            """Records a caption's candidates, or the error because of which there are none."""
            is_error = isinstance(candidates, str)
            outcome = {"failed": candidates} if is_error else {"candidates": list(map(vars, candidates))}
            done[index] = {"index": index, **outcome}
            file.write(json_line(done[index]))
            file.flush()  # so that a kill loses at most one line

        if is_function(config.captions):
            candidates_of = import_object(config.captions, "captions")
            for index in range(config.count or 0):
                if index not in done:
                    keep(index, candidates_of(config, index))
        else:
            texts = read_captions(config)
            with serve(config.servers, output / "servers") as urls:
                asyncio.run(_ask_all(config, texts, urls, done, keep))
    # Captions are finished in any order, on which the files must not depend.
    _finish(config, output, [done[index] for index in sorted(done)])


# ---- a language model -------------------------------------------------------------------------------------


def read_captions(config: ExpanderDataConfig) -> list[str]:
    """The captions without repetitions. Raises UserError with the row of a caption that is not text."""
    source = open_table(config.captions)
    if config.column not in source.columns:
        known = ", ".join(source.columns) or "none"
        raise UserError(f"column: {config.captions} has no column {config.column}; it has {known}")
    texts: dict[str, None] = {}  # an ordered set
    for i in range(len(source)):
        (text,) = row_texts(source, i, config.column)
        texts[text] = None
        if len(texts) == config.count:
            break
    if not texts:
        raise UserError(f"captions: {config.captions} contains no caption; choose another source")
    return list(texts)


async def _ask_all(config: ExpanderDataConfig, texts: list[str], urls: dict[str, list[str]], done: dict, keep) -> None:
    assert config.writer is not None
    writer = _judge("writer", config.writer, urls, config.seed)
    checker = writer if config.checker is None else _judge("checker", config.checker, urls, config.seed)
    shortener = _Shortener(config, writer, checker)
    queue = iter([(i, text) for i, text in enumerate(texts) if i not in done])
    failures: list[str] = []

    async def work() -> None:
        for index, text in queue:  # all workers take from the same iterator
            try:
                keep(index, await shortener.candidates(index, text))
            except JudgeError as error:
                failures.append(str(error))
                keep(index, str(error))
                if len(failures) > config.max_failures * len(texts):
                    raise UserError(
                        f"writer: {len(failures)} of {counted(len(texts), 'caption')} failed, more than max_failures"
                        f" ({config.max_failures:g}); the last error: {error}; fix the server and add --resume"
                    ) from None

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(config.writer.concurrency):
                group.create_task(work())
    except* UserError as errors:  # the first one explains the run's end; an ExceptionGroup would show a traceback
        raise errors.exceptions[0] from None


@dataclass
class _Shortener:
    """Asks the writer for short prompts of a caption, and the checker whether they are faithful."""

    config: ExpanderDataConfig
    writer: Judge
    checker: Judge

    def __post_init__(self) -> None:
        names = ("shorten", "decompose", "entails", "translate", "think")
        self.shorten, self.decompose, self.entails, self.translate, think = map(load_template, names)
        checks = (self.decompose, self.entails, self.config.threshold)
        self.thinker = Thinker(self.writer, self.checker, think, *checks)

    async def candidates(self, index: int, caption: str) -> list[Candidate]:
        config = self.config
        rng = np.random.default_rng([config.seed, index])  # by caption, so that the order of work does not matter
        candidates = await self._short(rng, caption)
        tags = await self._tags(caption)
        for candidate in candidates:
            candidate.tags = tags
            if config.thoughts and candidate.dropped is None and rng.random() >= config.direct_share:
                candidate.thought, reason = await self.thinker(candidate.prompt, candidate.completion)
                candidate.dropped = None if reason is None else f"thought {reason}"
        if rng.random() < config.long_share:
            candidates.append(Candidate(caption, caption, "long", "caption", tags=tags))
        return candidates

    async def _tags(self, caption: str) -> list[str]:
        statements = {name: tag.statement for name, tag in self.config.tags.items()}
        if self.config.photographs is not None:
            statements[PHOTOGRAPH] = self.config.photographs.statement
        found = []
        for name, statement in statements.items():
            if await self.checker.p_yes(None, self.entails, caption=caption, statement=statement) >= 0.5:
                found.append(name)
        return found

    async def _short(self, rng: np.random.Generator, caption: str) -> list[Candidate]:
        """Short prompts of a caption, or of its translation."""
        config = self.config
        language, original = _language(config, rng), ""
        if language is not None:
            texts = await self.writer.write("texts", self.translate, caption=caption, language=language)
            if len(texts) != 1 or not _keeps_quotes(caption, texts[0]):
                return [Candidate("", caption, "short", language, "not translated")]
            caption, original = texts[0].strip(), caption
        styles = list(itertools.product(config.lengths, config.registers))
        candidates: list[Candidate] = []
        for choice in rng.permutation(len(styles))[: config.per_caption]:  # without repetition
            length, register = styles[choice]
            reply = await self.writer.write(
                "prompts", self.shorten, caption=caption, length=length, register=register,
                language=language or "that of the caption",
            )  # fmt: skip
            # A user's prompt is one line; several prompts in a reply mean that it was not understood.
            prompt = " ".join(reply[0].split()) if len(reply) == 1 else ""
            kind = "quoted" if QUOTED.search(prompt) else "short"
            manner = f"{register}, {length}" if language is None else f"{register}, {length}, {language}"
            candidate = Candidate(prompt, caption, kind, manner, caption=original)
            # The checker is asked only if the cheap checks pass.
            candidate.dropped = problem(candidate, candidates) or await self._missing_fact(candidate)
            candidates.append(candidate)
        return candidates

    async def _missing_fact(self, candidate: Candidate) -> str | None:
        """The first fact of the prompt that the caption does not contain, as a reason; None if it contains all."""
        facts = await self.checker.decompose(self.decompose, candidate.prompt)
        if not facts:
            return "no fact found in it"
        for fact in facts:
            p = await self.checker.p_yes(None, self.entails, caption=candidate.completion, statement=fact)
            if p < self.config.threshold:
                return f"not in the caption: {fact}"
        return None


def _language(config: ExpanderDataConfig, rng: np.random.Generator) -> str | None:
    """The language to ask for, or None for the caption's own. Draws nothing where no language is asked for."""
    if not config.languages:
        return None
    ends = np.cumsum(list(config.languages.values()))
    place = int(np.searchsorted(ends, rng.random(), side="right"))
    return list(config.languages)[place] if place < len(ends) else None


def problem(candidate: Candidate, others: list[Candidate]) -> str | None:
    """Why a short prompt cannot be used, from its text alone; None if nothing is wrong with it."""
    if not candidate.prompt:
        return "no prompt in the reply"
    if len(candidate.prompt) > len(candidate.completion):
        return "longer than the caption"
    if any(candidate.prompt == other.prompt for other in others):
        return "twice"
    return None if _keeps_quotes(candidate.prompt, candidate.completion) else "quotes what the caption does not"


def _keeps_quotes(source: str, text: str) -> bool:
    """Whether all that a source quotes is in the text, verbatim."""
    return all(quote in text for quote in QUOTED.findall(source))


def _judge(path: str, spec: WriterConfig, urls: dict[str, list[str]], seed: int) -> Judge:
    bases = [spec.base_urls] if isinstance(spec.base_urls, str) else spec.base_urls
    resolved = with_servers(bases, urls, f"{path}.base_urls")
    return Judge(
        spec.model, resolved, spec.api_key_env, spec.concurrency, spec.timeout, seed=seed, answers_as=spec.answers_as
    )


# ---- the directory ----------------------------------------------------------------------------------------


def _begin(config: ExpanderDataConfig, output: Path, resume: bool) -> None:
    """Creates the directory, or checks that an interrupted command there had the same settings."""
    recipe = output / "recipe.yaml"
    if (output / CARD).exists():
        raise UserError(f"output: {output} contains finished data; choose another directory")
    if output.exists() and any(output.iterdir()) and not (resume and recipe.exists()):
        remedy = "add --resume to continue it" if recipe.exists() else "choose another directory"
        raise UserError(f"output: {output} is not empty; {remedy}")
    check_unchanged(config, "; restore it", free=MAY_CHANGE)
    now = dataclasses.asdict(config)
    if recipe.exists():
        before = yaml.safe_load(recipe.read_text())
        for name in ("writer", "checker"):  # servers may move, but another model would write other prompts
            if _model(before.get(name)) != _model(now[name]):
                raise UserError(f"{name}.model: differs from {recipe}, with which {output} began; restore it")
    try:
        output.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(now, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: {output} cannot be written: {error.strerror}; choose another directory") from None


def _model(writer: dict[str, Any] | None) -> str | None:
    return writer["model"] if writer else None


def _done(path: Path) -> dict[int, dict[str, Any]]:
    """Rows of an interrupted command by index, without an incomplete last line and without failed captions."""
    rows = {}
    for row in map(json.loads, whole_lines(path)):
        if "failed" not in row:
            rows[row["index"]] = row
    path.write_text("".join(map(json_line, rows.values())), encoding="utf-8")
    return rows


def _finish(config: ExpanderDataConfig, output: Path, rows: list[dict[str, Any]]) -> None:
    candidates: list[Candidate] = []
    for row in rows:
        candidates += [Candidate(**fields) for fields in row.get("candidates", ())]
    kept: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    used: list[Candidate] = []
    kinds: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for candidate in candidates:
        if candidate.dropped is None:
            used.append(candidate)
            kinds[candidate.kind] += 1
        else:
            dropped[candidate.dropped.partition(":")[0]] += 1  # the reason without the fact that it names
    weights, shares = _weigh(config, used) if used else ([], {})
    for candidate, times in zip(used, weights):
        # Split by caption, so that a held-out prompt never has an answer that was trained on.
        heldout = in_share(f"{config.seed}:{candidate.caption or candidate.completion}", config.heldout)
        fields = vars(candidate) | {"source": config.captions, "weight": times}
        kept["heldout" if heldout else "train"].append({column: fields[column] for column in COLUMNS})
    for name, pairs in kept.items():
        if not pairs:
            raise UserError(
                f"captions: no pair for {name}: {sum(kinds.values())} of {counted(len(candidates), 'candidate')} kept;"
                f" see {output / CANDIDATES} for the reasons, and give more captions"
            )
        pq.write_table(pa.Table.from_pylist(pairs), output / f"{name}.parquet")
    counts = {
        "captions": len(rows),
        "failed": sum("failed" in row for row in rows),
        "candidates": len(candidates),
        "dropped": dict(dropped.most_common()),
        "kinds": dict(kinds),
        "train": len(kept["train"]),
        "heldout": len(kept["heldout"]),
        "thoughts": sum(bool(candidate.thought) for candidate in used),
        **({"shares": shares} if shares else {}),
    }
    (output / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.parquet}\n"
        "  - {split: heldout, path: heldout.parquet}\n---\n"
        "Short prompts and the captions that they should be expanded to.\n\n"
        f"```json\n{json.dumps(counts, indent=1)}\n```\n"
    )
    replace_text(output / CARD, json.dumps(counts, indent=1) + "\n")  # last: what has it is finished
    print(
        f"posttrain: wrote {counted(counts['train'], 'pair')} and {counts['heldout']} held out to {output}"
        f" ({_listed(kinds)}); dropped: {_listed(dropped) or 'none'}; failed: {counts['failed']}"
    )
    if not kinds["quoted"]:
        log.warning("no prompt quotes text, so the expander will not learn to keep it")


def _weigh(config: ExpanderDataConfig, used: list[Candidate]) -> tuple[list[float], dict[str, dict[str, float | None]]]:
    """(the weight of each pair, shares of each tag: before, after, target, and of photographs the divergence).

    Names the medium in captions of photographs whose prompt leaves it open.
    """
    added, photographs = [], []
    for candidate in used:
        added.append(sum(tag.weight for name, tag in config.tags.items() if name in candidate.tags))
        photographs.append(PHOTOGRAPH in candidate.tags)
    eligible, extra = [False] * len(used), 0.0
    if config.photographs is not None:
        for i, candidate in enumerate(used):
            eligible[i] = photographs[i] and candidate.kind != "long" and not names_medium(candidate.prompt)
            if eligible[i] and not candidate.caption and not names_medium(candidate.completion):
                named = as_photograph(candidate.completion)
                if named is not None:
                    candidate.completion, candidate.caption = named, candidate.completion
        spec = config.photographs
        extra = photograph_weight(added, eligible, photographs, spec.weight, spec.max_kl)
    weights = weights_with(added, eligible, extra)
    shares: dict[str, dict[str, float | None]] = {}
    for name, tag in config.tags.items():
        has = [name in candidate.tags for candidate in used]
        before, after = sum(has) / len(has), share(weights, has)
        shares[name] = {"before": before, "after": after, "target": tag.target}
    if config.photographs is not None:
        before, after = sum(photographs) / len(used), share(weights, photographs)
        kl = divergence(after, before)
        shares[PHOTOGRAPH] = {"before": before, "after": after, "weight": extra, "kl": kl}
        if kl > config.photographs.max_kl:
            log.warning(f"photographs: the tags move their share from {before:.3f} to {after:.3f}; lower their weights")
    return weights, shares


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
