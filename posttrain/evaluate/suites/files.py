"""The public files of each suite as prompt records; what a suite's reward and figures need stands in their columns.

Each reader takes a path, or hf:NAME where the hub has the same rows, and raises UserError with file, row and field.
Questions are [question, right answer] pairs; `parents` are places of other questions of the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from posttrain.errors import UserError
from prompts.parse import parse_json
from prompts.records import PromptRecord, read_prompts
from prompts.tables import open_table

T = TypeVar("T")
Row = TypeVar("Row", bound=BaseModel)

ONEIG_FOLDER = "scripts/alignment/Q_D"
ONEIG_CLASSES = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Multilingualism": "multilingualism",
}
"""Categories that alignment is measured on, and the files of their questions."""


def _parsed(value: Any) -> Any:
    """Some files have JSON in a text."""
    return parse_json(value) if isinstance(value, str) else value


def _answerable(pair: list[str]) -> list[str]:
    if pair[1].casefold() == "ten" or (pair[1].isdecimal() and len(pair[1]) > 1):
        # Its digits are two tokens, of which the first is another number's.
        raise ValueError(f"{pair[1]}: numbers go up to nine; ask with yes as the right answer")
    return pair


def _split(value: Any) -> Any:
    # The CSV has "1, 2" in a cell.
    return value.split(",") if isinstance(value, str) else value


def _yes_unless_said(value: Any) -> Any:
    return [value, "yes"] if isinstance(value, str) else value


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Pair = Annotated[list[Text], Field(min_length=2, max_length=2), AfterValidator(_answerable)]
Pairs = Annotated[list[Pair], Field(min_length=1)]


class GenEval2Row(BaseModel):
    prompt: Text
    vqa_list: Pairs
    skills: Texts
    atom_count: int


def geneval2(path: str) -> list[PromptRecord]:
    """geneval2_data.jsonl: prompt, questions, and the skill of each."""
    records = []
    for place, row in _rows(path, GenEval2Row):
        _same_length(row.skills, row.vqa_list, f"{place}: skills")
        columns = {"questions": row.vqa_list, "skills": row.skills, "atom_count": row.atom_count}
        records.append(PromptRecord(row.prompt, id=str(len(records)), columns=columns))
    return records


class DPGRow(BaseModel):
    item_id: Text
    text: Text
    proposition_id: int
    dependency: Annotated[list[int], BeforeValidator(_split)]
    tuple: Text
    """`entity - whole (chair)`: the broad category, the detailed one, and what is meant."""
    question_natural_language: Text


def dpg(path: str) -> list[PromptRecord]:
    """dpg_bench.csv: one row for each question, those of a prompt under one item_id."""
    items: dict[str, dict[int, DPGRow]] = {}
    for place, row in _rows(path, DPGRow):
        item = items.setdefault(row.item_id, {})
        # The second row would silently take the first one's place.
        if row.proposition_id in item:
            raise UserError(f"{place}: proposition_id: {row.item_id} has {row.proposition_id} twice; remove one")
        item[row.proposition_id] = row
    records = []
    for name, rows in items.items():
        texts, parents, categories = {}, {}, []
        for number, row in rows.items():
            texts[number], parents[number] = row.question_natural_language, row.dependency
            categories.append(row.tuple.split("(")[0].strip())
        columns = _dependent(texts, parents, f"{path}: item {name}: dependency")
        columns["categories"] = categories
        # All rows of an item repeat its prompt.
        first = next(iter(rows.values()))
        records.append(PromptRecord(first.text, id=name, columns=columns))
    return records


class Points(BaseModel):
    points: Texts = Field(validation_alias=AliasChoices("Testpoints", "考点"))
    texts: Texts = Field(validation_alias=AliasChoices("Testpoint Description", "考点对应描述"))


class UniGenBenchRow(BaseModel):
    index: Text
    prompt: Text = Field(validation_alias=AliasChoices("prompt_en", "prompt_zh"))
    described: Annotated[Points, BeforeValidator(_parsed)] = Field(
        validation_alias=AliasChoices("sub_dims_en", "sub_dims_zh")
    )


def unigenbench(path: str) -> list[PromptRecord]:
    """test_prompts_en.csv, test_prompts_zh.csv or their long forms: index, prompt and test points in JSON."""
    records = []
    for place, row in _rows(path, UniGenBenchRow):
        points = row.described.points
        _same_length(row.described.texts, points, f"{place}: test points")
        questions = []
        for point, text in zip(points, row.described.texts):
            # A description may be one word of the prompt, such as a pronoun, so the prompt is quoted as well.
            asked = f"For the prompt “{row.prompt}”, does the image meet the test point “{point}”, there “{text}”?"
            questions.append([asked, "yes"])
        records.append(PromptRecord(row.prompt, id=row.index, columns={"questions": questions, "points": points}))
    return _unique(records, path)


class OneIGRow(BaseModel):
    category: Text
    id: Text
    prompt: Text = Field(validation_alias=AliasChoices("prompt_en", "prompt_cn"))


class OneIGQuestions(BaseModel):
    question: Annotated[dict[int, Text], BeforeValidator(_parsed)]
    dependency: Annotated[dict[int, list[int]], BeforeValidator(_parsed)]


def oneig(path: str) -> list[PromptRecord]:
    """OneIG-Bench.csv or OneIG-Bench-ZH.csv in a copy of its repository, whose folder scripts/alignment/Q_D has the
    questions. Prompts of categories without alignment are left out."""
    chinese = "prompt_cn" in open_table(path).columns
    asked: dict[str, dict[str, OneIGQuestions]] = {}
    records = []
    for place, row in _rows(path, OneIGRow):
        name = ONEIG_CLASSES.get(row.category)
        if name is None:
            continue
        file = Path(path).parent / ONEIG_FOLDER / f"{name}{'_zh' if chinese else ''}.json"
        if name not in asked:
            asked[name] = _read_questions(file)
        if row.id not in asked[name]:
            raise UserError(f"{file}: has no {row.id}, which {place} has; bring both from one revision")
        entry = asked[name][row.id]
        columns = _dependent(entry.question, entry.dependency, f"{file}: {row.id}: dependency")
        # The numbers begin anew in each class.
        records.append(PromptRecord(row.prompt, tags=[name], id=f"{name}_{row.id}", columns=columns))
    if not records:
        raise UserError(f"{path}: category: none is {', '.join(ONEIG_CLASSES)}; bring OneIG-Bench.csv")
    return _unique(records, path)


class LongTextRow(BaseModel):
    prompt_id: int
    prompt: Text
    text: Texts
    category: str | int | None = None


def longtext(path: str) -> list[PromptRecord]:
    """text_prompts.jsonl or text_prompts_zh.jsonl: prompt_id, prompt, category and the texts that it asks for."""
    records = []
    for _, row in _rows(path, LongTextRow):
        tags = [str(row.category)] if row.category else []
        # One text, as its figure knows no order, and no reward reads more than ten in one image.
        records.append(PromptRecord(row.prompt, texts=[" ".join(row.text)], tags=tags, id=str(row.prompt_id)))
    return _unique(records, path)


class CompBenchRow(BaseModel):
    prompt: Text
    questions: Annotated[list[Annotated[Pair, BeforeValidator(_yes_unless_said)]], Field(min_length=1)]
    category: str | int | None = None


def compbench(path: str) -> list[PromptRecord]:
    """A list in .json, or JSONL: prompt, questions, and a category if there is one. A question is a text whose right
    answer is yes, or [question, right answer]."""
    records = []
    for _, row in _rows(path, CompBenchRow):
        tags = [str(row.category)] if row.category else []
        columns = {"questions": row.questions}
        records.append(PromptRecord(row.prompt, tags=tags, id=str(len(records)), columns=columns))
    return records


def rubric(path: str) -> list[PromptRecord]:
    """JSONL like any file of prompts, with requirements in each line."""
    records = read_prompts(path)
    for record in records:
        if not record.requirements or not all(map(str.strip, record.requirements)):
            raise UserError(f"{path}: prompt {record.prompt!r}: requirements: missing or empty; write [...] of texts")
    return records


# ---- parts of files --------------------------------------------------------------------------------------------


def _rows(path: str, kind: type[Row]) -> Iterator[tuple[str, Row]]:
    """Place and fields of each row; at least one."""
    table = open_table(path)
    if len(table) == 0:
        raise UserError(f"{path}: is empty; bring the suite's file")
    for i in range(len(table)):
        try:
            row = table[i]
        except ValueError as error:
            raise UserError(f"{table.name(i)}: {error}; bring the file again") from None
        yield table.name(i), _checked(TypeAdapter(kind), row, table.name(i))


def _checked(adapter: TypeAdapter[T], value: Any, place: str) -> T:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place}: {field}: {reason}; fix it or bring the suite's own file") from None


def _read_questions(file: Path) -> dict[str, OneIGQuestions]:
    try:
        value = parse_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; bring the whole repository") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}; bring the file again") from None
    return _checked(TypeAdapter(dict[str, OneIGQuestions]), value, str(file))


def _dependent(texts: dict[int, str], parents: dict[int, list[int]], place: str) -> dict[str, Any]:
    """The columns `questions` and `parents` of questions by number, where 0 means that one depends on none."""
    # The files name questions by number; a reward's parents are places in its list of questions.
    order = {number: i for i, number in enumerate(texts)}
    questions, places = [], []
    for number, text in texts.items():
        questions.append([text, "yes"])
        places.append([])
        for parent in parents.get(number, []):
            if parent == 0:
                continue
            if parent not in order:
                raise UserError(f"{place}: question {number} depends on {parent}, which is missing; bring it again")
            places[-1].append(order[parent])
    return {"questions": questions, "parents": places}


def _same_length(values: Sequence[str], others: Sequence[object], place: str) -> None:
    if len(values) != len(others):
        raise UserError(f"{place}: {len(values)} for {len(others)}; give one for each")


def _unique(records: list[PromptRecord], path: str) -> list[PromptRecord]:
    known: set[str] = set()
    for record in records:
        if record.id in known:
            raise UserError(f"{path}: prompt {record.prompt!r}: its number {record.id} comes twice; remove one")
        known.add(record.id)
    return records
