"""The figures of each suite from recorded answers, by the arithmetic of its authors; all in [0, 1].

A row is a scored image: `prompt`, `score` and the details of its reward. A mean of nothing is None.
`pooled` means over all answers at once; the mean over prompts takes each prompt's images together first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.errors import UserError
from prompts.records import PromptRecord

Rows = Sequence[dict[str, Any]]
Records = Sequence[PromptRecord]
Found = dict[str, float | None]

NOT_READ = re.compile(r"[^\u4e00-\u9fa5a-zA-Z0-9\sàâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ]")
"""What LongText-Bench compares no text by."""
CHINESE = re.compile("[\u4e00-\u9fa5]")


def geneval2(records: Records, rows: Rows) -> Found:
    """Soft-TIFA: `am` and `gm` of an image's probabilities, `skill/` over all atoms, `atoms/` the gm by atom_count."""
    am = list(map(_mean, _detail(rows, "probabilities")))
    gm = list(map(geometric_mean, _detail(rows, "probabilities")))
    skills, atoms = [], []
    for row, value in zip(rows, gm):
        columns = records[row["prompt"]].columns
        skills += zip(columns["skills"], row["probabilities"], strict=True)
        # Two digits, so that sorting the names sorts the numbers.
        atoms.append((f"{columns['atom_count']:02d}", value))
    found = {"am": over_prompts(rows, am), "gm": over_prompts(rows, gm)}
    return {**found, **pooled("skill", skills), **pooled("atoms", atoms)}


def dpg(records: Records, rows: Rows) -> Found:
    """`score` over prompts; `category/` and `detail/` over all answers, before any counts 0 for its parents."""
    answers = []
    for row, probabilities in zip(rows, _detail(rows, "probabilities")):
        categories = records[row["prompt"]].columns["categories"]
        for category, p in zip(categories, probabilities, strict=True):
            # As the official scorer, which reads a yes or a no and knows no probability.
            answers.append((category, float(p >= 0.5)))
    broad = [(category.split("-")[0].strip(), right) for category, right in answers]
    score = over_prompts(rows, map(_mean, _detail(rows, "credits")))
    return {"score": score, **pooled("category", broad), **pooled("detail", answers)}


def unigenbench(records: Records, rows: Rows) -> Found:
    """`dimension/` and `point/` (of a dimension with several), and `score`, each over all test points."""
    points = []
    for row, credits in zip(rows, _detail(rows, "credits")):
        points += zip(records[row["prompt"]].columns["points"], credits, strict=True)
    # "Attribute - Color" is a point of the dimension "Attribute"; a dimension with one point is named alone.
    dimensions = [(point.split("-", 1)[0].strip(), credit) for point, credit in points]
    score = _mean([credit for _, credit in points]) if points else None
    return {"score": score, **pooled("dimension", dimensions), **pooled("point", points)}


def oneig(records: Records, rows: Rows) -> Found:
    """`score` is the alignment over prompts; `class/` that of each class."""
    scores = list(map(_mean, _detail(rows, "credits")))
    return {"score": over_prompts(rows, scores), **_grouped("class", records, rows, scores)}


def longtext(records: Records, rows: Rows) -> Found:
    """`score` is the share of the words asked for that were read, in any order, of characters in a Chinese file, over
    all images together; `category/` the same. `text` is the mean of the reward, which minds order and extra words."""
    chinese = [record for record in records if CHINESE.search(record.texts[0])]
    # Decided once for the file, by most of its texts: its authors publish the two languages in two files.
    by_characters = len(chinese) * 2 > len(records)
    read: dict[str, list[int]] = {"score": [0, 0]}
    for row, lines in zip(rows, _detail(rows, "lines")):
        record = records[row["prompt"]]
        asked = text_units(record.texts[0], by_characters)
        # The intersection of two multisets: a word that is asked for twice has to be read twice.
        matched = (asked & text_units("\n".join(lines), by_characters)).total()
        names = ["score", *(f"category/{tag}" for tag in record.tags)]
        for name in names:
            counts = read.setdefault(name, [0, 0])
            counts[0] += matched
            counts[1] += asked.total()
    found: Found = {}
    for name, (matched, total) in read.items():
        found[name] = matched / total if total else None
    return {**found, "text": over_prompts(rows, _detail(rows, "score"))}


def compbench(records: Records, rows: Rows) -> Found:
    """`score` is the product of an image's probabilities, `mean` their mean, over prompts; `category/` the product."""
    probabilities = _detail(rows, "probabilities")
    products, means = list(map(math.prod, probabilities)), list(map(_mean, probabilities))
    found = {"score": over_prompts(rows, products), "mean": over_prompts(rows, means)}
    return {**found, **_grouped("category", records, rows, products)}


def rubric(records: Records, rows: Rows) -> Found:
    """`score` over prompts, `tag/` over the prompts with that tag."""
    scores = _detail(rows, "score")
    return {"score": over_prompts(rows, scores), **_grouped("tag", records, rows, scores)}


# ---- means -----------------------------------------------------------------------------------------------------


def geometric_mean(values: Sequence[float]) -> float:
    """0 if one of them is."""
    # By logarithms: a product of many probabilities would underflow, and log(0) has no value.
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def over_prompts(rows: Rows, values: Iterable[float]) -> float | None:
    """The mean over prompts of the mean over their images."""
    # Prompts count alike, also where some images of one could not be scored.
    images: dict[int, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        images.setdefault(row["prompt"], []).append(value)
    return _mean(list(map(_mean, images.values()))) if images else None


def pooled(kind: str, values: Iterable[tuple[str, float]]) -> Found:
    """The mean of the values of each name."""
    named: dict[str, list[float]] = {}
    for name, value in values:
        named.setdefault(name, []).append(value)
    return {f"{kind}/{name}": _mean(named[name]) for name in sorted(named)}


def text_units(text: str, by_characters: bool) -> Counter[str]:
    """The words that LongText-Bench compares, without case and punctuation, or its characters, in which case counts."""
    kept = NOT_READ.sub("", text)
    # A Counter of a string counts its characters, that of a list its words.
    return Counter("".join(kept.split()) if by_characters else kept.lower().split())


def _grouped(kind: str, records: Records, rows: Rows, values: Sequence[float]) -> Found:
    """The mean over the prompts of each tag."""
    members: dict[str, tuple[list[dict[str, Any]], list[float]]] = {}
    for row, value in zip(rows, values):
        # A prompt with several tags counts for each of them.
        for tag in records[row["prompt"]].tags:
            own_rows, own_values = members.setdefault(tag, ([], []))
            own_rows.append(row)
            own_values.append(value)
    return {f"{kind}/{tag}": over_prompts(*members[tag]) for tag in sorted(members)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _detail(rows: Rows, name: str) -> list[Any]:
    for row in rows:
        if name not in row:
            raise UserError(f"suite: a scored image has no {name}; score it with the suite's own reward (judge)")
    return [row[name] for row in rows]
