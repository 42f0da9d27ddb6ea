"""A judge: a vision-language model behind an OpenAI-compatible server, asked about images.

A yes/no score is read from the log-probs of the first answer token at temperature 0, so it is continuous and
repeatable; so is the probability of another answer of one word. The image comes before the text: a server with prefix
caching then reads each image once, however many questions it is asked; traffic.py says how often its bytes travel.
What cannot be had is a JudgeError, never a number.

`concurrency` is a limit of the run: each of N processes has an Nth of it, at least 1.
"""

import asyncio
import itertools
import json
import logging
import math
import random
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from openai import APIResponseValidationError, AsyncOpenAI, RequestOptions
from PIL import Image

from posttrain.errors import UserError, counted
from prompts.parse import parse_json
from prompts.templates import Template, spelled
from rewards import traffic
from rewards.encode import EncodedImage, encode, encode_async
from rewards.endpoints import Endpoints, JudgeError, share
from rewards.serve import KEY_VARIABLE, ServerURL, read_key, refuse_keys
from rewards.traffic import Sent, turns_of

CACHED_ANSWERS = 1 << 16
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACE = "data:,"  # of the image's URL in a request
IMPOSSIBLE = -1000.0  # a log-prob below it was put there, as vLLM's -9999 is

log = logging.getLogger("posttrain")


