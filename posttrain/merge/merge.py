"""Merging: what several runs, adapters or whole models change of one base, in one checkpoint or model.

    posttrain merge runs/words:0.5 runs/counts:0.5 --output runs/both
    posttrain merge a.safetensors b.safetensors --method ties --rank 32 --model.path RAW --output runs/both
    posttrain merge runs/a --rank 8 --output runs/smaller

Linear: W = W_base + sum of w_i (W_i - W_base), task arithmetic (arXiv:2212.04089). Adapters keep to their factors: all
ranks beside each other are exactly the sum. A whole model among the parents, or TIES without a rank, makes a whole
model. Then the held-out prompts of each run are drawn, to see what is kept of its gain (evaluate.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.export.model_card import LEAST_KEPT
from posttrain.log import log
from posttrain.merge import adapters, evaluate, report, whole
from posttrain.merge.config import MergeConfig
from posttrain.merge.parents import Family, read
from posttrain.merge.report import Layer
from posttrain.runs.files import replace_text, replacing_directory
from posttrain.runs.guard import check_new
from posttrain.runs.run import peak_memory

CARD = "merge.json"


def merge(config: MergeConfig) -> None:
    """Writes `config.output` and prints what was merged and kept. Raises UserError before anything large is read for
    parents that do not go together, and for held-out prompts or rewards that cannot be had."""
    output = Path(config.output)
    check_new(output)
    family = read(config)
    # TIES keeps single entries of a matrix, so its result has full rank unless an SVD brings it to a lower one.
    keeps_factors = config.method == "linear" or config.rank is not None
    makes_adapter = keeps_factors and all(parent.is_adapter for parent in family.parents)
    if not makes_adapter and config.rank is not None:
        raise UserError(
            "rank: is for adapters, and there is a whole model among the parents; leave it out, and bring the result to"
            " a rank with posttrain extract"
        )
    if makes_adapter and config.dtype is not None:
        raise UserError("dtype: is of a whole model; an adapter is in float32 anyway: leave it out")
    heldout = evaluate.heldout(family, config) if config.evaluate else []
    facts: dict[str, Any] = {
        "parents": [parent.describe() for parent in family.parents],
        "method": config.method,
        "base": family.model.path,
        "shared": family.shared,
    }
    if config.method == "ties":
        facts |= {"density": config.density, "scale": config.scale}
    # Before the merge, which may take long.
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {output.parent} cannot be made: {error.strerror}; choose another name") from error
    write = _adapter if makes_adapter else _whole
    layers = write(family, config, output, facts)
    _print(family, config, layers)
    if heldout:
        try:
            rows = evaluate.retention(family, config, heldout, output, makes_adapter)
        except UserError as error:
            raise UserError(f"{output} is written, but what it keeps cannot be measured: {error}") from error
        # Once more, with what was measured on the written files.
        _write(output, facts | {"kept": rows}, layers)
        print(evaluate.table(rows))
        _warn_of_losses(rows, config.keep)


def _adapter(family: Family, config: MergeConfig, output: Path, facts: dict[str, Any]) -> Mapping[str, Layer]:
    pairs = adapters.by_layer(family)
    if config.rank is not None and config.method == "linear":
        adapters.check_rank(pairs, config.rank)
    factors, layers = adapters.combine(pairs, family.weights, config, Processes().device)
    with replacing_directory(output) as folder:
        adapters.save(family, factors, folder, facts)
        _write(folder, facts, layers)
    rank = max(layer.rank or 0 for layer in layers.values())  # a layer that few parents have is narrower
    print(f"posttrain: wrote {output}, an adapter of rank {rank} on {family.model.path}")
    if config.rank is not None:
        print(report.errors(layers))
        if (error := report.overall(layers)["error"]) > report.HIGH_ERROR:
            log.warning(f"rank {config.rank} loses {error:.2f} of the merged change; raise rank, or leave it out")
    return layers


def _whole(family: Family, config: MergeConfig, output: Path, facts: dict[str, Any]) -> Mapping[str, Layer]:
    # A process's peak never falls, so what it was before is told beside it.
    before = peak_memory()["peak_ram_gib"]
    with replacing_directory(output) as folder:
        result = whole.write(family, config, folder, Processes().device)
        share, least, least_share = result.rounding()
        peak = peak_memory()["peak_ram_gib"]
        facts |= {"rounding": {"kept": share, "tensor": least, "least": least_share}, "peak_ram_gib": peak}
        _write(folder, facts, result.layers)
    print(f"posttrain: wrote {output}, a whole model; peak memory {peak:.2f} GiB, {before:.2f} before it began")
    print(f"rounding keeps {share:.3f} of the change ({least_share:.3f} in {least})")
    if share < LEAST_KEPT:
        log.warning(f"rounding keeps {share:.3f} of the merged change; --dtype float32 keeps all of it")
    return result.layers


def _warn_of_losses(rows: Sequence[Mapping[str, Any]], keep: float) -> None:
    for row in rows:
        if row["loses"]:
            log.warning(
                f"the merge keeps {row['kept']:.2f} of what {row['parent']} gained in {row['reward']}, less than keep"
                f" ({keep:g})"
            )


def _write(folder: Path, facts: Mapping[str, Any], layers: Mapping[str, Layer]) -> None:
    data = {**facts, "overall": report.overall(layers), "layers": report.as_json(layers)}
    replace_text(folder / CARD, json.dumps(data, indent=1) + "\n")


def _print(family: Family, config: MergeConfig, layers: Mapping[str, Layer]) -> None:
    names = [parent.name for parent in family.parents]
    print(report.table(names, family.weights, layers))
    if family.shared:
        stages = [stage["path"] for stage in family.shared]
        print(f"{counted(len(stages), 'earlier stage')} that all share, once and in full: {', '.join(stages)}")
    overall = report.overall(layers)
    for name, norm in zip(names, overall["norms"]):
        if norm == 0:
            log.warning(f"parents: {name} changes no weight of the base, so it adds nothing")
    conflict = overall["conflict"]
    if len(names) > 1 and config.method == "linear" and conflict is not None and conflict > report.HIGH_CONFLICT:
        log.warning(f"the parents pull against each other (sign conflict {conflict:.2f}); try --method ties")
