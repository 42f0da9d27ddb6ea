"""The five image rewards. Each asks a judge; what the judge cannot answer is a Failure, not a score."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.errors import UserError
from prompts.parse import json_line, parse_json
from prompts.templates import Template, load_template
from rewards.base import Failure, Score, Scored
from rewards.encode import encode_async
from rewards.endpoints import JudgeError
from rewards.judge import Judge
from rewards.load import construct
from rewards.ocr import QUOTATION_MARK, score_prompt, words


class JudgeReward(ABC):
    """One score an image from one judge.

    `judge` is a Judge or, as a recipe gives it, the arguments of one; those of a LocalJudge if `path` is among them.
    """

    is_probability = True
    """Whether the score is a P(yes), or a mean of several: then it is as repeatable as the judge's answers."""

    def __init__(self, judge: Judge | Mapping[str, Any], template: str):
        self.judge = made_judge(judge)
        self.template = load_template(template)

    async def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> list[Score]:
        rows = []
        for i in range(len(images)):
            rows.append({name: column[i] for name, column in columns.items()})
        return await asyncio.gather(*map(self._score, images, prompts, rows))

    async def _score(self, image: Image.Image, prompt: str, row: dict[str, Any]) -> Score:
        try:
            return await self.score(image, prompt, row)
        except JudgeError as error:
            return Failure(str(error))

    @abstractmethod
    async def score(self, image: Image.Image, prompt: str, row: dict[str, Any]) -> Score:
        """One image's score; a JudgeError becomes a Failure."""

    async def ask(self, image: Image.Image, prompt: str) -> float:
        """P(yes) for a template that may use $prompt."""
        template, fields = self.question(prompt)
        return await self.judge.p_yes(image, template, **fields)

    def question(self, prompt: str) -> tuple[Template, dict[str, str]]:
        """A yes/no question that suits the judge, and its fields; the preflight asks it."""
        return self.template, {"prompt": prompt} if "prompt" in self.template.fields else {}

    def record(self) -> dict[str, Any]:
        return {"model": self.judge.model, "templates": _hashes(self.template)}


class Aesthetic(JudgeReward):
    """P(yes) of the trained adapter to one fixed question."""

    def __init__(self, judge: Judge | Mapping[str, Any], template: str = "aesthetic"):
        super().__init__(judge, template)

    async def score(self, image: Image.Image, prompt: str, row: dict[str, Any]) -> Score:
        return await self.ask(image, prompt)


class Artifact(JudgeReward):
    """P(no) of the trained adapter to 'does the image have faults?': a penalty, or a gate in the recipe."""

    def __init__(self, judge: Judge | Mapping[str, Any], template: str = "artifact"):
        super().__init__(judge, template)

    async def score(self, image: Image.Image, prompt: str, row: dict[str, Any]) -> Score:
        return 1 - await self.ask(image, prompt)


class Rubric(JudgeReward):
    """The mean P(yes) over a prompt's requirements, each asked by itself.

    They come from the column `requirements`; where a prompt has none, the judge finds them once and they are
    kept in `requirements_file`. An empty list means that there is nothing to ask: None. With another `column` its
    statements are asked instead, such as what a style reference shows and the image must not. Every prompt must have
    that column; where it is null or empty, the score is None.
    """

    def __init__(
        self,
        judge: Judge | Mapping[str, Any],
        template: str = "rubric",
        decompose_template: str = "decompose",
        requirements_file: str | None = None,
        column: str = "requirements",
    ):
        super().__init__(judge, template)
        if column != "requirements" and requirements_file is not None:
            raise UserError(f"requirements_file: keeps what the judge finds, and column {column} is asked as it stands")
        self.column = column
        self.requirements = Requirements(self.judge, load_template(decompose_template), requirements_file)

    async def score(self, image: Image.Image, prompt: str, row: dict[str, Any]) -> Score:
        requirements = row.get(self.column)
        if self.column != "requirements" and self.column not in row:
            raise UserError(f"prompt {prompt!r}: there is no column {self.column}, which a rubric asks for; add it")
        # Unknown; an empty list means that there are none.
        if requirements is None and self.column == "requirements":
            requirements = await self.requirements.of(prompt)
        if not requirements:
            return None
        encoded = await encode_async(image)  # once for all questions about it
        questions = [self.judge.p_yes(encoded, self.template, requirement=r) for r in requirements]
        answers = await asyncio.gather(*questions)
        details = {"requirements": list(requirements), "answers": answers}
        return Scored(sum(answers) / len(answers), details)

    def question(self, prompt: str) -> tuple[Template, dict[str, str]]:
        return self.template, {"requirement": prompt}

    def record(self) -> dict[str, Any]:
        hashes = _hashes(self.template, self.requirements.template)
        return {"model": self.judge.model, "templates": hashes}


class Questions(JudgeReward):
    """The mean over a prompt's questions of the probability of the right answer, each asked by itself.

    The column `questions` has [question, right answer] pairs; an answer is yes, no, a digit or another word. `parents`
    may name, for each question, the places of others that it depends on: it counts 0 if one of these is answered
    wrongly, which is a probability below 0.5. `chain`: also if one of them counts 0 itself and stands before it.
    `hard`: each answer is right or wrong.
    """

    def __init__(
        self, judge: Judge | Mapping[str, Any], template: str = "question", hard: bool = False, chain: bool = False
    ):
        super().__init__(judge, template)
        self.hard, self.chain = hard, chain
        self.is_probability = not hard

    async def score(self, image: Image.Image, prompt: str, row: dict[str, Any]) -> Score:
        questions = row.get("questions")
        if not questions:
            return None
        for pair in questions:
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise UserError(f"prompt {prompt!r}: questions: {pair!r}: write [question, right answer]")
        encoded = await encode_async(image)  # once for all questions about it
        asked = [self.judge.p_answer(encoded, self.template, answer, question=text) for text, answer in questions]
        probabilities = await asyncio.gather(*asked)
        credits = credited(probabilities, row.get("parents"), self.hard, self.chain)
        details = {"questions": [list(pair) for pair in questions], "probabilities": probabilities, "credits": credits}
        return Scored(sum(credits) / len(credits), details)

    def question(self, prompt: str) -> tuple[Template, dict[str, str]]:
        return self.template, {"question": f"Does the image show this: {prompt}"}


