"""Images, tables and sets of pairs; see tests/helpers/fuzz_images.py."""

import pytest

from tests.fuzz import COUNT
from tests.helpers import fuzz


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, on damaged EXIF data
@pytest.mark.parametrize("kind", fuzz.FILES)
def test_damaged_files_are_read_right_or_refused(kind, tmp_path):
    found = dict(fuzz.inputs(kind, COUNT, tmp_path))
    wrong = {number: error for number, error in found.items() if isinstance(error, BaseException)}
    assert not wrong, f"python -m tests.helpers.fuzz {kind} {next(iter(wrong))}: {next(iter(wrong.values()))!r}"
    assert sum(outcome is True for outcome in found.values()) == COUNT
