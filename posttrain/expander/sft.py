"""Supervised training of the prompt expander: a chat model learns to answer a prompt with its long caption.

    posttrain expander sft --config recipes/nano/expander_sft.yaml

TRL's SFTTrainer on messages of prompts/expander.md, with the loss on the completion's tokens alone. A pair that is
longer than max_length is left out and counted, never cut: TRL is given no limit, and what it made of the pairs is
compared with what the tokenizer's chat template makes of them before the first step. The run directory has recipe,
metrics.jsonl and summary.json as other runs have; checkpoints/ holds the trainer's own, from which --resume goes on.
The result is an ordinary PEFT adapter in adapter/ (with lora: null, a model in model/), which vLLM serves as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.expander.config import ExpanderSFTConfig
from posttrain.expander.model import load_chat_model, resolve, write_card
from posttrain.expander.template import messages, template
from posttrain.expander.trl_checkpoint import AtomicCheckpointCallback, PlainState, newest
from posttrain.log import log
from posttrain.model import clipping
from posttrain.model.fingerprint import fingerprint
from posttrain.model.load import quiet
from posttrain.preferences.sources import open_source
from posttrain.runs.guard import check_unchanged
from posttrain.runs.run import Run, peak_memory
from posttrain.runs.stop import StopSignals
from posttrain.validate import JUDGE_TARGETS

LOGGED = ("loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate")
"""What metrics.jsonl has of all that the trainer logs; entropy is of the next token, in nats."""
KEPT = ("model", "data", "heldout", "max_length", "steps", "batch", "micro_batch", "seed", "dtype", "lora")
"""What a resumed run cannot change."""


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str


def train(config: ExpanderSFTConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for what the user can mend."""
    procs = Processes()
    if resume and newest(Path(config.output) / "checkpoints") is not None:
        check_unchanged(config, "; restore it", kept=KEPT)
    training, heldout = read_pairs(config)
    base, adapter = resolve(config.model)
    if adapter is not None:
        raise UserError(f"model: {config.model} is an adapter or a run that trained one; name its base, {base}")
    torch.manual_seed(config.seed)  # peft draws the adapter from the global generator
    model, tokenizer = load_chat_model(base, getattr(torch, config.dtype))
    training, heldout = fitting(training, tokenizer, config), fitting(heldout, tokenizer, config)
    base_print = fingerprint(dict(model.named_parameters()))
    if config.lora is not None:
        model = with_adapter(model, config)
    with Run.create(config, resume, procs.main) as run:
        checkpoint = newest(run.path / "checkpoints") if resume else None
        run.start(config.steps, checkpoint[0] if checkpoint else 0)
        logger = _RunCallback(run, procs)
        with _quiet():
            trainer = make_trainer(model, tokenizer, training, heldout[: config.measured], config, logger)
            check_tokens(trainer, tokenizer, training)
            # Not `evaluate` before `train`, which would then take the model as it is: each process would train its own.
            trainer.args.eval_on_start = checkpoint is None
            with logger.signals:
                trainer.train(resume_from_checkpoint=str(checkpoint[1]) if checkpoint else None)
        if procs.main:
            before, after = _evaluations(run)
            folder = run.path / ("adapter" if config.lora is not None else "model")
            trained: Any = trainer.accelerator.unwrap_model(trainer.model)
            trained.save_pretrained(str(folder))
            if config.lora is None:
                tokenizer.save_pretrained(str(folder))
            write_card(folder, base, base_print)
            figures = {"before": before, "after": after, "steps": trainer.state.global_step}
            (folder / "README.md").write_text(model_card(config, figures, len(training), len(heldout)))
            run.summary({**figures, "pairs": len(training), "heldout": len(heldout), **peak_memory()})
    if logger.signals.received is signal.SIGINT:
        raise KeyboardInterrupt


class Trainer(PlainState, SFTTrainer):
    """TRL's, with checkpoints of safetensors and JSON."""


class RunningClip(TrainerCallback):
    """Sets the norm that TRL clips the next gradient to.

    The norms before it are in the trainer's log, which checkpoints hold, so a resumed run clips as one that was not
    interrupted.
    """

    def __init__(self, factor: float):
        self.factor = factor

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # TRL logs each step (logging_steps=1), so this has them all.
        norms = [row["grad_norm"] for row in state.log_history if "grad_norm" in row]
        args.max_grad_norm = clipping.limit([norm for norm in norms if 0 < norm < math.inf], self.factor)


