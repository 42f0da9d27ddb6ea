"""How good a set of pairs should be: quality.json, the same in words, and a picture of some pairs.

    quality.json   {pairs, candidates, on_policy_share, dropped, sources: {name: {pairs, share, on_policy, candidates,
                   dropped, agreement, distance, margin}}, margin_edges, scores, prompts}
    pairs.png      pairs from all over the set, the chosen picture on the left

Everything comes from the journal, so it is the same however often a run was stopped. Agreement is whether a reward puts
the chosen picture higher, over all candidates whose pair is known, those that were dropped too; rewards that are held
out are measured as well. Where rewards rank a group, those that decide agree with the order they made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.pairs import planning
from posttrain.pairs.config import PairsConfig
from posttrain.pairs.planning import KEPT
from posttrain.preferences.dataset import Preference, read_preferences
from posttrain.runs.files import replace_text
from posttrain.runs.progress import grid_image
from posttrain.training.advantages import FLAT

EDGES = [round(-1 + 0.1 * i, 1) for i in range(21)]
"""Of the margins' histogram; what lies beyond the ends counts in the last bins."""
SHOWN = 24
"""Pairs in pairs.png."""
LARGEST = 256
"""Pixels of their longer side there."""


def quality(config: PairsConfig, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report, from the journal's lines."""
    total = sum(planning.kept(entry) for entry in entries)
    sources = {}
    for source in config.sources:
        own = [entry for entry in entries if entry["source"] == source.name]
        sources[source.name] = _source(own, total) | {"on_policy": planning.on_policy(config, source)}
    inside = sum(figures["pairs"] for figures in sources.values() if figures["on_policy"])
    places = [p for entry in entries for p, fate in zip(entry["prompts"], entry["fates"]) if fate == KEPT]
    return {
        "pairs": total,
        "candidates": sum(len(entry["fates"]) for entry in entries),
        "on_policy_share": inside / total if total else None,
        "dropped": _dropped(entries),
        "sources": sources,
        "margin_edges": EDGES,
        "scores": _missing(config, entries),
        "prompts": {
            "used": len(set(places)),
            "most_pairs": max(Counter(places).values(), default=0),
            "cut": sum(entry["cut"] for entry in entries),
        },
    }


def _source(entries: Sequence[dict[str, Any]], total: int) -> dict[str, Any]:
    pairs = sum(planning.kept(entry) for entry in entries)
    fates = [fate for entry in entries for fate in entry["fates"]]
    margins = [m for entry in entries for m, fate in zip(entry["margins"], entry["fates"]) if fate == KEPT]
    known = [m for m in margins if m is not None]
    distances = [d for entry in entries for d in entry["distances"] if d is not None]
    counts = np.histogram(np.clip(known, EDGES[0], EDGES[-1]), EDGES)[0].tolist()
    spread = dict(zip(("p10", "median", "p90"), np.quantile(distances, (0.1, 0.5, 0.9)).tolist() if distances else []))
    return {
        "pairs": pairs,
        "share": pairs / total if total else None,
        "candidates": len(fates),
        "dropped": _dropped(entries),
        "agreement": _agreement(entries),
        "distance": spread,
        "margin": {"counts": counts, "unknown": len(margins) - len(known)},
    }


def _dropped(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    fates = Counter(fate for entry in entries for fate in entry["fates"])
    return {fate: count for fate, count in sorted(fates.items()) if fate != KEPT}


def _agreement(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By reward: candidates on which it agrees, disagrees, sees no difference, or has not scored both; the share that
    agrees of those on which it sees one, for all candidates and for those that were kept."""
    table: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[tuple[float | None, bool]]] = {}
    for entry in entries:
        for name, values in entry.get("differences", {}).items():
            known = zip(values, entry["fates"], entry["distances"])
            rows.setdefault(name, []).extend((v, fate == KEPT) for v, fate, pair in known if pair is not None)
    for name, found in rows.items():
        signs = [(0 if v is None or abs(v) < FLAT else (1 if v > 0 else -1), v is None, kept) for v, kept in found]
        agree, disagree = (sum(sign == s for sign, _, _ in signs) for s in (1, -1))
        kept_agree, kept_disagree = (sum(sign == s and kept for sign, _, kept in signs) for s in (1, -1))
        missing = sum(m for _, m, _ in signs)
        table[name] = {
            "agree": agree,
            "disagree": disagree,
            "tie": len(signs) - agree - disagree - missing,
            "missing": missing,
            "share": _share(agree, disagree),
            "share_of_kept": _share(kept_agree, kept_disagree),
        }
    return table


def _share(agree: int, disagree: int) -> float | None:
    return agree / (agree + disagree) if agree + disagree else None


def _missing(config: PairsConfig, entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By reward: pictures asked about, without a score, and of those the ones whose score failed."""
    scored = [entry for entry in entries if "images" in entry]
    return {
        spec.name: {
            "images": sum(entry["images"] for entry in scored),
            "missing": sum(entry["missing"][spec.name] for entry in scored),
            "failed": sum(entry["failed"][spec.name] for entry in scored),
        }
        for spec in config.rewards
    }


# ---- write ------------------------------------------------------------------------------------------------


def write_report(config: PairsConfig, entries: Sequence[dict[str, Any]]) -> None:
    """Writes quality.json and prints it in words."""
    found, path = quality(config, entries), Path(config.output) / "quality.json"
    replace_text(path, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print("\n".join(in_words(found)))


def in_words(found: dict[str, Any]) -> list[str]:
    """The report as lines for a terminal."""
    prompts = found["prompts"]
    lines = [
        f"{found['pairs']} pairs of {found['candidates']} candidates; {_percent(found['on_policy_share'])} hold a"
        f" picture of the policy; {prompts['used']} prompts, at most {prompts['most_pairs']} pairs of one"
    ]
    if prompts["cut"]:
        lines.append(f"warning: {prompts['cut']} prompts were longer than max_tokens and are cut")
    for name, source in found["sources"].items():
        dropped = ", ".join(f"{count} {fate}" for fate, count in source["dropped"].items()) or "none"
        policy = ", on-policy" if source["on_policy"] else ""
        lines.append(f"{name}: {source['pairs']} pairs ({_percent(source['share'])}{policy}); dropped: {dropped}")
        for reward, a in source["agreement"].items():
            lines.append(
                f"    {reward:<16} agrees on {a['agree']}, disagrees on {a['disagree']}, sees no difference in"
                f" {a['tie']}, did not score {a['missing']}: {_percent(a['share'])}; of kept pairs"
                f" {_percent(a['share_of_kept'])}"
            )
        counts = source["margin"]["counts"]
        if any(counts):
            bins = [f"{low:+.1f}:{n}" for low, n in zip(EDGES, counts) if n]
            lines.append(f"    margin from      {'  '.join(bins)}")
    for name, s in found["scores"].items():
        if s["missing"]:
            lines.append(f"{name}: {s['missing']} of {s['images']} pictures without a score, {s['failed']} failed")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def write_sheet(folder: Path) -> None:
    """Writes pairs.png from a finished set."""
    pairs = read_preferences(folder)
    rows = np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).round().astype(int)
    shown = [pair for i in rows if isinstance(pair := pairs[int(i)], Preference)]
    height, width = (max(side) for side in zip(*(_small(pair.chosen).size[::-1] for pair in shown)))
    canvas = np.full((len(shown), height, 2 * width + 4, 3), 255, np.uint8)
    captions = []
    for i, pair in enumerate(shown):
        for x, image in ((0, pair.chosen), (width + 4, pair.rejected)):
            small = np.asarray(_small(image))
            canvas[i, : small.shape[0], x : x + small.shape[1]] = small
        margin = "" if pair.margin is None else f"{pair.margin:+.2f} "
        ways = " > ".join(policy.rsplit("/", 1)[-1] for policy in (pair.chosen_policy, pair.rejected_policy))
        captions.append(f"{margin}{ways}: {pair.prompt}")
    columns = 3
    sheet = grid_image(canvas, -(-len(shown) // columns), columns, captions)
    sheet.save(folder / "pairs.png")


def _small(image: Image.Image) -> Image.Image:
    """Small pictures enlarged by a whole factor to LARGEST at most, large ones reduced to it."""
    side = max(image.size)
    if side > LARGEST:
        return image.resize([max(1, round(n * LARGEST / side)) for n in image.size], Image.Resampling.LANCZOS)
    return image.resize([n * max(1, LARGEST // 4 * 3 // side) for n in image.size], Image.Resampling.NEAREST)
