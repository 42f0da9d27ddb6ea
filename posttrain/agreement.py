"""How far people agree: with themselves, with each other and with the judges that made the pairs.

Answers about a pair are numbers: 1 where its `chosen` image was preferred, 0 where the other was, 0.5 for a tie.
Which of the two images is called `chosen` says nothing about them that a coefficient of agreement may use, so chance
is taken over both names: with shares of ties t_a and t_b, two who answer independently agree by

    p_e = t_a t_b + (1 - t_a) (1 - t_b) / 2,        kappa = (p_o - p_e) / (1 - p_e),

where p_o is the share of equal answers. That is Cohen's kappa (Cohen 1960, A coefficient of agreement for nominal
scales) of the table in which each pair is counted once in each order of its images. Without ties it is 2 p_o - 1.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.annotations import Choice

LEAST_PER_THIRD = 5  # pairs; below it a share by margin says nothing


@dataclass(frozen=True)
class Agreement:
    """Of two raters, or of two times of one."""

    pairs: int
    """Answered by both."""
    equal: float | None
    """Share of equal answers; None without pairs."""
    kappa: float | None
    """Above chance, 1 at most; None without pairs, or where both called all of them ties."""


def agreement(answers: Iterable[tuple[float, float]]) -> Agreement:
    """Of two raters' answers about the same pairs, each 0, 0.5 or 1."""
    answers = list(answers)
    n = len(answers)
    if not n:
        return Agreement(0, None, None)
    equal = sum(a == b for a, b in answers) / n
    ties_a, ties_b = (sum(pair[i] == 0.5 for pair in answers) / n for i in (0, 1))
    chance = ties_a * ties_b + (1 - ties_a) * (1 - ties_b) / 2
    return Agreement(n, equal, None if chance == 1 else (equal - chance) / (1 - chance))


def votes(choices: Mapping[str, Sequence[Choice]]) -> dict[str, float]:
    """Share of people who preferred `chosen`, by pair, in [0, 1]; pairs that all skipped are not in it.

    A person has one vote: who answered a pair twice gives the mean of both answers.
    """
    by_pair: dict[str, list[float]] = defaultdict(list)
    for made in choices.values():
        own: dict[str, list[float]] = defaultdict(list)
        for choice in made:
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
    first = {name: _answers(made, again=False) for name, made in choices.items() if made}
    people = []
    for name, answers in first.items():
        made, second = choices[name], _answers(choices[name], again=True)
        sided = [choice.choice for choice in made if choice.choice in ("left", "right")]
        people.append(
            {
                "name": name,
                "answers": len(made),
                "ties": sum(choice.choice == "tie" for choice in made),
                "skips": sum(choice.choice == "skip" for choice in made),
                "left": sided.count("left") / len(sided) if sided else None,
                "median_seconds": statistics.median(choice.seconds for choice in made),
                "repeats": asdict(agreement((answers[pair], second[pair]) for pair in answers.keys() & second.keys())),
                "judges": asdict(_judges(answers.values())),
            }
        )
    between, pooled = [], []
    for a, b in itertools.combinations(first, 2):
        both = [(first[a][pair], first[b][pair]) for pair in first[a].keys() & first[b].keys()]
        between.append({"people": [a, b], **asdict(agreement(both))})
        pooled += both + [(y, x) for x, y in both]  # which of two people is named first means nothing
    together = agreement(pooled)
    shares = votes(choices)
    return {
        "people": people,
        "between": between,
        "together": {**asdict(together), "pairs": together.pairs // 2},
        "judges": asdict(_judges(shares.values())),
        "judges_by_margin": _by_margin(shares, margins),
        "pairs": len(margins),
        "answered": len(shares),
        "undecided": sum(share == 0.5 for share in shares.values()),
        "against_judges": sum(share < 0.5 for share in shares.values()),
    }


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The report as text."""
    said = [f"{figures['answered']} of {figures['pairs']} pairs answered, {figures['undecided']} of them undecided"]
    for p in figures["people"]:
        said.append(
            f"  {p['name']}: {p['answers']} answers ({p['ties']} ties, {p['skips']} skips), median"
            f" {p['median_seconds']:.1f} s, left in {_percent(p['left'])}; with self {_says(p['repeats'])};"
            f" with judges {_says(p['judges'])}"
        )
    said += [f"  {' and '.join(b['people'])}: {_says(b)}" for b in figures["between"]]
    if len(figures["between"]) > 1:
        said.append(f"  between people, together: {_says(figures['together'])}")
    said.append(f"  majority with judges: {_says(figures['judges'])}")
    for third in figures["judges_by_margin"]:
        said.append(f"    margin {third['from']:.3g} to {third['to']:.3g}: {_says(third)}")
    return said


def _answers(made: Iterable[Choice], again: bool) -> dict[str, float]:
    return {c.pair: c.share for c in made if c.again == again and c.share is not None}


def _judges(shares: Iterable[float]) -> Agreement:
    """With judges who prefer `chosen` always: they never tie, so ties are left out."""
    return agreement((float(share > 0.5), 1.0) for share in shares if share != 0.5)


def _by_margin(shares: Mapping[str, float], margins: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Agreement with the judges in each third of the decided pairs by margin, smallest first; none if too few."""
    known = sorted((margin, shares[pair]) for pair, margin in margins.items()
                   if margin is not None and shares.get(pair, 0.5) != 0.5)  # fmt: skip
    if len(known) < 3 * LEAST_PER_THIRD:
        return []
    cuts = [len(known) * k // 3 for k in range(4)]
    thirds = [known[a:b] for a, b in zip(cuts, cuts[1:])]
    return [{"from": third[0][0], "to": third[-1][0], **asdict(_judges(s for _, s in third))} for third in thirds]


def _says(found: Mapping[str, Any]) -> str:
    if found["equal"] is None:
        return "- (no pairs)"
    kappa = "-" if found["kappa"] is None else f"{found['kappa']:.2f}"
    return f"{_percent(found['equal'])} of {found['pairs']} (kappa {kappa})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
