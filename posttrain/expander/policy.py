"""The chat model that expands prompts, with its trained adapter: loading, sampling and features of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from posttrain.config.sections import LoraConfig
from posttrain.errors import UserError, first_line
from posttrain.expander.chat_template import messages, system_text, template
from posttrain.expander.gdpo_config import ChatModelConfig
from posttrain.expander.model import (
    check_base,
    end_tokens,
    load_chat_model,
    resolve,
    trained_thinking,
    until_end,
    write_card,
)
from posttrain.expander.score import Expansion
from posttrain.expander.thinking import LONGEST, is_opened, split
from posttrain.loading import load_adapter
from posttrain.model.fingerprint import fingerprint
from posttrain.runs.files import apply_umask
from prompts.records import PromptRecord

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Policy:
    """A causal language model with one trained LoRA adapter, and its tokenizer."""

    def __init__(self, config: ChatModelConfig, lora: LoraConfig, seed: int, device: torch.device):
        """Raises UserError for a path without a chat model, or an adapter that does not fit."""
        path, adapter = resolve(config.path, config.adapter)
        base, self.tokenizer = load_chat_model(path, getattr(torch, config.dtype))
        self.tokenizer.padding_side = "left"  # generation continues after the last token, which must not be padding
        self.base, self.base_fingerprint = path, fingerprint(dict(base.named_parameters()))
        if adapter is not None:
            check_base(adapter, path, base)
        base.to(device)
        if adapter is not None:
            self.model: Any = load_adapter(base, adapter, f"{adapter} on {path}", trainable=True)
        else:
            torch.manual_seed(seed)  # of the adapter's A factors
            targets = list(TARGETS if lora.targets is None else lora.targets)
            options = PeftLora(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
            try:
                self.model = get_peft_model(base, options)
            except ValueError as error:
                raise UserError(f"lora.targets: {first_line(error)}") from error
        self.ends = end_tokens(base, self.tokenizer)
        self.thinking = trained_thinking(path, adapter) if config.thinking is None else config.thinking
        """Whether it is asked for a thought before the caption."""
        parts = (system_text(self.thinking), template().user.replace("$prompt", ""))
        self.template = "\n".join(part for part in parts if part)
        # Some chat templates open a thought themselves, for any prompt.
        self._opened = is_opened(self._render([PromptRecord("")], tokenize=False)[0])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def expansion(self, record: PromptRecord, ids: Sequence[int]) -> Expansion:
        """The expansion that these generated tokens stand for."""
        ended = bool(ids) and ids[-1] in self.ends
        body = list(ids[:-1]) if ended else list(ids)
        special_ids = set(self.tokenizer.all_special_ids)
        text = self.tokenizer.decode(body, skip_special_tokens=True)
        # Decoding drops special tokens, and the format check must see them.
        tokens_of_special = self.tokenizer.convert_ids_to_tokens([i for i in body if i in special_ids])
        if not self.thinking:
            return Expansion(record, text.strip(), ended, tokens_of_special, len(body))
        answer = split(text, self._opened)
        length = len(self.tokenizer(answer.thought).input_ids) if answer.thought else 0
        return Expansion(
            record, answer.caption, ended, tokens_of_special, len(body), answer.thought, length,
            answer.well_formed and length <= LONGEST,
        )  # fmt: skip

    def _render(self, records: Sequence[PromptRecord], **options: Any) -> Any:
        """The chat prompts of these records, up to where the answer begins."""
        conversations = [messages(record.prompt, self.thinking) for record in records]
        return self.tokenizer.apply_chat_template(conversations, add_generation_prompt=True, **options)

    @torch.no_grad()
    def write(
        self, records: Sequence[PromptRecord], n: int, place: int, max_tokens: int, temperature: float, seed: int,
        batch: int = 64,
    ) -> list[Expansion]:  # fmt: skip
        """n neighbouring expansions for each record, determined by weights and seed. Restores the global generators.

        `place` is the index of the first expansion among those of several calls.
        """
        rows: list[PromptRecord] = []
        for record in records:
            rows += [record] * n
        settings = GenerationConfig(
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_tokens,
            eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        training = self.model.training
        self.model.eval()
        expansions: list[Expansion] = []
        with torch.random.fork_rng():
            for first in range(0, len(rows), batch):
                torch.manual_seed(seed + place + first)  # by position, so that a resumed run draws the same
                part = rows[first : first + batch]
                inputs = self._render(part, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
                inputs = inputs.to(self.device)
                out = self.model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
                for record, ids in zip(part, out.tolist()):
                    expansions.append(self.expansion(record, until_end(ids, self.ends)))
        self.model.train(training)
        return expansions

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """(N, E) mean last hidden states on the CPU; the adapter is off, so that features do not move in training."""
        training = self.model.training
        self.model.eval()
        parts = []
        with self.model.disable_adapter():
            for first in range(0, len(texts), batch):
                # An empty text has no token to take the mean over.
                part = [text or self.tokenizer.eos_token for text in texts[first : first + batch]]
                inputs = self.tokenizer(part, return_tensors="pt", padding=True, padding_side="right").to(self.device)
                states = self.model(
                    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, output_hidden_states=True
                ).hidden_states[-1].float()  # fmt: skip
                mask = inputs.attention_mask[..., None]  # padding has a hidden state too, which is no part of the mean
                parts.append(((states * mask).sum(1) / mask.sum(1)).cpu())
        self.model.train(training)
        return torch.cat(parts)

    def load(self, directory: Path) -> None:
        """Loads the adapter's weights from a checkpoint."""
        set_peft_model_state_dict(self.model, load_file(directory / "adapter_model.safetensors"))

    def save(self, directory: Path, card: str) -> None:
        """Saves the adapter for PEFT, vLLM and `posttrain expand`, with a model card."""
        self.model.save_pretrained(str(directory), selected_adapters=["default"])
        apply_umask(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")
        write_card(directory, self.base, self.base_fingerprint, self.thinking)
