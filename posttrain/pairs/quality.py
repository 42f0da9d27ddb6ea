"""The report on a set of pairs: quality.json, the same in words, and an image of some pairs.

    quality.json   {pairs, candidates, on_policy_share, dropped, sources: {name: {pairs, share, on_policy, candidates,
                   dropped, agreement, distance, margin}}, margin_edges, scores, prompts}
    pairs.png      pairs from the whole set, the chosen image on the left

Everything comes from the journal, so it does not depend on how often a run was stopped. Agreement is whether a reward
puts the chosen image higher, over all candidates with a known order, dropped ones and held-out rewards included. Where
rewards rank a group, those that decide of course agree with their own order.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from posttrain.errors import counted
from posttrain.pairs import planning
from posttrain.pairs.config import PairsConfig
from posttrain.pairs.planning import KEPT
from posttrain.preferences.dataset import Preference, read_preferences
from posttrain.runs.files import replace_text
from posttrain.runs.progress import grid_image, percent
from posttrain.training.advantages import FLAT

EDGES = np.linspace(-1, 1, 21).round(1).tolist()
"""Edges of the histogram of margins. Values beyond the ends count in the first and last bin."""
SHOWN = 24
"""Pairs in pairs.png."""
LARGEST = 256
"""Pixels of the longer side of an image in pairs.png."""


def quality(config: PairsConfig, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report, from the lines of the journal."""
    total = sum(map(planning.kept, entries))
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    pairs_of_prompt: Counter[int] = Counter()
    candidates = cut = 0
    for entry in entries:
        by_source[entry["source"]].append(entry)
        for prompt, fate in zip(entry["prompts"], entry["fates"]):
            if fate == KEPT:
                pairs_of_prompt[prompt] += 1
        candidates += len(entry["fates"])
        cut += entry["cut"]
    sources: dict[str, dict[str, Any]] = {}
    inside = 0
    for source in config.sources:
        row = _source(by_source[source.name], total) | {"on_policy": config.on_policy(source)}
        inside += row["pairs"] if row["on_policy"] else 0
        sources[source.name] = row
    return {
        "pairs": total,
        "candidates": candidates,
        "on_policy_share": inside / total if total else None,
        "dropped": _dropped(entries),
        "sources": sources,
        "margin_edges": EDGES,
        "scores": _scores(config, entries),
        "prompts": {"used": len(pairs_of_prompt), "most_pairs": max(pairs_of_prompt.values(), default=0), "cut": cut},
    }


def _source(entries: Sequence[dict[str, Any]], total: int) -> dict[str, Any]:
    pairs = candidates = unknown = 0
    margins: list[float] = []
    distances: list[float] = []
    for entry in entries:
        pairs += planning.kept(entry)
        candidates += len(entry["fates"])
        # Distances are of all candidates, margins of those that were kept.
        distances += [distance for distance in entry["distances"] if distance is not None]
        for margin, fate in zip(entry["margins"], entry["fates"]):
            if fate == KEPT and margin is None:  # no reward scored both images
                unknown += 1
            elif fate == KEPT:
                margins.append(margin)
    counts = np.histogram(np.clip(margins, EDGES[0], EDGES[-1]), EDGES)[0].tolist()
    quantiles = np.quantile(distances, (0.1, 0.5, 0.9)).tolist() if distances else []
    return {
        "pairs": pairs,
        "share": pairs / total if total else None,
        "candidates": candidates,
        "dropped": _dropped(entries),
        "agreement": _agreement(entries),
        "distance": dict(zip(("p10", "median", "p90"), quantiles)),
        "margin": {"counts": counts, "unknown": unknown},
    }


