"""The prompt expander: a chat model, with or without an adapter, that answers a prompt with richer captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from posttrain.errors import UserError
from posttrain.expander.chat_template import messages, template
from posttrain.expander.thinking import is_opened, split
from posttrain.loading import load_adapter, load_model, local, without_revision
from posttrain.model import sampler
from posttrain.model.fingerprint import fingerprint
from posttrain.runs import startup
from posttrain.tokenizer import load_tokenizer

CARD = "expander.json"
"""File beside an adapter with its base, the base's fingerprint, the template's hash and whether it thinks first."""


@dataclass(frozen=True)
class Expansion:
    text: str
    """Without special tokens and surrounding white space; may be empty."""
    whole: bool
    """Whether the model ended it; if not, it was cut at the token limit."""
    thought: str | None = None
    """What the model thought before it; never part of `text`."""
    tokens: int = 0
    """That the model wrote, a thought and the end included."""
    unexpanded: bool = False
    """Whether no thought came to an end, twice, so that `text` is the prompt as it was."""


@dataclass
class Expander:
    model: Any
    """A causal LM, or a PeftModel of one."""
    tokenizer: Any
    thinking: bool = False
    """Whether it is asked for a thought before the caption, which is then cut off."""
    system: str | None = None
    """The system text in place of posttrain's own."""

    @classmethod
    def load(
        cls,
        path: str,
        adapter: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: Any = "cpu",
        thinking: bool | None = None,
        system: str | None = None,
    ) -> Expander:
        """Loads a chat model, a run directory or an adapter's directory; `thinking` None: as it was trained. `system`
        is a file with another system text, for a model that was not trained here.

        Raises UserError if `path` is none of these, if the model has no chat template, if the adapter belongs to
        another base, or for a system text that the model does not take.
        """
        base, adapter = resolve(path, adapter)
        text = None if system is None else read_system(system, base, adapter)
        if text is not None and thinking:
            raise UserError("thinking: a system text of your own does not ask for a thought; leave one of the two out")
        thinking = trained_thinking(base, adapter) if thinking is None else thinking
        model, tokenizer = load_chat_model(base, dtype)
        tokenizer.padding_side = "left"  # generation continues after the last token, which must not be padding
        if adapter is not None:
            check_base(adapter, base, model)  # first: an adapter's weights would change the fingerprint
            model = load_adapter(model, adapter, f"{adapter} on {base}")
        return cls(model.to(device).eval(), tokenizer, thinking, text)

    @torch.no_grad()
    def expand(
        self,
        prompts: Sequence[str],
        n: int,
        seed: int = 0,
        temperature: float = 1.0,
        max_tokens: int = 512,
        batch: int = 64,
    ) -> list[list[Expansion]]:
        """n expansions of each prompt, sampled from the full distribution (no top-k, no top-p).

        The same prompts, n, seed and batch (rows in one forward) give the same expansions.
        """
        expansions: list[list[Expansion]] = []
        size = max(1, batch // n)  # prompts in one forward
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            answers = self._sample(part, n, sampler.seed_for(seed, first), temperature, max_tokens)
            for i, answer in enumerate(answers):
                if self.thinking and not answer.text:  # the thought did not end; n neighbours are of one prompt
                    answers[i] = self._again(part[i // n], sampler.seed_for(seed, first, i), temperature, max_tokens)
            expansions += [answers[i * n : (i + 1) * n] for i in range(len(part))]
        return expansions

    def _again(self, prompt: str, seed: int, temperature: float, max_tokens: int) -> Expansion:
        (answer,) = self._sample([prompt], 1, seed, temperature, max_tokens)
        return answer if answer.text else Expansion(prompt, False, answer.thought, answer.tokens, True)

    def _sample(
        self, prompts: Sequence[str], n: int, seed: int, temperature: float, max_tokens: int
    ) -> list[Expansion]:
        """n neighbouring expansions of each prompt, in one forward."""
        conversations = [messages(prompt, self.thinking, self.system) for prompt in prompts]
        inputs = self.tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        with torch.random.fork_rng():  # generate() takes no generator, only the global one
            torch.manual_seed(seed)
            ids = self.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], num_return_sequences=n,
                max_new_tokens=max_tokens, pad_token_id=self.tokenizer.pad_token_id, do_sample=True,
                temperature=temperature, top_k=0, top_p=1.0,
            )  # fmt: skip
        new_tokens = ids[:, inputs["input_ids"].shape[1] :].tolist()
        opened = self.thinking and is_opened(self.tokenizer.decode(inputs["input_ids"][0]))
        return [self._expansion(row, opened) for row in new_tokens]

    def _expansion(self, ids: list[int], opened: bool) -> Expansion:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = end_tokens(self.model, self.tokenizer)
        written = until_end(ids, ends)
        whole = bool(written) and written[-1] in ends
        if not self.thinking:
            return Expansion(text.strip(), whole, tokens=len(written))
        answer = split(text, opened)
        return Expansion(answer.caption, whole, answer.thought, len(written))


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id  # one id, a list of ids or None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return list(dict.fromkeys([tokenizer.eos_token_id, *ends]))


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to and with the first end: a batch is generated until its longest row ends, and shorter rows are
    padded after theirs."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids


def resolve(path: str, adapter: str | None = None) -> tuple[str, str | None]:
    """(base, adapter) for a chat model, for the run directory of an expander command, or for an adapter."""
    root = Path(path)
    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").exists():
            raise UserError(f"adapter: {adapter} contains no adapter_config.json; give the directory of an adapter")
        return path, adapter
    for folder in (root / "adapter", root):  # a run directory, or the adapter's own
        if (folder / "adapter_config.json").exists():
            return _named_base(folder), str(folder)
    if (root / "model" / "config.json").exists():
        return str(root / "model"), None
    if (root / "recipe.yaml").exists():
        raise UserError(f"{path}: this run has no adapter/ or model/ yet; let it finish, or give a model")
    return path, None


def load_chat_model(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer); the tokenizer has a chat template and a padding token. No code from the checkpoint runs."""
    startup.lap("inputs")
    folder = local(path)
    model = load_model(AutoModelForCausalLM, folder, path, "cpu", dtype=dtype)
    model.name_or_path = model.config.name_or_path = without_revision(path)  # what adapters are said to be of
    tokenizer = load_tokenizer(folder, path, model.get_input_embeddings().num_embeddings)
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: its tokenizer has no chat template; use an instruct model")
    if tokenizer.pad_token is None:  # batches need one; masked, so it does not matter which
        tokenizer.pad_token = tokenizer.eos_token
    startup.lap("read")
    return model, tokenizer


def read_system(path: str, base: str, adapter: str | None) -> str:
    """The system text in a file. Raises UserError if there is none, and for an expander that was trained here."""
    for folder in filter(None, (adapter, base)):
        if (Path(folder) / CARD).is_file():
            raise UserError(f"system: {folder} was trained under posttrain's own system text; leave system out")
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise UserError(f"system: {path}: {reason}; give a text file") from None
    if not text:
        raise UserError(f"system: {path}: is empty; give a file with the system text")
    return text


def trained_thinking(base: str, adapter: str | None) -> bool:
    """Whether supervised training taught it to think first: what the card of its adapter, or of its own, says."""
    for folder in filter(None, (adapter, base)):
        if (card := Path(folder) / CARD).is_file():
            return bool(json.loads(card.read_text()).get("thinking", False))
    return False


def write_card(folder: Path, base: str, base_fingerprint: str, thinking: bool = False) -> None:
    """Writes which base an adapter belongs to, and whether it was taught to think."""
    card = {"base": base, "base_fingerprint": base_fingerprint, "template": template().hash, "thinking": thinking}
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")


def check_base(adapter: str, base: str, model: torch.nn.Module) -> None:
    """Raises UserError if an adapter was trained on another model.

    The fingerprint decides; an adapter of another project has none, so there the name decides.
    """
    file = Path(adapter) / CARD
    if file.exists():
        card = json.loads(file.read_text())
        if card["base_fingerprint"] != fingerprint(dict(model.named_parameters())):
            raise UserError(f"adapter: {adapter} was trained on other weights ({card['base']}) than {base}; use those")
        return
    trained_on = _named_base(Path(adapter))
    if trained_on != base and Path(trained_on).resolve() != Path(base).resolve():
        raise UserError(f"adapter: {adapter} was trained on {trained_on}, not on {base}; use that as the model")


def _named_base(adapter: Path) -> str:
    config, card = adapter / "adapter_config.json", adapter / CARD
    try:
        name = str(json.loads(config.read_text())["base_model_name_or_path"])
        own = str(json.loads(card.read_text())["base"]) if card.is_file() else name
        # The card has the revision too, for which PEFT's settings have no place.
        return own if without_revision(own) == name else name
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{config}: has no base_model_name_or_path; give model and adapter separately") from None
