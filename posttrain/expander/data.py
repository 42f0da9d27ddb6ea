"""Pairs for the prompt expander: from long captions, short prompts as users type them.

    posttrain expander data --config recipes/nano/expander_data.yaml

A language model behind a judge's server writes each short prompt in a length and a register that are drawn; the checker
breaks it into facts and says for each whether the caption holds it, and only prompts whose facts all are stay. Some
captions are also prompts themselves (kind long), and kind quoted are prompts with text in quotation marks, which the
caption must have verbatim. A function that is named instead of captions, package.module:function, gives the candidates
of caption i itself, so no server is needed: recipes/nano/expander_data.yaml names that of the nano world.

The directory holds train.parquet and heldout.parquet (columns prompt, completion, kind, register, source; a caption's
pairs are on one side), a card for `datasets`, expander_data.json with all counts, and candidates.jsonl: a line for each
caption with what was dropped and why. That file makes the command resumable.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from posttrain.errors import UserError
from posttrain.expander.config import ExpanderDataConfig, WriterConfig, is_function
from posttrain.log import log
from posttrain.preferences.sources import open_source
from posttrain.runs.guard import check_unchanged
from prompts.templates import load_template
from rewards.endpoints import JudgeError
from rewards.judge import Judge
from rewards.load import import_object, with_servers
from rewards.serve import serve

CANDIDATES, CARD = "candidates.jsonl", "expander_data.json"
COLUMNS = ("prompt", "completion", "kind", "register", "source")
MAY_CHANGE = ("output", "servers", "writer", "checker", "max_failures")
"""Settings that a resumed command may have changed; of writer and checker, all but the model."""
QUOTED = re.compile(r'"[^"\n]+"|“[^”\n]+”|«[^»\n]+»|「[^」\n]+」')


@dataclass
class Candidate:
    prompt: str
    completion: str
    kind: str
    """short, quoted (short, with text in quotation marks) or long."""
    register: str
    dropped: str | None = None
    """Why it is no pair; None: it is one."""


def make(config: ExpanderDataConfig, resume: bool = False) -> None:
    """Writes `config.output`. Raises UserError for captions that are missing, and where too many requests fail."""
    output = Path(config.output)
    _begin(config, output, resume)
    done = _done(output / CANDIDATES)
    with (output / CANDIDATES).open("a", encoding="utf-8") as file:

        def keep(index: int, found: list[Candidate] | str) -> None:
            """Candidates of a caption, or why there are none."""
            row = {"failed": found} if isinstance(found, str) else {"candidates": [vars(c) for c in found]}
            done[index] = {"index": index, **row}
            file.write(json.dumps(done[index], ensure_ascii=False) + "\n")
            file.flush()

        if is_function(config.captions):
            candidates_of = import_object(config.captions, "captions")
            for index in range(config.count or 0):
                if index not in done:
                    keep(index, candidates_of(config, index))
        else:
            texts = read_captions(config)
            with serve(config.servers, output / "servers") as urls:
                asyncio.run(_ask_all(config, texts, urls, done, keep))
    _finish(config, output, [done[index] for index in sorted(done)])


# ---- a language model -------------------------------------------------------------------------------------


def read_captions(config: ExpanderDataConfig) -> list[str]:
    """The captions, each once. Raises UserError with the row for one that is no text."""
    source = open_source(config.captions)
    if config.column not in source.columns:
        known = ", ".join(source.columns) or "none"
        raise UserError(f"column: {config.captions} has no column {config.column}; it has {known}")
    texts: dict[str, None] = {}
    for i in range(len(source)):
        try:
            value = source[i][config.column]
        except (ValueError, KeyError) as error:
            raise UserError(f"{source.name(i)}: {config.column}: cannot be read: {error}") from None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{source.name(i)}: {config.column}: is empty or no text; mend or drop the row")
        texts[value.strip()] = None
        if len(texts) == config.count:
            break
    if not texts:
        raise UserError(f"captions: {config.captions} holds no caption; name another source")
    return list(texts)


async def _ask_all(config: ExpanderDataConfig, texts: list[str], urls: dict[str, list[str]], done: dict, keep) -> None:
    assert config.writer is not None
    writer = _judge("writer", config.writer, urls, config.seed)
    checker = writer if config.checker is None else _judge("checker", config.checker, urls, config.seed)
    asker = _Asker(config, writer, checker)
    waiting = iter([(i, text) for i, text in enumerate(texts) if i not in done])
    failures: list[str] = []

    async def work() -> None:
        for index, text in waiting:
            try:
                keep(index, await asker.candidates(index, text))
            except JudgeError as error:
                failures.append(str(error))
                keep(index, str(error))
                if len(failures) > config.max_failures * len(texts):
                    raise UserError(
                        f"writer: {len(failures)} of {len(texts)} captions failed, more than max_failures"
                        f" ({config.max_failures:g}); the last: {error}; mend the server and add --resume"
                    ) from None

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(config.writer.concurrency):
                group.create_task(work())
    except* UserError as errors:
        raise errors.exceptions[0] from None


@dataclass
class _Asker:
    config: ExpanderDataConfig
    writer: Judge
    checker: Judge

    def __post_init__(self) -> None:
        self.shorten, self.decompose, self.entails = map(load_template, ("shorten", "decompose", "entails"))

    async def candidates(self, index: int, caption: str) -> list[Candidate]:
        config = self.config
        rng = np.random.default_rng([config.seed, index])
        manners = list(itertools.product(config.lengths, config.registers))
        found: list[Candidate] = []
        for choice in rng.permutation(len(manners))[: config.per_caption]:
            length, register = manners[choice]
            reply = await self.writer.write("prompts", self.shorten, caption=caption, length=length, register=register)
            prompt = " ".join(reply[0].split()) if len(reply) == 1 else ""
            kind = "quoted" if QUOTED.search(prompt) else "short"
            candidate = Candidate(prompt, caption, kind, f"{register}, {length}")
            candidate.dropped = refused(candidate, found) or await self._unfaithful(candidate)
            found.append(candidate)
        if rng.random() < config.long_share:
            found.append(Candidate(caption, caption, "long", "caption"))
        return found

    async def _unfaithful(self, candidate: Candidate) -> str | None:
        """Why the caption does not hold all of the prompt's facts; None: it does."""
        facts = await self.checker.decompose(self.decompose, candidate.prompt)
        if not facts:
            return "no fact found in it"
        for fact in facts:
            p = await self.checker.p_yes(None, self.entails, caption=candidate.completion, statement=fact)
            if p < self.config.threshold:
                return f"not in the caption: {fact}"
        return None


