"""The chat model that expands prompts, with the adapter that is trained: loading, sampling, and its texts' features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from posttrain.config.sections import LoraConfig
from posttrain.errors import UserError
from posttrain.expander.config import ChatModelConfig
from posttrain.expander.model import check_base, load_chat_model, resolve, write_card
from posttrain.expander.score import Expansion
from posttrain.expander.template import messages, template
from posttrain.model.fingerprint import fingerprint
from prompts.records import PromptRecord

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Policy:
    """A causal language model with one trained LoRA adapter, and its tokenizer."""

    def __init__(self, config: ChatModelConfig, lora: LoraConfig, seed: int, device: torch.device):
        """Raises UserError for what is no chat model, or an adapter that does not fit."""
        path, adapter = resolve(config.path, config.adapter)
        base, self.tokenizer = load_chat_model(path, getattr(torch, config.dtype))
        self.tokenizer.padding_side = "left"  # answers come after the last token
        self.base, self.base_fingerprint = path, fingerprint(dict(base.named_parameters()))
        if adapter is not None:
            check_base(adapter, path, base)
        base.to(device)
        try:
            if adapter is not None:
                self.model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True)
            else:
                torch.manual_seed(seed)
                targets = list(TARGETS if lora.targets is None else lora.targets)
                options = PeftLora(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
                self.model = get_peft_model(base, options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            what = "lora.targets" if adapter is None else f"model: {adapter} as an adapter of {path}"
            raise UserError(f"{what}: {str(error).strip().splitlines()[0]}") from error
        ends = base.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.ends = list(dict.fromkeys([self.tokenizer.eos_token_id, *ends]))
        """Tokens that end an expansion."""
        self.template = "\n".join(part for part in (template().system, template().user.replace("$prompt", "")) if part)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def expansion(self, record: PromptRecord, ids: Sequence[int]) -> Expansion:
        """What the tokens that the model wrote come to."""
        ended = bool(ids) and ids[-1] in self.ends
        body = list(ids[:-1]) if ended else list(ids)
        special = [i for i in body if i in set(self.tokenizer.all_special_ids)]
        text = self.tokenizer.decode(body, skip_special_tokens=True).strip()
        return Expansion(record, text, ended, self.tokenizer.convert_ids_to_tokens(special), len(body))

    @torch.no_grad()
    def write(
        self, records: Sequence[PromptRecord], n: int, place: int, max_tokens: int, temperature: float, seed: int,
        batch: int = 64,
    ) -> list[Expansion]:  # fmt: skip
        """n neighbours for each record, the same for the same weights and seed. Leaves the global generators alone.

        `place`: how many expansions the call's first one comes after, if it is one of several calls.
        """
        rows = [record for record in records for _ in range(n)]
        settings = GenerationConfig(
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_tokens,
            eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        training = self.model.training
        self.model.eval()
        found: list[Expansion] = []
        with torch.random.fork_rng():
            for first in range(0, len(rows), batch):
                torch.manual_seed(seed + place + first)
                part = rows[first : first + batch]
                inputs = self.tokenizer.apply_chat_template(
                    [messages(record.prompt) for record in part], add_generation_prompt=True, tokenize=True,
                    return_dict=True, return_tensors="pt", padding=True,
                ).to(self.device)  # fmt: skip
                out = self.model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
                found += [self.expansion(record, self._until_end(ids)) for record, ids in zip(part, out.tolist())]
        self.model.train(training)
        return found

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """(N, E) mean of the last hidden states of the model without its adapter, on the CPU; zero for no text."""
        training = self.model.training
        self.model.eval()
        parts = []
        with self.model.disable_adapter():
            for first in range(0, len(texts), batch):
                part = [text or self.tokenizer.eos_token for text in texts[first : first + batch]]
                inputs = self.tokenizer(part, return_tensors="pt", padding=True, padding_side="right").to(self.device)
                states = self.model(
                    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, output_hidden_states=True
                ).hidden_states[-1].float()  # fmt: skip
                mask = inputs.attention_mask[..., None]
                parts.append(((states * mask).sum(1) / mask.sum(1)).cpu())
        self.model.train(training)
        return torch.cat(parts)

    def load(self, directory: Path) -> None:
        """The adapter's weights as a checkpoint has them."""
        set_peft_model_state_dict(self.model, load_file(directory / "adapter_model.safetensors"))

    def save(self, directory: Path, card: str) -> None:
        """The adapter as PEFT, vLLM and `posttrain expand` load it, with a model card."""
        self.model.save_pretrained(str(directory), selected_adapters=["default"])
        (directory / "README.md").write_text(card, encoding="utf-8")
        write_card(directory, self.base, self.base_fingerprint)

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(ids) if token in self.ends]
        return ids[: ends[0] + 1] if ends else ids