def _dropped(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Candidates that make no pair, by the reason."""
    fates: Counter[str] = Counter()
    for entry in entries:
        fates.update(entry["fates"])
    del fates[KEPT]
    return dict(sorted(fates.items()))


def _agreement(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each reward: on how many candidates it agrees, disagrees, sees no difference (tie), or has not scored both
    images; and the share of agreement where it sees a difference, of all candidates and of the kept ones."""
    table: dict[str, Counter[str]] = {}
    for entry in entries:
        for name, differences in entry.get("differences", {}).items():
            counts = table.setdefault(name, Counter())
            for difference, fate, distance in zip(differences, entry["fates"], entry["distances"]):
                # Without a distance there is no pair: nobody knows which image should be higher.
                if distance is None:
                    continue
                outcome = _outcome(difference)
                counts[outcome] += 1
                if fate == KEPT:
                    counts[f"kept {outcome}"] += 1
    rows: dict[str, dict[str, Any]] = {}
    for name, counts in table.items():
        # An outcome that never came up is 0 in the report.
        rows[name] = {outcome: counts[outcome] for outcome in ("agree", "disagree", "tie", "missing")}
        rows[name]["share"] = _share(counts["agree"], counts["disagree"])
        rows[name]["share_of_kept"] = _share(counts["kept agree"], counts["kept disagree"])
    return rows


def _outcome(difference: float | None) -> str:
    if difference is None:
        return "missing"
    if abs(difference) < FLAT:
        return "tie"
    return "agree" if difference > 0 else "disagree"


def _share(agree: int, disagree: int) -> float | None:
    return agree / (agree + disagree) if agree + disagree else None


def _scores(config: PairsConfig, entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """For each reward: images that it was asked about, those without a score, and those whose score failed."""
    table = {spec.name: {"images": 0, "missing": 0, "failed": 0} for spec in config.rewards}
    for entry in entries:
        if "images" not in entry:  # a block that no reward scored
            continue
        for name, counts in table.items():
            counts["images"] += entry["images"]
            counts["missing"] += entry["missing"][name]
            counts["failed"] += entry["failed"][name]
    return table


# ---- write ------------------------------------------------------------------------------------------------


def write_report(config: PairsConfig, entries: Sequence[dict[str, Any]]) -> None:
    """Writes quality.json and prints it in words."""
    report, path = quality(config, entries), Path(config.output) / "quality.json"
    replace_text(path, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print("\n".join(in_words(report)))


def in_words(report: dict[str, Any]) -> list[str]:
    """The report as lines for a terminal."""
    prompts = report["prompts"]
    lines = [
        f"{counted(report['pairs'], 'pair')} of {counted(report['candidates'], 'candidate')};"
        f" {percent(report['on_policy_share'])} hold an image of the policy; {counted(prompts['used'], 'prompt')},"
        f" at most {counted(prompts['most_pairs'], 'pair')} of one"
    ]
    if prompts["cut"]:
        lines.append(f"warning: longer than max_tokens and cut: {counted(prompts['cut'], 'prompt')}")
    for name, source in report["sources"].items():
        dropped = ", ".join(f"{count} {fate}" for fate, count in source["dropped"].items()) or "none"
        policy = ", on-policy" if source["on_policy"] else ""
        kept = f"{counted(source['pairs'], 'pair')} ({percent(source['share'])}{policy})"
        lines.append(f"{name}: {kept}; dropped: {dropped}")
        for reward, a in source["agreement"].items():
            lines.append(
                f"    {reward:<16} agrees on {a['agree']}, disagrees on {a['disagree']}, sees no difference in"
                f" {a['tie']}, did not score {a['missing']}: {percent(a['share'])}; of kept pairs"
                f" {percent(a['share_of_kept'])}"
            )
        counts = source["margin"]["counts"]
        if any(counts):
            bins = [f"{low:+.1f}:{n}" for low, n in zip(EDGES, counts) if n]
            lines.append(f"    margin from      {'  '.join(bins)}")
    for name, s in report["scores"].items():
        if s["missing"]:
            images = counted(s["images"], "image")
            lines.append(f"{name}: {s['missing']} of {images} without a score, {s['failed']} failed")
    return lines


def write_sheet(folder: Path) -> None:
    """Writes pairs.png from a finished set."""
    pairs = read_preferences(folder)
    rows = np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).round().astype(int)
    shown = [pair for i in rows if isinstance(pair := pairs[int(i)], Preference)]
    # The largest image decides the size of a place: images of a set may differ in shape.
    width, height = np.max([_resized(pair.chosen).size for pair in shown], axis=0).tolist()
    # White, so that a pair of another shape is seen to be smaller; 4 pixels between the images of a pair.
    canvas = np.full((len(shown), height, 2 * width + 4, 3), 255, np.uint8)
    captions = []
    for i, pair in enumerate(shown):
        for x, image in ((0, pair.chosen), (width + 4, pair.rejected)):
            small = np.asarray(_resized(image))
            canvas[i, : small.shape[0], x : x + small.shape[1]] = small
        margin = "" if pair.margin is None else f"{pair.margin:+.2f} "
        chosen, rejected = pair.chosen_policy.rsplit("/", 1)[-1], pair.rejected_policy.rsplit("/", 1)[-1]
        captions.append(f"{margin}{chosen} > {rejected}: {pair.prompt}")
    columns = 3
    sheet = grid_image(canvas, -(-len(shown) // columns), columns, captions)
    sheet.save(folder / "pairs.png")


def _resized(image: Image.Image) -> Image.Image:
    """Large images reduced to LARGEST; small ones enlarged by a whole factor, which keeps their pixels sharp."""
    side = max(image.size)
    if side > LARGEST:
        return image.resize([max(1, round(n * LARGEST / side)) for n in image.size], Image.Resampling.LANCZOS)
    factor = max(1, LARGEST // 4 * 3 // side)  # up to 192 pixels: K2-nano's 64 become three times as large
    return ImageOps.scale(image, factor, Image.Resampling.NEAREST)