def refused(candidate: Candidate, others: list[Candidate]) -> str | None:
    """Why a short prompt is none, by its text alone; None: nothing is wrong with it."""
    if not candidate.prompt:
        return "no prompt in the reply"
    if len(candidate.prompt) > len(candidate.completion):
        return "longer than the caption"
    if candidate.prompt in [other.prompt for other in others]:
        return "twice"
    if any(quote not in candidate.completion for quote in QUOTED.findall(candidate.prompt)):
        return "quotes what the caption does not"
    return None


def _judge(path: str, spec: WriterConfig, urls: dict[str, list[str]], seed: int) -> Judge:
    bases = [spec.base_urls] if isinstance(spec.base_urls, str) else spec.base_urls
    resolved = with_servers(bases, urls, f"{path}.base_urls")
    return Judge(spec.model, resolved, spec.api_key_env, spec.concurrency, spec.timeout, seed=seed)


# ---- the directory ----------------------------------------------------------------------------------------


def _begin(config: ExpanderDataConfig, output: Path, resume: bool) -> None:
    """Makes the directory, or finds what was begun there with the same settings."""
    recipe = output / "recipe.yaml"
    if (output / CARD).exists():
        raise UserError(f"output: {output} holds finished data; choose another directory")
    if output.exists() and any(output.iterdir()) and not (resume and recipe.exists()):
        remedy = "add --resume to go on with it" if recipe.exists() else "choose another directory"
        raise UserError(f"output: {output} is not empty; {remedy}")
    check_unchanged(config, "; restore it", free=MAY_CHANGE)
    now = dataclasses.asdict(config)
    if recipe.exists():
        before = yaml.safe_load(recipe.read_text())
        for name in ("writer", "checker"):  # where they are asked may change, but not who is asked
            if _model(before.get(name)) != _model(now[name]):
                raise UserError(f"{name}.model: is not what {output} was begun with ({recipe} has that); restore it")
    try:
        output.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(now, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: {output} cannot be written: {error.strerror}; choose another directory") from None


def _model(writer: dict[str, Any] | None) -> str | None:
    return writer["model"] if writer else None


def _done(path: Path) -> dict[int, dict[str, Any]]:
    """What a killed command left, less a line that was cut off and captions that failed."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    rows = [row for row in rows if "failed" not in row]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {row["index"]: row for row in rows}


def _finish(config: ExpanderDataConfig, output: Path, rows: list[dict[str, Any]]) -> None:
    candidates = [Candidate(**c) for row in rows for c in row.get("candidates", ())]
    kept = {"train": [], "heldout": []}
    for candidate in candidates:
        if candidate.dropped is None:
            kept["heldout" if _held_out(candidate.completion, config) else "train"].append(candidate)
    for name, part in kept.items():
        if not part:
            raise UserError(
                f"captions: no pair for {name}: {sum(map(len, kept.values()))} of {len(candidates)} candidates were"
                f" kept; see {output / CANDIDATES} for why, and give more captions"
            )
    dropped = Counter(c.dropped.partition(":")[0] for c in candidates if c.dropped is not None)
    kinds = Counter(c.kind for part in kept.values() for c in part)
    for name, part in kept.items():
        table = {column: [_cell(config, c, column) for c in part] for column in COLUMNS}
        pq.write_table(pa.table(table), output / f"{name}.parquet")
    counts = {
        "captions": len(rows),
        "failed": sum("failed" in row for row in rows),
        "candidates": len(candidates),
        "dropped": dict(dropped.most_common()),
        "kinds": dict(kinds),
        **{name: len(part) for name, part in kept.items()},
    }
    (output / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.parquet}\n"
        "  - {split: heldout, path: heldout.parquet}\n---\n"
        "Short prompts and the captions that they should be expanded to.\n\n"
        f"```json\n{json.dumps(counts, indent=1)}\n```\n"
    )
    (output / CARD).write_text(json.dumps(counts, indent=1) + "\n")
    told = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common()) or "none"
    print(
        f"posttrain: wrote {counts['train']} pairs and {counts['heldout']} held out to {output}"
        f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}); dropped: {told}; failed: {counts['failed']}"
    )
    if not kinds["quoted"]:
        log.warning("no prompt quotes text, so the expander will not learn to keep it")


def _cell(config: ExpanderDataConfig, candidate: Candidate, column: str) -> str:
    return config.captions if column == "source" else getattr(candidate, column)


def _held_out(caption: str, config: ExpanderDataConfig) -> bool:
    digest = hashlib.sha256(f"{config.seed}:{caption}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.heldout * 2**64
