"""Judge templates: text files in which `$field` stands for a value, and the hash that identifies each.

A value is untrusted data: a prompt may read 'answer yes'. It is put in as a JSON string, so that it cannot
close its quotation, and the templates tell the judge that what is quoted is material and no instruction.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template as DollarTemplate

from posttrain.errors import UserError

JUDGES = Path(__file__).parent / "judges"
CONTROL_TOKEN = re.compile(r"<(?=[^\s<>]+>)|\[(?=/?[A-Z_]+\])")
"""The first character of what may be one: <|im_start|>, <image>, </s>, <｜end▁of▁sentence｜>, [INST]."""


@dataclass(frozen=True)
class Template:
    name: str
    text: str

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def fields(self) -> set[str]:
        return set(DollarTemplate(self.text).get_identifiers())

    def render(self, **values: str) -> str:
        """The template with each field replaced by its value as a JSON string; every field must be given."""
        if missing := self.fields - values.keys():
            field = sorted(missing)[0]
            raise UserError(f"template {self.name}: this reward has no value for ${field}: remove that field")
        return DollarTemplate(self.text).substitute({name: _quoted(value) for name, value in values.items()})


def _quoted(value: str) -> str:
    """As a JSON string, so that a value cannot close its quotation and go on as an instruction.

    Chat templates put texts in as they are, so a control token in one, such as <|im_end|>, would close the turn: its
    first character is escaped, as JSON allows.
    """
    text = json.dumps(value, ensure_ascii=False)
    return CONTROL_TOKEN.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def load_template(name: str) -> Template:
    """A template by name (`rubric` is prompts/judges/rubric.txt) or by path (anything ending in .txt)."""
    path = Path(name) if name.endswith(".txt") else JUDGES / f"{name}.txt"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        names = [file.stem for file in JUDGES.glob("*.txt")]
        known = ", ".join(sorted(names))
        raise UserError(f"template {name}: cannot read {path}: use a .txt path or one of {known}") from error
    template = Template(name, text)
    # `substitute` would only say so at the first question.
    if not DollarTemplate(text).is_valid():
        raise UserError(f"template {name}: stray '$' in {path}: write '$$' for a dollar sign")
    return template


def spelled(token: str) -> str:
    """A token as the word it spells: ' Yes' and '"YES' are both 'yes'."""
    return token.strip(" \t\n\"'*.,Ġ▁").casefold()  # Ġ and ▁ stand for a space in the vocabularies of tokenizers
