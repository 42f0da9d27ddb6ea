"""A sample of the malformed inputs of fuzz.py; `make chaos` takes ten times as many, and others."""

import pytest

from tests.helpers import fuzz


@pytest.mark.parametrize(("kind", "share"), [(kind, share) for kind, (_, share) in fuzz.KINDS.items()])
def test_malformed_inputs_end_in_one_line(kind, share, tmp_path):
    wrong = {number: found for number, found in fuzz.inputs(kind, round(200 * share), tmp_path) if found not in (0, 1)}
    assert not wrong, f"python -m tests.helpers.fuzz {kind} {next(iter(wrong))}: {next(iter(wrong.values()))!r}"
