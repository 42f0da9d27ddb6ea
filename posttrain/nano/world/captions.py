"""Parses the captions of `scenes.describe` back into the statements that it gives.

A text contains another if its statements include those of the other, so whether an expansion keeps its prompt can be
checked without an image.
"""

from __future__ import annotations

import re

import numpy as np

from posttrain.nano.world import scenes
from posttrain.nano.world.scenes import BACKGROUNDS, COLOURS, COUNTS, PLACES, RELATIONS, SHAPES, SIZES, STYLES

OPENERS = ("draw ", "please draw ", "i want ", "can you make ", "show me ", "a picture of ")
REGISTERS = ("caption", "keywords", "request")

_name = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
_size = rf"(?:(?P<size>{'|'.join(SIZES)}) )?"
_place = "|".join(sum(PLACES, ()))
_OBJECT = re.compile(rf"an? {_size}(?P<name>{_name})(?: at the (?P<place>{_place}))?")
_COUNTED = re.compile(
    rf"(?P<count>{'|'.join(COUNTS[2:])}) {_size}(?P<name>{'|'.join(COLOURS)}) (?P<shapes>{'|'.join(SHAPES)})e?s"
)
_RELATION = re.compile(rf"(?P<first>an? [a-z ]+?) (?P<relation>{'|'.join(RELATIONS)}) (?P<second>an? [a-z ]+)")
_WORD = re.compile(r'the word "(?P<text>[A-Z]+)" and (?P<rest>.+)')


def statements(caption: str) -> set[str] | None:
    """The statements of a caption, worded as `Description.requirements`; None if it is not a caption of this world."""
    found: set[str] = set()
    subject: list[str] = []
    # Style and background may stand before or after the shapes; what is neither belongs to the shapes.
    for part in caption.split(", "):
        what, _, word = part.rpartition(" ")
        if (word, what in STYLES) == ("style", True) or (word, what in BACKGROUNDS) == ("background", True):
            if any(s.startswith(f"the {word} is") for s in found):  # two styles, or two backgrounds
                return None
            found.add(f"the {word} is {what}")
        else:
            subject.append(part)
    body = ", ".join(subject)
    if word := _WORD.fullmatch(body):
        found.add(f'the text reads "{word["text"]}"')
        body = word["rest"]
    subjects = _subject(body)
    return None if subjects is None else found | subjects


def _subject(body: str) -> set[str] | None:
    """The statements about the shapes; None if they cannot be parsed."""
    if counted := _COUNTED.fullmatch(body):
        name = f"{counted['name']} {counted['shapes']}"
        plural = body.rpartition(" ")[2]
        if plural != counted["shapes"] + ("es" if counted["shapes"] == "cross" else "s"):
            return None
        found = {f"there are exactly {counted['count']} {counted['name']} {plural}"}
        return found | ({f"the {name} is {counted['size']}"} if counted["size"] else set())
    if related := _RELATION.fullmatch(body):
        parts, relation = [related["first"], related["second"]], related["relation"]
    else:
        parts, relation = re.split(r", | and ", body), None
        if len(parts) == 2:
            return None  # two shapes always stand in a relation
    found: set[str] = set()
    names: list[str] = []
    for part in parts:
        o = _OBJECT.fullmatch(part)
        # "a" or "an" by the word that follows, as `describe` writes it.
        if o is None or not part.startswith(scenes.article(o["size"] or o["name"])):
            return None
        found.add(f"there is {scenes.article(o['name'])}")
        if o["size"]:
            found.add(f"the {o['name']} is {o['size']}")
        if o["place"]:
            found.add(f"the {o['name']} is at the {o['place']}")
        names.append(o["name"])
    if len(set(names)) < len(names):
        return None  # no two shapes of a scene are alike
    if relation:
        found.add(f"the {names[0]} is {relation} the {names[1]}")
    n = len(names)
    if n > 3:
        return None
    found.add(f"there {'is' if n == 1 else 'are'} exactly {COUNTS[n]} shape{'' if n == 1 else 's'}")
    return found


def reworded(prompt: str, register: str, rng: np.random.Generator) -> str:
    """A caption as a user might type it."""
    if register == "keywords":
        return re.sub(r"\b(an?|the) ", "", prompt)
    return str(rng.choice(OPENERS)) + prompt if register == "request" else prompt
