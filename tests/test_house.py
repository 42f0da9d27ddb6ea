"""The counters of tests.house on texts of known counts, and rules of the layout that no linter checks."""

import re
from pathlib import Path

from tests import house

TEXT = '''"""A module."""

import os  # why it is here

# A reason.
VALUES = [x for x in range(3)]
"""What they are: two lines
of a docstring."""


def short(a):  # noqa: ARG001
    """Documented."""
    return {k: v for k, v in a} | {"grpo": "# no comment"}


@decorated
class Thing:
    def method(self):
        return sum(x for x in self)
'''


def test_counts():
    """Comments: the two reasons, not the directive, not the string. Definitions: module, function, class, method."""
    found = house.count(TEXT)
    assert (found.lines, found.code) == (19, 8)
    assert (found.comprehensions, found.comments) == (3, 2)
    assert (found.functions, found.long) == (2, 0)
    assert (found.definitions, found.documented) == (4, 2)
    assert found.words == {"grpo"}


def test_long_functions_and_sums():
    body = "    x = 1\n" * 58
    edge, over = house.count(f"@d\ndef f():\n{body}"), house.count(f"@d\ndef f():\n    x = 1\n{body}")
    assert (edge.lines, edge.long) == (60, 0) and (over.lines, over.long) == (61, 1)
    both = edge + over
    assert (both.lines, both.functions, both.long, both.definitions) == (121, 2, 1, 4)


def test_alike():
    names = ["watch", "watches", "score", "store", "template", "templates", "run", "ran", "load", "roles", "load"]
    names += ["grpo", "gdpo"]
    pairs = [("ran", "run"), ("score", "store"), ("template", "templates"), ("watch", "watches")]
    assert sorted(house.alike(names)) == pairs


def test_largest_folder():
    paths = [Path("a/x.py"), Path("a/b/y.py"), Path("a/b/z.py"), Path("a/b/__init__.py"), Path("a/__init__.py")]
    assert house.largest(paths) == "2 (a/b)"


def test_names_of_the_network_stand_in_model_alone():
    """What K2's parts are called is known to posttrain/model, so another network means another model package."""
    names = re.compile(r"\b(text_fusion|txt_in|txtfusion|img_in|transformer_blocks|final_layer|time_embed|to_out)\b")
    found = []
    for path in house.files_of(house.ROOT, house.PRODUCT):
        if path.parts[:2] != ("posttrain", "model") and names.search((house.ROOT / path).read_text()):
            found.append(str(path))
    assert found == []