def make_trainer(
    model: Any, tokenizer: Any, training: list[Pair], heldout: list[Pair], config: ExpanderSFTConfig, logger: Any = None
) -> SFTTrainer:
    """TRL's trainer of these pairs. Nothing is cut: they must fit."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, rest = divmod(config.batch, config.micro_batch * processes)
    if rest or not accumulation:
        raise UserError(f"batch: {config.batch} is no multiple of micro_batch times {processes} processes; change one")
    optim = config.optim
    on_gpu = torch.cuda.is_available()
    settings = SFTConfig(
        output_dir=str(Path(config.output) / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        per_device_eval_batch_size=config.micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=optim.lr,
        lr_scheduler_type="cosine",
        warmup_steps=optim.warmup_steps,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        weight_decay=optim.weight_decay,
        adam_epsilon=optim.eps,
        max_grad_norm=math.inf,  # see RunningClip
        max_length=None,  # the pairs that are too long have been left out
        packing=False,
        completion_only_loss=True,
        bf16=config.dtype == "bfloat16" and on_gpu,
        gradient_checkpointing=on_gpu,
        use_cpu=not on_gpu,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.checkpoint.every else "no",
        save_steps=config.checkpoint.every or 1,
        save_total_limit=config.checkpoint.keep,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=conversations(training),
        eval_dataset=conversations(heldout),
        processing_class=tokenizer,
        callbacks=[
            AtomicCheckpointCallback(),
            RunningClip(optim.clip_factor),
            *([logger] if logger is not None else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def with_adapter(model: Any, config: ExpanderSFTConfig) -> Any:
    """A PEFT model whose adapter is trained in float32."""
    assert config.lora is not None
    names = "|".join(map(re.escape, config.lora.targets or JUDGE_TARGETS))
    settings = PeftLoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        target_modules=rf".*\.({names})", task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        with _quiet():
            return get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.targets: {' '.join(str(error).split())}") from error


# ---- data -------------------------------------------------------------------------------------------------


def read_pairs(config: ExpanderSFTConfig) -> tuple[list[Pair], list[Pair]]:
    """(training, held out): as the files of `posttrain expander data` say, or by the hash of the prompt."""
    root = Path(config.data)
    if (root / "train.parquet").exists() and (root / "heldout.parquet").exists():
        return _read(str(root / "train.parquet")), _read(str(root / "heldout.parquet"))
    pairs = _read(config.data)

    # By the hash of the prompt: more pairs in the file do not move those that are there to the other side.
    def held(pair: Pair) -> bool:
        digest = hashlib.sha256(f"{config.seed}:{pair.prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < config.heldout * 2**64

    parts = [p for p in pairs if not held(p)], [p for p in pairs if held(p)]
    if not all(parts):
        raise UserError(
            f"data: {config.data}: {len(parts[0])} pairs to train on and {len(parts[1])} held out; give more prompts or"
            " change heldout"
        )
    return parts


def _read(path: str) -> list[Pair]:
    source = open_source(path)
    if not len(source):
        raise UserError(f"data: {path} holds no row; give pairs of prompt and completion")
    for column in ("prompt", "completion"):
        if column not in source.columns:
            raise UserError(f"data: {path} has no column {column}; it has {', '.join(source.columns)}")
    pairs = []
    for i in range(len(source)):
        try:
            values = [source[i][column] for column in ("prompt", "completion")]
        except (ValueError, KeyError) as error:
            raise UserError(f"{source.name(i)}: cannot be read: {error}") from None
        for column, value in zip(("prompt", "completion"), values):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{source.name(i)}: {column}: is empty or no text; mend or drop the row")
        pairs.append(Pair(*(value.strip() for value in values)))
    return pairs


def conversations(pairs: list[Pair]) -> datasets.Dataset:
    """TRL's conversational prompt and completion."""
    return datasets.Dataset.from_dict(
        {
            "prompt": [messages(pair.prompt) for pair in pairs],
            "completion": [[{"role": "assistant", "content": pair.completion}] for pair in pairs],
        }
    )


def tokens(pair: Pair, tokenizer: Any) -> tuple[list[int], int]:
    """A pair as the chat template writes it, and how many of its tokens a server is given before it answers."""
    asked = messages(pair.prompt)
    # What a server makes of the prompt must be how the training text begins.
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    answered = [*asked, {"role": "assistant", "content": pair.completion}]
    whole = tokenizer.apply_chat_template(answered, return_dict=False)
    return whole, len(before) if whole[: len(before)] == before else -1


