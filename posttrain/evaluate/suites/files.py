"""The public files of each suite as prompt records; what a suite's reward and figures need stands in their columns.

Each reader takes a path, or hf:NAME where the data has the same rows there, and raises UserError with file, row and
field. Questions are [question, right answer] pairs, `parents` are places of others of the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import UserError, counted
from prompts.parse import parse_json
from prompts.records import PromptRecord, read_prompts
from prompts.tables import open_table

ONEIG_FOLDER = "scripts/alignment/Q_D"
ONEIG_CLASSES = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Multilingualism": "multilingualism",
}
"""Categories that alignment is measured on, and the files of their questions."""
UNIGENBENCH = {
    "prompt_en": ("sub_dims_en", "Testpoints", "Testpoint Description"),
    "prompt_zh": ("sub_dims_zh", "考点", "考点对应描述"),
}
"""By the prompt's column: that of the test points, and its keys."""


def geneval2(path: str) -> list[PromptRecord]:
    """geneval2_data.jsonl: prompt, vqa_list, skills and atom_count of each line."""
    records = []
    for place, row in _rows(path):
        questions = _questions(row.get("vqa_list"), place, "vqa_list")
        skills = _texts(row.get("skills"), place, "skills")
        if len(skills) != len(questions):
            have = f"{counted(len(skills), 'skill')} for {counted(len(questions), 'question')}"
            raise UserError(f"{place}: skills: {have}; give one for each of vqa_list")
        atoms = row.get("atom_count")
        if not isinstance(atoms, int) or isinstance(atoms, bool):
            raise UserError(f"{place}: atom_count: is {atoms!r}; write a whole number")
        columns = {"questions": questions, "skills": skills, "atom_count": atoms}
        records.append(PromptRecord(_text(row.get("prompt"), place, "prompt"), columns=columns))
    return _unique(records, path)


def dpg(path: str) -> list[PromptRecord]:
    """dpg_bench.csv: one row for each question, those of a prompt under one item_id."""
    items: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for place, row in _rows(path):
        items.setdefault(_text(row.get("item_id"), place, "item_id"), []).append((place, row))
    records = []
    for name, rows in items.items():
        texts: dict[int, str] = {}
        parents: dict[int, list[int]] = {}
        categories = []
        for place, row in rows:
            number = _number(row.get("proposition_id"), place, "proposition_id")
            if number in texts:
                raise UserError(f"{place}: proposition_id: {name} has {number} twice; number its questions once each")
            texts[number] = _text(row.get("question_natural_language"), place, "question_natural_language")
            above = _text(row.get("dependency"), place, "dependency")
            parents[number] = [_number(part, place, "dependency") for part in above.split(",")]
            # `entity - whole (chair)`: the broad category, the detailed one, and what is meant.
            categories.append(_text(row.get("tuple"), place, "tuple").split("(")[0].strip())
        place, row = rows[0]
        columns = {**_dependent(texts, parents, f"{path}: item {name}"), "categories": categories}
        records.append(PromptRecord(_text(row.get("text"), place, "text"), id=name, columns=columns))
    return records


def unigenbench(path: str) -> list[PromptRecord]:
    """test_prompts_en.csv, test_prompts_zh.csv or their long forms: index, prompt and test points in JSON."""
    records = []
    for place, row in _rows(path):
        column = next((name for name in UNIGENBENCH if name in row), None)
        if column is None:
            raise UserError(f"{place}: has no {' or '.join(UNIGENBENCH)}; bring test_prompts_en.csv or a file like it")
        field, points_key, texts_key = UNIGENBENCH[column]
        prompt = _text(row[column], place, column)
        described = _json(row.get(field), place, field)
        if not isinstance(described, dict):
            raise UserError(f"{place}: {field}: is not an object; copy the file again")
        points = _texts(described.get(points_key), place, f"{field}.{points_key}")
        texts = _texts(described.get(texts_key), place, f"{field}.{texts_key}")
        if len(points) != len(texts):
            raise UserError(f"{place}: {field}: {texts_key} has another length than {points_key}; copy the file again")
        questions = []
        for point, text in zip(points, texts):
            # Descriptions may be a word of the prompt, such as a pronoun, so the prompt is quoted as well.
            asked = f"For the prompt {prompt!r}, does the image meet the test point {point!r}, which is {text!r} there?"
            questions.append([asked, "yes"])
        columns = {"questions": questions, "points": points}
        records.append(PromptRecord(prompt, id=_text(row.get("index"), place, "index"), columns=columns))
    return _unique(records, path)


def oneig(path: str) -> list[PromptRecord]:
    """OneIG-Bench.csv or OneIG-Bench-ZH.csv in a copy of its repository, whose folder scripts/alignment/Q_D has the
    questions. Prompts of categories without alignment are left out."""
    records: list[PromptRecord] = []
    asked: dict[str, Any] = {}
    for place, row in _rows(path):
        category = ONEIG_CLASSES.get(_text(row.get("category"), place, "category"))
        if category is None:
            continue
        column = "prompt_en" if "prompt_en" in row else "prompt_cn"
        file = Path(path).parent / ONEIG_FOLDER / f"{category}{'' if column == 'prompt_en' else '_zh'}.json"
        if category not in asked:
            asked[category] = _read_json(file)
        number = _text(row.get("id"), place, "id")
        entry = asked[category].get(number)
        if not isinstance(entry, dict):
            raise UserError(f"{file}: {number}: missing, and {place} has it; bring both from one revision")
        where = f"{file}: {number}"
        texts, parents = {}, {}
        for key, text in _entries(entry.get("question"), where, "question"):
            texts[_number(key, where, "question")] = _text(text, where, f"question.{key}")
        for key, above in _entries(entry.get("dependency"), where, "dependency"):
            listed = above if isinstance(above, list) else [above]
            parents[_number(key, where, "dependency")] = [_number(n, where, f"dependency.{key}") for n in listed]
        columns = {**_dependent(texts, parents, where), "class": category}
        prompt = _text(row.get(column), place, column)
        records.append(PromptRecord(prompt, id=f"{category}_{number}", columns=columns))
    if not records:
        raise UserError(f"{path}: has no prompt of {', '.join(ONEIG_CLASSES)}; bring OneIG-Bench.csv")
    return _unique(records, path)