@dataclass(eq=False)
class Judge:
    """A model by its served name (an adapter has its own) on one server or several equal ones."""

    model: str
    base_urls: str | list[str]
    api_key_env: str | None = None  # name of the environment variable that holds the key
    concurrency: int = 128  # requests of this judge under way at once, in all processes of the run together, >= 1
    timeout: float = 60.0  # seconds for one attempt
    deadline: float = 180.0  # seconds for a request with all its retries
    retries: int = 5  # after 408, 409, 429 and 5xx; lost connections are retried until the deadline
    seed: int = 0
    max_text_tokens: int = 512  # of a transcription or of a prompt's requirements
    min_mass: float = 0.5  # probability that yes and no must have together, for an answer to be one
    answers_as: str | None = None  # name of the model in answers, where `model` is an alias, as Azure's deployments are
    _cache: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, init=False, repr=False)
    _loop: asyncio.AbstractEventLoop | None = field(default=None, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.base_urls:
            raise UserError(f"judge {self.model}: base_urls: empty: give a URL or server://NAME")
        refuse_keys(self._urls, f"judge {self.model}: base_urls")
        if self.concurrency < 1:
            raise UserError(f"judge {self.model}: concurrency: {self.concurrency}: use 1 or more")

    @property
    def _urls(self) -> list[str]:
        return [self.base_urls] if isinstance(self.base_urls, str) else self.base_urls

    async def silent(self) -> list[str]:
        """URL and reason of each server that takes no connection now, except a recipe's own, which start later.

        Raises UserError for a key or a proxy that no request can be made with.
        """
        self._connect()
        # The address of a recipe's own server is known when it has started.
        others = [endpoint for endpoint in self._endpoints.endpoints if not isinstance(endpoint.url, ServerURL)]
        reasons = await asyncio.gather(*(endpoint.silence() for endpoint in others))
        return [self._without_key(reason) for reason in reasons if reason]

    async def p_yes(self, image: Image.Image | EncodedImage | None, template: Template, **fields: str) -> float:
        """P(yes) / (P(yes) + P(no)) at the first answer token; None asks about text alone."""
        return await self._cached(self._p_yes, image, template, fields)

    async def p_answer(
        self, image: Image.Image | EncodedImage | None, template: Template, answer: str, **fields: str
    ) -> float:
        """The probability of an answer of one word: of yes and no as `p_yes` has it, else `answer_mass`."""
        word = spelled(answer)
        if word in ("yes", "no"):
            p = await self.p_yes(image, template, **fields)
            return p if word == "yes" else 1 - p

        async def ask(encoded: EncodedImage | None, text: str) -> float:
            return answer_mass(await self._first_token(encoded, text), word, self.min_mass)

        return await self._cached(ask, image, template, fields, word)

    async def p_yes_text(self, template: Template, **fields: str) -> float:
        """The same of a question without an image."""
        return await self._p_yes(None, template.render(**fields))

    async def transcribe(self, image: Image.Image | EncodedImage, template: Template) -> list[str]:
        """The lines of text that the judge reads in the image, in reading order."""

        async def ask(encoded: EncodedImage | None, text: str) -> list[str]:
            return await self._list_of_strings("lines", text, encoded)

        return await self._cached(ask, image, template, {})

    async def answer(self, image: Image.Image | EncodedImage, template: Template, **fields: str) -> str:
        """What the judge says about the image, in a form of its own."""

        async def ask(encoded: EncodedImage | None, text: str) -> str:
            response = await self._chat(text, encoded, max_tokens=self.max_text_tokens)
            return self._content(response, "a text")

        return await self._cached(ask, image, template, fields)

    async def decompose(self, template: Template, prompt: str) -> list[str]:
        """The requirements that the judge finds in a prompt."""
        return await self.write("requirements", template, prompt=prompt)

    async def write(self, key: str, template: Template, **fields: str) -> list[str]:
        """The strings of a reply {key: [...]} to a question about text alone."""
        return await self._list_of_strings(key, template.render(**fields), None)

    async def asked_alone(
        self, images: Sequence[Image.Image], template: Template, n: int, **fields: str
    ) -> list[list[float]]:
        """n scores of each image, one request at a time, past the cache."""
        text, scores = template.render(**fields), []
        for image in map(encode, images):
            scores.append([await self._p_yes(image, text) for _ in range(n)])
        return scores

    async def asked_together(
        self, images: Sequence[Image.Image], template: Template, n: int, **fields: str
    ) -> list[list[float]]:
        """n scores of each image, all requests at once."""
        text, encoded = template.render(**fields), [encode(image) for image in images]
        scores: list[list[float]] = [[] for _ in images]
        # Shuffled, so that a server's batches differ in what they hold.
        order = list(range(len(images))) * n
        random.Random(self.seed).shuffle(order)
        together = [self._p_yes(encoded[i], text) for i in order]
        for i, score in zip(order, await asyncio.gather(*together)):
            scores[i].append(score)
        return scores

    async def _p_yes(self, encoded: EncodedImage | None, text: str) -> float:
        return yes_share(await self._first_token(encoded, text), self.min_mass)

    async def _first_token(self, encoded: EncodedImage | None, text: str) -> list[tuple[str, float]]:
        """The most probable first tokens of the answer, each with its log-prob."""
        response = await self._chat(text, encoded, max_tokens=1, logprobs=True, top_logprobs=20)
        try:
            candidates = response["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            pairs = [(str(candidate["token"]), float(candidate["logprob"])) for candidate in candidates]
        except (KeyError, IndexError, TypeError, ValueError):  # another server's shape of an answer
            problem = "the answer has no log-probs: does the server give top_logprobs?"
            raise JudgeError(f"{problem} It says: {self._quoted(response)}") from None
        if is_one_hot(pairs) and not self._warned:
            self._warned = True
            log.warning(
                f"judge {self.model}: its log-probs leave one token possible, so each score is 0 or 1: let its server"
                " give those of the model, at least 2 of them (vLLM: --logprobs-mode raw_logprobs, its default)"
            )
        return pairs

    async def _list_of_strings(self, key: str, text: str, encoded: EncodedImage | None) -> list[str]:
        schema = {
            "type": "object",
            "properties": {key: {"type": "array", "items": {"type": "string"}}},
            "required": [key],
            "additionalProperties": False,
        }
        # A server with structured output then samples nothing but this JSON.
        form = {"type": "json_schema", "json_schema": {"name": key, "strict": True, "schema": schema}}
        response = await self._chat(text, encoded, max_tokens=self.max_text_tokens, response_format=form)
        content = self._content(response, "the JSON that was asked for")
        try:
            answer = parse_json(content)
        except ValueError:
            raise JudgeError(f"the answer is not the JSON that was asked for: {self._quoted(response)}") from None
        if not isinstance(answer, dict) or answer.keys() != {key} or not _strings(answer[key]):
            raise JudgeError(f"the answer is not a list of strings under '{key}': {content[:200]}")
        return answer[key]

    def _content(self, response: Any, wanted: str) -> str:
        """The text of an answer. Raises JudgeError for none, and for one that was cut."""
        try:
            choice = response["choices"][0]
            if choice["finish_reason"] == "length":  # cut JSON would be malformed, for a reason that it does not tell
                raise JudgeError(f"the answer is longer than {counted(self.max_text_tokens, 'token')}")
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise JudgeError(f"the answer is not {wanted}: {self._quoted(response)}")
        return content

    async def _cached(
        self,
        ask: Callable[[EncodedImage | None, str], Awaitable[Any]],
        image: Image.Image | EncodedImage | None,
        template: Template,
        fields: Mapping[str, str],
        word: str = "",
    ) -> Any:
        """What `ask` says to the rendered question, or said before. `word` tells apart what is read from one answer."""
        encoded = await encode_async(image) if isinstance(image, Image.Image) else image
        key = (self.model, template.hash, tuple(sorted(fields.items())), word, encoded and encoded.hash)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        answer = self._cache[key] = await ask(encoded, template.render(**fields))
        while len(self._cache) > CACHED_ANSWERS:  # the answer that was not asked for longest goes first
            self._cache.popitem(last=False)
        return answer

    async def _chat(self, text: str, encoded: EncodedImage | None, **options: Any) -> Any:
        async def send(client: AsyncOpenAI, how: Sent) -> Any:
            # Not `chat.completions.create`, which first walks the typed request, and no random key for each
            # request, which the library draws and never sends: together half of a request's cost.
            data = self._body(text, encoded, how, options)
            request: RequestOptions = {"idempotency_key": ""}
            return await client.post("/chat/completions", content=data, cast_to=object, options=request)

        image = encoded.hash if encoded is not None and len(encoded.url) >= traffic.NAMED else None
        self._connect()
        async with self._turns.turn(image), self._slots:
            try:
                response = await self._endpoints.request(send, image)
            except (APIResponseValidationError, ValueError, LookupError, RecursionError) as error:  # JSON and charset
                raise JudgeError(self._without_key(f"the server's answer is malformed: {error}")) from None
            except JudgeError as error:
                raise JudgeError(self._without_key(str(error))) from None
        answered = response.get("model") if isinstance(response, dict) else None
        if isinstance(answered, str) and not same_model(self.answers_as or self.model, answered):
            asked = self.model if self.answers_as is None else f"{self.model}, which answers as {self.answers_as}"
            raise JudgeError(
                f"asked for the model {asked}, {answered} answered: name one that the server has, or, if it is an alias"
                f" there, set answers_as: {answered}"
            )
        return response

    def _body(self, text: str, encoded: EncodedImage | None, how: Sent, options: dict[str, Any]) -> bytes:
        """The JSON of a request."""
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if encoded is not None:
            named = {} if how == "bytes" else {"uuid": encoded.hash}
            content.insert(0, {"type": "image_url", "image_url": None if how == "id" else {"url": PLACE}} | named)
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"messages": messages, "model": self.model, "temperature": 0, "seed": self.seed, **options})
        if encoded is not None and how != "id":
            # The URL, which needs no escaping, is put in afterwards: json.dumps would read all of it, for each
            # question. The first place is the image's, whatever the text and the model's name say.
            body = body.replace(PLACE, encoded.url, 1)
        return body.encode()

    def _connect(self) -> None:
        """Connections belong to an event loop; a judge may meet several in its life, one at a time."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        key = self._key() or "none"
        self._endpoints = Endpoints(self._urls, key, self.timeout, self.deadline, self.retries)
        self._slots = asyncio.Semaphore(share(self.concurrency))
        self._turns = turns_of(self._urls, share(self.concurrency))
        self._loop = loop

    def _key(self) -> str | None:
        if self.api_key_env is not None:
            key = read_key(self.api_key_env, f"judge {self.model}: api_key_env")
            if key is None:
                raise UserError(f"judge {self.model}: api_key_env: {self.api_key_env} is not set: export it")
            return key
        # The recipe's own servers have the key that vLLM finds in the environment.
        ours = all(isinstance(url, ServerURL) for url in self._urls)
        return read_key(KEY_VARIABLE, f"judge {self.model}") if ours else None

    def _without_key(self, message: str) -> str:
        """Some servers repeat the key that they refuse, as it is or escaped."""
        key = self._key()
        if key:
            # Each escape puts backslashes before some characters, and a server may quote what was quoted.
            escaped = "".join(r"\\+" if c == "\\" else r"\\*" + re.escape(c) for c in key)
            message = re.sub(f"{escaped}|{re.escape(quote(key, safe=''))}", "***", message)
        return message

    def _quoted(self, response: Any) -> str:
        """The server's own words, in one line: what stands in the place of an answer."""
        if isinstance(response, dict) and isinstance(response.get("choices"), list):
            response = [choice.get("message") if isinstance(choice, dict) else choice for choice in response["choices"]]
        words = response if isinstance(response, str) else json.dumps(response, ensure_ascii=False, default=str)
        return self._without_key(" ".join(words.split()))[:300]


