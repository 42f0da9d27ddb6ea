"""Damaged LoRA files and pipelines: read as stock diffusers reads them, or refused. POSTTRAIN_FUZZ is their number."""

import os

import pytest

from tests.helpers import fuzz_loading

COUNT = int(os.environ.get("POSTTRAIN_FUZZ", "40"))


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return fuzz_loading.Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.long
@pytest.mark.timeout(60 + 3 * COUNT)
@pytest.mark.parametrize("kind", list(fuzz_loading.KINDS))
def test_damaged_files_are_read_right_or_refused(fuzz, kind, tmp_path):
    before = fuzz.compared
    outcomes = fuzz_loading.inputs(fuzz, kind, COUNT, tmp_path)
    wrong = {seed: found for seed, found in outcomes.items() if isinstance(found, Exception)}
    first = next(iter(wrong), None)
    assert not wrong, f"{len(wrong)} of {COUNT}: python -m tests.helpers.fuzz_loading {kind} {first}: {wrong[first]!r}"
    # Some of each, or the damage is none, or all of it.
    kinds = list(outcomes.values())
    assert COUNT < 20 or fuzz.compared > before
    assert COUNT < 20 or 0.05 * COUNT < kinds.count(fuzz_loading.READ) < 0.7 * COUNT