def credited(
    probabilities: Sequence[float], parents: Sequence[Sequence[int]] | None, hard: bool, chain: bool
) -> list[float]:
    """What each answer counts in [0, 1]; see `Questions`."""
    right = [p >= 0.5 for p in probabilities]
    credits = list(map(float, right if hard else probabilities))
    for i, places in enumerate(parents or ()):
        if not all(right[place] for place in places):
            credits[i] = 0.0
            if chain:
                right[i] = False
    return credits


class OCR(JudgeReward):
    """How well the text in the image matches the column `texts`; None where the prompt asks for no text.

    With `unasked`, in (0, 1], an image whose prompt asks for no text is scored too: 1 less `unasked` for each word that
    the judge reads in it, at least 0. A prompt without `texts` that holds a quotation mark may ask for text: None.
    """

    is_probability = False

    def __init__(self, judge: Judge | Mapping[str, Any], template: str = "transcribe", unasked: float | None = None):
        super().__init__(judge, template)
        if unasked is not None and not (isinstance(unasked, int | float) and 0 < unasked <= 1):
            raise UserError(f"unasked: is {unasked!r}: use a number above 0, at most 1, or null")
        self.unasked = unasked

    async def score(self, image: Image.Image, prompt: str, row: dict[str, Any]) -> Score:
        texts = row.get("texts")
        if not texts:
            return await self._score_unasked(image, prompt)
        lines = await self.judge.transcribe(image, self.template)
        # In a thread, so that other questions go on: ten texts and a full page take a tenth of a second.
        result = await asyncio.to_thread(score_prompt, prompt, texts, lines)
        if result is None:
            return None
        details = {"lines": lines, "missing": result.missing, "extra": result.extra}
        return Scored(result.score, details | {"order_free": result.order_free})

    async def _score_unasked(self, image: Image.Image, prompt: str) -> Score:
        if self.unasked is None or QUOTATION_MARK.search(prompt):
            return None
        lines = await self.judge.transcribe(image, self.template)
        extra = sum(len(words(line)) for line in lines)
        return Scored(max(0.0, 1 - self.unasked * extra), {"lines": lines, "extra": extra})

    def question(self, prompt: str) -> tuple[Template, dict[str, str]]:
        # A transcription is no P(yes), so its judge's repeatability is measured by the rubric's question.
        return load_template("rubric"), {"requirement": prompt}


def made_judge(judge: Judge | Mapping[str, Any]) -> Judge:
    """A Judge, or one made of its arguments: a LocalJudge if `path` is among them."""
    if isinstance(judge, Judge):
        return judge
    if "path" not in judge:
        return construct(Judge, judge, "judge")
    from rewards.local_judge import LocalJudge  # torch comes with it

    return construct(LocalJudge, judge, "judge")


def _hashes(*templates: Template) -> dict[str, str]:
    return {template.name: template.hash for template in templates}


# ---- requirements of prompts ----------------------------------------------------------------------------------


class Requirements:
    """Prompt -> requirements. A prompt that the file holds is never asked again, by whichever model."""

    def __init__(self, judge: Judge, template: Template, path: str | None):
        self.judge = judge
        self.template = template
        self.path = Path(path) if path is not None else None
        self._known = _read(self.path) if self.path is not None and self.path.exists() else {}
        self._asking: dict[str, asyncio.Task[list[str]]] = {}

    async def of(self, prompt: str) -> list[str]:
        """The images of a group ask for the same prompt at the same time: one request serves them all."""
        if prompt in self._known:
            return self._known[prompt]
        task = self._asking.get(prompt)
        if task is None:
            task = self._asking[prompt] = asyncio.create_task(self._ask(prompt))
            task.add_done_callback(lambda _: self._asking.pop(prompt))
        # One asker that gives up, by its time-out, must not cancel the request of the others.
        return await asyncio.shield(task)

    async def _ask(self, prompt: str) -> list[str]:
        requirements = list(map(str.strip, await self.judge.decompose(self.template, prompt)))
        if not requirements or not all(requirements):  # an empty list would mean that there is nothing to ask
            raise JudgeError(f"no requirements found in the prompt {prompt!r}")
        self._known[prompt] = requirements
        if self.path is not None:
            asked = {"model": self.judge.model, "template": self.template.hash}
            _append(self.path, {"prompt": prompt, "requirements": requirements, **asked})
        return requirements


def _read(path: Path) -> dict[str, list[str]]:
    known = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; name another file") from None
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            prompt, requirements = entry["prompt"], entry["requirements"]
            if not (isinstance(prompt, str) and isinstance(requirements, list) and requirements):
                raise TypeError
            if not all(isinstance(text, str) and text.strip() for text in requirements):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number}: not a requirements record: remove that line") from None
        known[prompt] = requirements
    return known


def _append(path: Path, entry: dict[str, object]) -> None:
    """One write to a file opened for appending, so that lines of several processes do not mix."""
    line = json_line(entry).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)