def spread(*scores: Sequence[Sequence[float]]) -> float:
    """The largest difference between scores of one image, each given as lists of an image's scores."""
    differences = []
    for parts in zip(*scores, strict=True):
        own = list(itertools.chain(*parts))
        differences.append(max(own) - min(own))
    return max(differences)


def same_model(asked: str, answered: str) -> bool:
    """Whether a server means the same by both names: it may leave out an owner or a folder, add a version, leave out a
    variant that a router was asked for (`:free`), and say which one is the latest."""
    names = [name.rpartition("/")[2].casefold() for name in (asked, answered)]
    if asked == answered or names[0].endswith("-latest"):
        return True
    version = r"([-@:.](\d[\w.-]*|latest))?"
    return any(re.fullmatch(re.escape(name) + version, names[1]) for name in (names[0], names[0].partition(":")[0]))


def is_one_hot(candidates: Sequence[tuple[str, float]]) -> bool:
    """Whether all but the first token are impossible, which no softmax says: a sampler's own log-probs at temperature
    0, or the only one that a server gives."""
    return sum(logprob > IMPOSSIBLE for _, logprob in candidates) == 1


def yes_share(candidates: Sequence[tuple[str, float]], min_mass: float) -> float:
    """P(yes) / (P(yes) + P(no)) from (token, log-prob) pairs, summed over spellings such as ' Yes', 'YES'."""
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in candidates:
        if (word := spelled(token)) in mass:
            mass[word] += math.exp(min(logprob, 0.0))
    total = mass["yes"] + mass["no"]
    if not (total > 0 and total >= min_mass):  # also when it is NaN
        first = candidates[0][0] if candidates else "nothing"
        raise JudgeError(f"the answer is neither yes nor no (they share {total:.3g}), but {first!r}")
    return mass["yes"] / total


def answer_mass(candidates: Sequence[tuple[str, float]], answer: str, min_mass: float) -> float:
    """The probability of the first tokens that begin an answer of one word, over all spellings: `four`, ` Four`, `4`.

    A digit's is among all tokens; together those of numbers must have `min_mass`, or no number was answered. Of a word
    that is longer than a token its first token counts, from two letters on.
    """
    word = spelled(answer)
    if word.isdecimal() and len(word) == 1:
        word = DIGITS[int(word)]
    right = numbers = 0.0
    for token, logprob in candidates:
        text, p = spelled(token), math.exp(min(logprob, 0.0))
        is_number = text in DIGITS or text.isdecimal()
        numbers += p if is_number else 0.0
        if word in DIGITS:
            right += p if text in (word, str(DIGITS.index(word))) else 0.0
        elif text == word or (len(text) > 1 and word.startswith(text)):
            right += p
    if word in DIGITS and not numbers >= min_mass:  # also when it is NaN
        first = candidates[0][0] if candidates else "nothing"
        raise JudgeError(f"the answer is not a number (numbers share {numbers:.3g}), but {first!r}")
    if not right >= 0:
        raise JudgeError("the answer has a log-prob that is not a number")
    return min(right, 1.0)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
