"""Supervised training of the prompt expander: a chat model learns to answer a prompt with its long caption.

    posttrain expander sft --config recipes/nano/expander_sft.yaml

TRL's SFTTrainer trains on the messages of prompts/expander.md, with the loss on the completion's tokens only, a thought
before the caption included. A pair longer than max_length is left out and counted, never truncated: TRL gets no limit,
and before the first step its tokens are compared with those of the tokenizer's chat template. The run directory has
recipe, metrics.jsonl and summary.json like other runs; --resume continues from the trainer's own checkpoints in
checkpoints/. The result is an ordinary PEFT adapter in adapter/ (with lora: null, a model in model/), which vLLM serves
unchanged.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from posttrain.config import clipping
from posttrain.config.sections import JUDGE_TARGETS
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.expander.chat_template import template
from posttrain.expander.config import ExpanderSFTConfig
from posttrain.expander.model import load_chat_model, resolve, write_card
from posttrain.expander.sft_pairs import Pair, conversations, fitting, read_pairs, tokens
from posttrain.expander.thinking import part_losses
from posttrain.expander.trl_checkpoint import AtomicCheckpointCallback, PlainState, newest
from posttrain.loading import quiet, without_revision
from posttrain.model.fingerprint import fingerprint
from posttrain.report.front_matter import card
from posttrain.report.page import write_report
from posttrain.report.public import public
from posttrain.runs.files import apply_umask
from posttrain.runs.guard import check_unchanged
from posttrain.runs.run import Run, peak_memory
from posttrain.runs.stop import StopSignals
from prompts.parse import read_lines

LOGGED = ("loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate")
"""Values of the trainer's log that metrics.jsonl keeps; entropy is that of the next token, in nats."""
KEPT = ("model", "data", "thinking", "heldout", "max_length", "steps", "batch", "micro_batch", "seed", "dtype", "lora")
"""Fields that must not change on resume."""


