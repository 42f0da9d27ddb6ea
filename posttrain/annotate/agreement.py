"""How far people agree: with themselves, with each other and with the judges that made the pairs.

Answers about a pair are numbers: 1 where its `chosen` image was preferred, 0 where the other was, 0.5 for a tie.
Answers about a single image are 1 for faulty, 0 for fine, 0.5 for unsure. With p_o the share of equal answers, and
p_a(v) and p_b(v) the shares of each answer, Cohen's kappa (Cohen 1960, A coefficient of agreement for nominal scales)
is

    kappa = (p_o - p_e) / (1 - p_e),        p_e = sum over v of p_a(v) p_b(v).

Which of a pair's two images is called `chosen` says nothing about them that a coefficient of agreement may use, so
each pair is counted once in each order of its images. With shares of ties t_a and t_b that comes to
p_e = t_a t_b + (1 - t_a) (1 - t_b) / 2, and without ties kappa is 2 p_o - 1.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.annotate.answers import Choice
from posttrain.errors import counted
from posttrain.runs.progress import percent

MIN_PER_THIRD = 5  # pairs; a share of fewer is mostly chance


@dataclass(frozen=True)
class Agreement:
    """Agreement of two raters, or of one rater with themselves."""

    pairs: int
    """Pairs or images that both answered."""
    equal: float | None
    """Share of equal answers; None without pairs."""
    kappa: float | None
    """Above chance, 1 at most; None without pairs, or where both gave one and the same answer to all."""


def agreement(answers: Iterable[tuple[float, float]], of_images: bool = False) -> Agreement:
    """Agreement of two raters' answers about the same pairs, or single images, each 0, 0.5 or 1."""
    answers = list(answers)
    n = len(answers)
    if not n:
        return Agreement(0, None, None)
    equal = sum(a == b for a, b in answers) / n
    counted = answers
    if not of_images:
        # Each pair in the other order of its images too, so that kappa does not depend on which is called chosen.
        counted = answers + [(1 - a, 1 - b) for a, b in answers]
    counts_a, counts_b = map(Counter, zip(*counted))
    # p_e of the equation above.
    chance = sum(counts_a[value] * counts_b[value] for value in counts_a) / len(counted) ** 2
    # Where both gave one and the same answer to everything, kappa is 0 / 0.
    return Agreement(n, equal, None if chance == 1 else (equal - chance) / (1 - chance))


def votes(choices: Mapping[str, Sequence[Choice]]) -> dict[str, float]:
    """Share of people who preferred `chosen`, by pair, or called an image faulty, in [0, 1]; what all skipped is not in
    it.

    A person has one vote: who answered twice gives the mean of both answers.
    """
    by_pair: dict[str, list[float]] = defaultdict(list)
    for of_person in choices.values():
        # By person first, so that nobody gets more weight by answering a pair twice.
        own: dict[str, list[float]] = defaultdict(list)
        for choice in of_person:
            if choice.share is not None:
                own[choice.pair].append(choice.share)
        for pair, answers in own.items():
            by_pair[pair].append(statistics.fmean(answers))
    return {pair: statistics.fmean(shares) for pair, shares in by_pair.items()}


def report(choices: Mapping[str, Sequence[Choice]], margins: Mapping[str, float | None]) -> dict[str, Any]:
    """All figures, JSON-able. `margins` has every pair of the set: the judges' margin, or None where there is none.

    Where people are compared only their first answer to a pair counts; the second measures self-consistency. The
    majority, which is compared with the judges and exported, is of `votes`.
    """
    first = _first_answers(choices)
    people = []
    for name, answers in first.items():
        counts = Counter(choice.choice for choice in choices[name])
        # Of those with a side: who mostly presses one key is seen here.
        sided = counts["left"] + counts["right"]
        people.append(
            _person(name, choices[name], counts, of_images=False)
            | {
                "ties": counts["tie"],
                "left": counts["left"] / sided if sided else None,
                "judges": asdict(_judges(answers.values())),
            }
        )
    # The majority counts both answers of a person, as their mean.
    shares = votes(choices)
    return {
        "people": people,
        **_between(first, of_images=False),
        "judges": asdict(_judges(shares.values())),
        "judges_by_margin": _by_margin(shares, margins),
        "pairs": len(margins),
        "answered": len(shares),
        "undecided": list(shares.values()).count(0.5),
        "against_judges": sum(share < 0.5 for share in shares.values()),
    }


def report_marks(choices: Mapping[str, Sequence[Choice]], images: int) -> dict[str, Any]:
    """All figures of marks of single images, JSON-able; `images` is how many there are. As in `report`, people are
    compared by their first answers, and the second ones measure self-consistency."""
    first = _first_answers(choices)
    people = []
    for name in first:
        counts = Counter(choice.choice for choice in choices[name])
        # Shares are of decided answers: "unsure" says nothing about how strict a person is.
        decided = counts["faulty"] + counts["fine"]
        people.append(
            _person(name, choices[name], counts, of_images=True)
            | {"unsure": counts["unsure"], "faulty": counts["faulty"] / decided if decided else None}
        )
    shares = votes(choices)
    return {
        "people": people,
        **_between(first, of_images=True),
        "images": images,
        "answered": len(shares),
        "undecided": list(shares.values()).count(0.5),
        "faulty": sum(share > 0.5 for share in shares.values()),
    }


