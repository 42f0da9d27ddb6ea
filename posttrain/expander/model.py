"""The prompt expander: a chat model, with or without an adapter, that answers a prompt with richer captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import UserError
from posttrain.expander.template import messages, template
from posttrain.model import sampler
from posttrain.model.fingerprint import fingerprint
from posttrain.model.load import quiet
from posttrain.runs import startup

CARD = "expander.json"
"""Lies beside an adapter: its base, the base's fingerprint, and the template's hash."""


@dataclass(frozen=True)
class Expansion:
    text: str
    """Without special tokens and outer white space; may be empty."""
    whole: bool
    """Whether the model ended it; otherwise it was cut at the token limit."""


@dataclass
class Expander:
    model: Any
    """A causal LM, or a PeftModel of one."""
    tokenizer: Any

    @classmethod
    def load(
        cls, path: str, adapter: str | None = None, dtype: torch.dtype = torch.bfloat16, device: Any = "cpu"
    ) -> Expander:
        """From a chat model, a run directory, or an adapter's own. Raises UserError if that is none of them, if the
        model has no chat template, or if the adapter belongs to another base."""
        base, adapter = resolve(path, adapter)
        model, tokenizer = load_chat_model(base, dtype)
        tokenizer.padding_side = "left"  # answers come after the last token
        if adapter is not None:
            check_base(adapter, base, model)
            try:
                with quiet():
                    model = PeftModel.from_pretrained(model, adapter)
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise UserError(f"{adapter}: cannot be loaded as an adapter of {base}: {_first_line(error)}") from error
        return cls(model.to(device).eval(), tokenizer)

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
        """n expansions of each prompt, sampled from the whole distribution (no top-k, no top-p). They are the same for
        the same prompts, n, seed and batch (rows in one forward)."""
        device = self.model.device
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        expansions: list[list[Expansion]] = []
        size = max(1, batch // n)
        for first in range(0, len(prompts), size):
            part = [messages(prompt) for prompt in prompts[first : first + size]]
            inputs = self.tokenizer.apply_chat_template(
                part, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(device)
            with torch.random.fork_rng():
                torch.manual_seed(sampler.seed_for(seed, first))
                ids = self.model.generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], num_return_sequences=n,
                    max_new_tokens=max_tokens, pad_token_id=self.tokenizer.pad_token_id, **settings,
                )  # fmt: skip
            answers = [self._expansion(row) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
            expansions += [answers[i * n : (i + 1) * n] for i in range(len(part))]
        return expansions

    def _expansion(self, ids: list[int]) -> Expansion:
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Expansion(text, any(i in self._ends for i in ids))

    @property
    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {self.tokenizer.eos_token_id, *ends}


def resolve(path: str, adapter: str | None = None) -> tuple[str, str | None]:
    """(base, adapter) of a chat model, of the run directory of a command that trains one, or of an adapter."""
    root = Path(path)
    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").exists():
            raise UserError(f"adapter: {adapter} holds no adapter_config.json; name the directory of an adapter")
        return path, adapter
    for folder in (root / "adapter", root):
        if (folder / "adapter_config.json").exists():
            return _named_base(folder), str(folder)
    if (root / "model" / "config.json").exists():
        return str(root / "model"), None
    if (root / "recipe.yaml").exists():
        raise UserError(f"{path}: this run has no adapter/ or model/ yet; let it end, or name a model")
    return path, None


def load_chat_model(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer, which has a chat template and a padding token. No code of the checkpoint runs."""
    startup.lap("inputs")
    what = "" if Path(path).exists() else "no such directory here, and as a hub id it "
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: {what}cannot be loaded as a language model: {_first_line(error)}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: its tokenizer has no chat template; take an instruct model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    startup.lap("read")
    return model, tokenizer


def write_card(folder: Path, base: str, base_fingerprint: str) -> None:
    """Says what an adapter belongs to."""
    card = {"base": base, "base_fingerprint": base_fingerprint, "template": template().hash}
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")


def check_base(adapter: str, base: str, model: torch.nn.Module) -> None:
    """Raises UserError if an adapter was trained on another model: by its fingerprint or, where the adapter is not this
    project's, by its name."""
    card = Path(adapter) / CARD
    if card.exists():
        said = json.loads(card.read_text())
        if said["base_fingerprint"] != fingerprint(dict(model.named_parameters())):
            raise UserError(f"adapter: {adapter} was trained on other weights ({said['base']}) than {base}; name those")
        return
    named = _named_base(Path(adapter))
    if named != base and Path(named).resolve() != Path(base).resolve():
        raise UserError(f"adapter: {adapter} was trained on {named}, not on {base}; name that as the model")


def _named_base(adapter: Path) -> str:
    config = adapter / "adapter_config.json"
    try:
        return str(json.loads(config.read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{config}: names no base_model_name_or_path; name the model and the adapter apart") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