def longtext(path: str) -> list[PromptRecord]:
    """text_prompts.jsonl or text_prompts_zh.jsonl: prompt_id, prompt, category and the text that it asks for."""
    records = []
    for place, row in _rows(path):
        text = row.get("text")
        parts = [_text(text, place, "text")] if isinstance(text, str) else _texts(text, place, "text")
        columns = {"category": row.get("category")}
        number = _text(str(row.get("prompt_id", "")), place, "prompt_id")
        prompt = _text(row.get("prompt"), place, "prompt")
        # One text, as its figure has no order, and no reward reads more than ten in one image.
        records.append(PromptRecord(prompt, texts=[" ".join(parts)], id=number, columns=columns))
    return _unique(records, path)


def compbench(path: str) -> list[PromptRecord]:
    """A list in .json, or JSONL: prompt, questions, and a category if there is one. A question is a text whose right
    answer is yes, or [question, right answer]."""
    records = []
    for place, row in _rows(path):
        questions = row.get("questions")
        if isinstance(questions, list):
            questions = [[entry, "yes"] if isinstance(entry, str) else entry for entry in questions]
        columns = {"questions": _questions(questions, place, "questions"), "category": row.get("category")}
        records.append(PromptRecord(_text(row.get("prompt"), place, "prompt"), columns=columns))
    return _unique(records, path)


def rubric(path: str) -> list[PromptRecord]:
    """JSONL like any file of prompts, with requirements in each line."""
    records = read_prompts(path)
    for record in records:
        if not record.requirements or not all(map(str.strip, record.requirements)):
            raise UserError(f"{path}: prompt {record.prompt!r}: requirements: missing or empty; write [...] of texts")
    return records


# ---- parts of rows ---------------------------------------------------------------------------------------------


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields of each row; at least one."""
    table = open_table(path)
    if len(table) == 0:
        raise UserError(f"{path}: is empty; bring the suite's file")
    for i in range(len(table)):
        try:
            row = table[i]
        except ValueError as error:
            raise UserError(f"{table.name(i)}: {error}; copy the file again") from None
        yield table.name(i), row


def _text(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        wrong = "missing" if value is None else "empty" if value == "" else f"is {value!r}"
        raise UserError(f"{place}: {field}: {wrong}; write a text")
    return value.strip()


def _texts(value: Any, place: str, field: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: {field}: {'missing' if value is None else f'is {value!r}'}; write a list of texts")
    return [_text(entry, place, field) for entry in value]


def _number(value: Any, place: str, field: str) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise UserError(f"{place}: {field}: is {value!r}; write a whole number") from None


def _questions(value: Any, place: str, field: str) -> list[list[str]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: {field}: missing or empty; write a list of [question, right answer]")
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{place}: {field}: has {pair!r}; write [question, right answer]")
        answer = _text(pair[1], place, field)
        if answer.casefold() == "ten" or (answer.isdecimal() and len(answer) > 1):
            # Its digits are two tokens, of which the first is another number's.
            raise UserError(f"{place}: {field}: {answer}: numbers go up to nine; ask with yes as the right answer")
        _text(pair[0], place, field)
    return value


def _dependent(texts: dict[int, str], parents: dict[int, list[int]], place: str) -> dict[str, Any]:
    """The columns `questions` and `parents` of questions by number, where 0 means that one depends on none."""
    order = {number: i for i, number in enumerate(texts)}
    places: list[list[int]] = []
    for number in texts:
        above = [parent for parent in parents.get(number, []) if parent != 0]
        for parent in above:
            if parent not in order:
                raise UserError(f"{place}: question {number} depends on {parent}, which is missing; copy the file again")
        places.append([order[parent] for parent in above])
    if not texts:
        raise UserError(f"{place}: has no question; copy the file again")
    return {"questions": [[text, "yes"] for text in texts.values()], "parents": places}


def _json(value: Any, place: str, field: str) -> Any:
    try:
        return parse_json(_text(value, place, field))
    except ValueError as error:
        raise UserError(f"{place}: {field}: {error}; copy the file again") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; bring the whole repository") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}; copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: is not an object; copy the file again")
    return value


def _entries(value: Any, place: str, field: str) -> list[tuple[str, Any]]:
    """Of an object, which some files have as text."""
    value = _json(value, place, field) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise UserError(f"{place}: {field}: is not an object; copy the file again")
    return list(value.items())


def _unique(records: list[PromptRecord], path: str) -> list[PromptRecord]:
    ids: set[str] = set()
    for record in records:
        if record.id in ids:
            raise UserError(f"{path}: the prompt {record.prompt!r}, or its number, comes twice; remove one")
        ids.add(record.id)
    return records