def _first_answers(choices: Mapping[str, Sequence[Choice]]) -> dict[str, dict[str, float]]:
    """Person -> pair or image -> first answer, for everyone who answered anything."""
    return {name: _answers(of_person, again=False) for name, of_person in choices.items() if of_person}


def _person(name: str, choices: Sequence[Choice], counts: Counter[str], of_images: bool) -> dict[str, Any]:
    """What both reports say of one person; there is at least one choice, and `counts` of each answer."""
    first, second = _answers(choices, again=False), _answers(choices, again=True)
    twice = [(first[item], second[item]) for item in first.keys() & second.keys()]
    return {
        "name": name,
        "answers": len(choices),
        "skips": counts["skip"],
        "median_seconds": statistics.median(choice.seconds for choice in choices),
        "repeats": asdict(agreement(twice, of_images)),
    }


def mark_lines(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{figures['answered']} of {counted(figures['images'], 'image')} marked: {figures['faulty']} faulty,"
        f" {figures['undecided']} undecided"
    ]
    for p in figures["people"]:
        answers, skips = counted(p["answers"], "answer"), counted(p["skips"], "skip")
        lines.append(
            f"  {p['name']}: {answers} ({p['unsure']} unsure, {skips}), median"
            f" {p['median_seconds']:.1f} s, faulty in {percent(p['faulty'])}; with self {_text(p['repeats'])}"
        )
    return lines + _lines_between(figures)


def report_lines(figures: Mapping[str, Any]) -> list[str]:
    answered = f"{figures['answered']} of {counted(figures['pairs'], 'pair')} answered"
    lines = [f"{answered}, {figures['undecided']} of them undecided"]
    for p in figures["people"]:
        answers, skips = counted(p["answers"], "answer"), counted(p["skips"], "skip")
        lines.append(
            f"  {p['name']}: {answers} ({counted(p['ties'], 'tie')}, {skips}), median"
            f" {p['median_seconds']:.1f} s, left in {percent(p['left'])}; with self {_text(p['repeats'])};"
            f" with judges {_text(p['judges'])}"
        )
    lines += _lines_between(figures)
    lines.append(f"  majority with judges: {_text(figures['judges'])}")
    for third in figures["judges_by_margin"]:
        lines.append(f"    margin {third['from']:.3g} to {third['to']:.3g}: {_text(third)}")
    return lines


def _between(first: Mapping[str, Mapping[str, float]], of_images: bool) -> dict[str, Any]:
    """Agreement of every two people, and of all of them pooled."""
    between, pooled = [], []
    for a, b in itertools.combinations(first, 2):
        both = [(first[a][pair], first[b][pair]) for pair in first[a].keys() & first[b].keys()]
        between.append({"people": [a, b], **asdict(agreement(both, of_images))})
        # Both orders: which of two people is named first means nothing.
        pooled += both + [(y, x) for x, y in both]
    together = agreement(pooled, of_images)
    return {"between": between, "together": {**asdict(together), "pairs": together.pairs // 2}}  # each was there twice


def _lines_between(figures: Mapping[str, Any]) -> list[str]:
    lines = [f"  {' and '.join(b['people'])}: {_text(b)}" for b in figures["between"]]
    if len(figures["between"]) > 1:
        lines.append(f"  between people, together: {_text(figures['together'])}")
    return lines


def _answers(choices: Iterable[Choice], again: bool) -> dict[str, float]:
    return {c.pair: c.share for c in choices if c.again == again and c.share is not None}


def _judges(shares: Iterable[float]) -> Agreement:
    """Agreement with judges who always prefer `chosen`: they never tie, so ties are left out."""
    return agreement((float(share > 0.5), 1.0) for share in shares if share != 0.5)


def _by_margin(shares: Mapping[str, float], margins: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Agreement with the judges in each third of the decided pairs by margin, smallest first; none if too few."""
    decided = []
    for pair, margin in margins.items():
        # 0.5: a pair that nobody answered is as undecided as one that divides people evenly.
        if margin is not None and shares.get(pair, 0.5) != 0.5:
            decided.append((margin, shares[pair]))
    n = len(decided)
    if n < 3 * MIN_PER_THIRD:
        return []
    decided.sort()
    rows = []
    for k in range(3):
        third = decided[n * k // 3 : n * (k + 1) // 3]
        agreed = _judges(share for _, share in third)
        rows.append({"from": third[0][0], "to": third[-1][0], **asdict(agreed)})
    return rows


def _text(agreed: Mapping[str, Any]) -> str:
    if agreed["equal"] is None:
        return "- (no pairs)"
    kappa = "-" if agreed["kappa"] is None else f"{agreed['kappa']:.2f}"
    return f"{percent(agreed['equal'])} of {agreed['pairs']} (kappa {kappa})"