def fitting(pairs: list[Pair], tokenizer: Any, config: ExpanderSFTConfig) -> list[Pair]:
    """The pairs of at most max_length tokens. Raises UserError if too few are, or for a template that says more than
    the pair in the answer: an expander that thinks aloud, or a prompt that is written otherwise once it is answered."""
    kept, longest = [], 0
    for pair in pairs:
        ids, asked = tokens(pair, tokenizer)
        answer = tokenizer.decode(ids[asked:], skip_special_tokens=True).strip() if asked > 0 else None
        if answer is None:
            raise UserError(
                f"model: {config.model}: its chat template writes a prompt otherwise once it is answered, so training"
                " would not see what a server sends; take another model"
            )
        if answer != pair.completion:
            raise UserError(
                f"model: {config.model}: its chat template writes an answer not as it is but as {answer!r}, so a server"
                " would send that; take a model that answers at once, such as an Instruct one"
            )
        longest = max(longest, len(ids))
        if len(ids) <= config.max_length:
            kept.append(pair)
    lost = len(pairs) - len(kept)
    if not kept or lost > config.max_dropped * len(pairs):
        raise UserError(
            f"max_length: {lost} of {len(pairs)} pairs are longer than {config.max_length} tokens (up to {longest}),"
            " more than max_dropped; raise one of them"
        )
    if lost:
        log.warning(f"{lost} of {len(pairs)} pairs are longer than max_length ({config.max_length}) and"
              f" left out; the longest has {longest} tokens")  # fmt: skip
    return kept


def check_tokens(trainer: SFTTrainer, tokenizer: Any, pairs: list[Pair]) -> None:
    """Raises RuntimeError if TRL made anything else of the pairs than the chat template: other tokens, another part of
    them trained on, or fewer pairs."""
    rows: Any = trainer.train_dataset
    if len(rows) != len(pairs):
        raise RuntimeError(f"TRL made {len(rows)} rows of {len(pairs)} pairs")
    for row, pair in zip(rows, pairs):
        ids, asked = tokens(pair, tokenizer)
        # -100 is torch's label of tokens that no loss is taken of.
        if row["input_ids"] != ids or row["labels"] != [-100] * asked + ids[asked:]:
            raise RuntimeError(f"TRL made other tokens or labels of {pair} than the chat template")


# ---- the run directory ------------------------------------------------------------------------------------


class _RunCallback(TrainerCallback):
    """Writes what the trainer logs as metrics of the run; Ctrl-C and SIGTERM save and end it."""

    def __init__(self, run: Run, procs: Processes):
        self.run, self.procs = run, procs
        self.signals = StopSignals()

    def on_step_end(self, args, state, control, **_):
        if self.procs.any(self.signals.received is not None):
            control.should_save = control.should_training_stop = True
        if state.global_step == state.max_steps:  # whatever eval_every and checkpoint.every say
            control.should_evaluate = control.should_save = True
        return control

    def on_log(self, args, state, control, logs=None, **_):
        values = {name: value for name, value in (logs or {}).items() if name.removeprefix("eval_") in LOGGED}
        if values:
            self.run.log(state.global_step, {name.replace("eval_", "eval/"): v for name, v in values.items()})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """As `quiet`, and without the bars of `datasets`."""
    datasets.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        datasets.enable_progress_bars()


def _evaluations(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last held-out figures."""
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    found = [
        {name: row[f"eval/{name}"] for name in ("loss", "mean_token_accuracy") if f"eval/{name}" in row}
        for row in rows
        if "eval/loss" in row
    ]
    return found[0], found[-1]


def model_card(config: ExpanderSFTConfig, figures: dict[str, Any], training: int, heldout: int) -> str:
    said = template()
    rows = [(name, figures["before"].get(name), value) for name, value in figures["after"].items()]
    table = "\n".join(f"| {name} | {old:.4f} | {new:.4f} |" for name, old, new in rows if old is not None)
    kind = "adapter" if config.lora is not None else "model"
    settings = json.dumps({k: asdict(config)[k] for k in ("lora", "optim", "batch", "dtype", "seed")})
    head = f"---\nbase_model: {config.model}\nlibrary_name: {'peft' if kind == 'adapter' else 'transformers'}\n"
    return "\n\n".join([
        head + "tags: [prompt-expander, sft, vllm]\n---",
        "# A prompt expander",
        f"{'A LoRA adapter for' if kind == 'adapter' else 'Trained from'} {config.model}. It answers a short prompt for"
        " an image model with one richer caption of the same image. Any chat server gives it the messages it was"
        f" trained on (template {said.hash}):",
        f"- system: {said.system}\n- user: the prompt",
        f"{figures['steps']} updates of {config.batch} pairs from {training}; {heldout} pairs are held out. Sample it"
        " at temperature 1: each answer chooses anew what the prompt leaves open.",
        f"| held out | before | after |\n| --- | --- | --- |\n{table}",
        f"Settings: `{settings}`",
    ]) + "\n"  # fmt: skip