def train(config: ExpanderSFTConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for a mistake that the user can fix."""
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
    base_print = fingerprint(dict(model.named_parameters()))  # of the base, so before the adapter is added
    if config.lora is not None:
        model = with_adapter(model, config)
    with Run.create(config, resume, procs.main) as run:
        checkpoint = newest(run.path / "checkpoints") if resume else None
        run.start(config.steps, checkpoint[0] if checkpoint else 0)
        logger = _RunCallback(run, procs)
        if config.thinking:
            thought = [pair for pair in heldout[: config.measured] if pair.thought]
            logger.measured = [tokens(pair, tokenizer) for pair in thought]
            logger.decode = tokenizer.decode
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
            trained.save_pretrained(str(folder))  # as PEFT writes it, which vLLM reads
            if config.lora is None:
                tokenizer.save_pretrained(str(folder))
            apply_umask(folder)
            write_card(folder, base, base_print, config.thinking)
            figures = {"before": before, "after": after, "steps": trainer.state.global_step}
            (folder / "README.md").write_text(model_card(config, figures, len(training), len(heldout)))
            run.stopped = logger.signals.received
            run.summary({**figures, "pairs": len(training), "heldout": len(heldout), **peak_memory()})
            write_report(run.path)
    # Only now, when everything is written: Ctrl-C ends the command as an interrupt.
    if logger.signals.received is signal.SIGINT:
        raise KeyboardInterrupt


class Trainer(PlainState, SFTTrainer):
    """TRL's trainer, with checkpoints of safetensors and JSON."""


class RunningClip(TrainerCallback):
    """Sets the norm to which TRL clips the next gradient, from the median of recent norms.

    The norms come from the trainer's log, which is in every checkpoint, so a resumed run clips like an uninterrupted
    one.
    """

    def __init__(self, factor: float):
        self.factor = factor

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # TRL logs each step (logging_steps=1), so this has them all.
        norms = [row["grad_norm"] for row in state.log_history if 0 < row.get("grad_norm", 0) < math.inf]
        args.max_grad_norm = clipping.limit(norms, self.factor)


def make_trainer(
    model: Any, tokenizer: Any, training: list[Pair], heldout: list[Pair], config: ExpanderSFTConfig, logger: Any = None
) -> SFTTrainer:
    """TRL's trainer for these pairs, which must all fit: nothing is truncated."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # TRL takes whole micro-batches of each process.
    accumulation, rest = divmod(config.batch, config.micro_batch * processes)
    if rest or not accumulation:
        raise UserError(
            f"batch: {config.batch} is not a multiple of micro_batch times {processes} processes; change one"
        )
    callbacks: list[TrainerCallback] = [AtomicCheckpointCallback(), RunningClip(config.optim.clip_factor)]
    if logger is not None:
        callbacks.append(logger)
    trainer = Trainer(
        model=model,
        args=settings(config, accumulation),
        train_dataset=conversations(training),
        eval_dataset=conversations(heldout),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # prints every log as a dict
    return trainer


def settings(config: ExpanderSFTConfig, accumulation: int) -> SFTConfig:
    """TRL's settings for a recipe; an update takes `accumulation` micro-batches of each process."""
    optim = config.optim
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
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
        max_length=None,  # pairs that are too long have been left out already
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


def with_adapter(model: Any, config: ExpanderSFTConfig) -> Any:
    """A PEFT model whose adapter is trained in float32."""
    assert config.lora is not None
    names = "|".join(map(re.escape, config.lora.targets or JUDGE_TARGETS))
    # A regular expression, so that PEFT matches whole layer names.
    lora = PeftLoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        target_modules=rf".*\.({names})", task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        with _quiet():
            return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora.targets: {' '.join(str(error).split())}") from error


def check_tokens(trainer: SFTTrainer, tokenizer: Any, pairs: list[Pair]) -> None:
    """Raises RuntimeError if TRL's tokens, labels or number of rows differ from those of the chat template."""
    rows: Any = trainer.train_dataset
    if len(rows) != len(pairs):
        raise RuntimeError(f"TRL made {len(rows)} rows of {len(pairs)} pairs")
    for row, pair in zip(rows, pairs):
        ids, prompt_length = tokens(pair, tokenizer)
        labels = [-100] * prompt_length + ids[prompt_length:]  # -100: no loss on the prompt
        if row["input_ids"] != ids or row["labels"] != labels:
            raise RuntimeError(f"TRL's tokens or labels of {pair} differ from those of the chat template")


# ---- the run directory ------------------------------------------------------------------------------------


class _RunCallback(TrainerCallback):
    """Writes what the trainer logs as metrics of the run; Ctrl-C and SIGTERM save and end it."""

    def __init__(self, run: Run, procs: Processes):
        self.run, self.procs = run, procs
        self.signals = StopSignals()
        self.measured: list[tuple[list[int], int]] = []
        """Held-out answers with a thought, as `tokens` gives them: the losses of thought and caption are logged."""
        self.decode: Callable[[list[int]], str] = str

    def on_evaluate(self, args, state, control, model=None, **_):
        if self.measured and self.procs.main:
            losses = part_losses(model, self.measured, self.decode)
            self.run.log(state.global_step, {f"eval/{name}": value for name, value in losses.items()})

    def on_step_end(self, args, state, control, **_):
        if self.procs.any(self.signals.received is not None):
            control.should_save = control.should_training_stop = True
        if state.global_step == state.max_steps:  # whatever eval_every and checkpoint.every say
            control.should_evaluate = control.should_save = True
        return control

    def on_log(self, args, state, control, logs=None, **_):
        values = {}
        for name, value in (logs or {}).items():
            if name.removeprefix("eval_") in LOGGED:
                values[name.replace("eval_", "eval/")] = value
        if values:
            self.run.log(state.global_step, values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`quiet`, and without the progress bars of `datasets`."""
    datasets.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        datasets.enable_progress_bars()


def _evaluations(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last held-out metrics."""
    evaluations = []
    for row in read_lines(run.path / "metrics.jsonl"):
        if "eval/loss" in row:
            names = [name for name in ("loss", "mean_token_accuracy") if f"eval/{name}" in row]
            evaluations.append({name: row[f"eval/{name}"] for name in names})
    return evaluations[0], evaluations[-1]


def model_card(config: ExpanderSFTConfig, figures: dict[str, Any], training: int, heldout: int) -> str:
    before, settings = figures["before"], asdict(config)
    is_adapter = config.lora is not None
    front = {
        "base_model": without_revision(public(config.model)),
        "library_name": "peft" if is_adapter else "transformers",
        "tags": ["prompt-expander", "sft", "vllm"],
    }
    return card(
        "sft_card.md",
        front,
        config=config,
        base=public(config.model),
        adapter=is_adapter,
        template=template(),
        steps=figures["steps"],
        training=training,
        heldout=heldout,
        rows=[[name, before[name], after] for name, after in figures["after"].items() if name in before],
        settings=json.dumps({name: settings[name] for name in ("lora", "optim", "batch", "dtype", "seed")}),
    )
