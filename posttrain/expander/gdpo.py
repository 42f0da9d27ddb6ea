"""GDPO of the prompt expander: a chat model learns from the images that are drawn from its expansions.

    posttrain expander gdpo --config recipes/nano/expander_gdpo.yaml

TRL's GRPOTrainer does the sampling, the advantages (`normalize_then_sum`, which is GDPO) and the loss. This file gives
it reward functions that share one evaluation (score.py). The callback (callbacks.py) checks at each step that diversity
keeps its weight, and writes the run directory. Checkpoints are TRL's, in checkpoints/checkpoint-N.

Metrics of a step are TRL's own and, for the expansions of all processes:

| metric | what it is |
|---|---|
| seconds/generate, render, score, train | parts of the step's time, on the main process |
| flat/NAME | share of the groups in which a reward differs by no more than its noise |
| noise_share | share of the advantages' variance that noise can explain |
| format, format/CAUSE, safe | shares of the expansions |
| thought/tokens, thought/empty | of an expander that thinks: mean tokens of a thought, share of answers without one |
| pool/CLASS | prompts of the adaptive pool in this class |
| cut, cut_tokens | share of expansions longer than K2's text length, and the mean number of tokens they lose |
| renders, missing_images | images drawn on a process (equal expansions of a group share one); share of missing ones |
| diversity_weight | weight of the diversity reward in this step |
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.expander.callbacks import GDPOCallback, SharedRewards, reward_weights
from posttrain.expander.chat_template import messages, template
from posttrain.expander.evaluate import ExpanderEvaluator
from posttrain.expander.gdpo_config import ExpanderGDPOConfig
from posttrain.expander.model import CARD, write_card
from posttrain.expander.policy import Policy
from posttrain.expander.pooled import PooledPrompts
from posttrain.expander.renderer import make_renderer
from posttrain.expander.score import Scorer
from posttrain.expander.trl_checkpoint import AtomicCheckpointCallback, PlainState, newest
from posttrain.loading import without_revision
from posttrain.log import log
from posttrain.model import sampler
from posttrain.report.front_matter import card
from posttrain.report.public import public
from posttrain.runs.run import Run
from posttrain.training.loop import open_run, resuming, try_rewards
from prompts.records import read_prompts
from rewards.diversity import Features

ABLATED = {
    "removed": "the diversity reward has weight 0",
    "annealed": "the diversity reward's weight falls to 0 over the first half",
}


def train(config: ExpanderGDPOConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes()
    if config.groups.prompts_per_step % procs.size:
        raise UserError(
            f"groups.prompts_per_step: {config.groups.prompts_per_step} is not divisible by {procs.size} processes,"
            " each of which compares whole groups; use a multiple"
        )
    resume = resuming(config, resume, procs)
    records, heldout = read_prompts(config.prompts.train), read_prompts(config.prompts.heldout)
    try_rewards(config, heldout, records, ["expansion"])
    # All that may be missing or too large is loaded before the run directory is made.
    policy = Policy(config.model, config.lora, config.seed, procs.device)
    renderer = make_renderer(config.renderer, procs.device)
    features = Features(config.diversity.path, config.diversity.batch, str(procs.device))

    with open_run(config, resume, procs) as run, warnings.catch_warnings():
        # The libraries call each other by old names.
        warnings.filterwarnings("ignore", r".*gradient_checkpointing. is deprecated", FutureWarning)
        scorer = Scorer(config, renderer, features, policy.template, run.urls)
        rewards = SharedRewards(config, policy, scorer, records, procs)
        generation = config.generation
        write = functools.partial(
            policy.write, max_tokens=generation.max_tokens, temperature=generation.temperature, seed=config.eval.seed
        )
        evaluator = ExpanderEvaluator(heldout, config.eval, scorer, write, policy.embed, procs, policy.thinking)
        # `row` reaches the reward functions, which look up the record.
        rows = [{"prompt": messages(r.prompt, policy.thinking), "row": i} for i, r in enumerate(records)]
        trainer = Trainer(
            model=policy.model,
            reward_funcs=rewards.functions(),  # type: ignore[arg-type]
            args=settings(config, procs),
            train_dataset=Dataset.from_list(rows),
            processing_class=policy.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)  # prints every log as a dict
        checkpoint = newest(run.path / "checkpoints") if resume else None
        saved = None if checkpoint is None else checkpoint[1]
        _check_base(run, policy, saved)
        if config.pool.kind == "adaptive":
            trainer.pooled = PooledPrompts(config, records, procs, policy.thinking, saved)
        if procs.main:
            write_card(run.path, policy.base, policy.base_fingerprint, policy.thinking)
        callback = GDPOCallback(config, run, procs, trainer, rewards, evaluator, saved)
        # In this order: the second callback seals what the first one adds to a checkpoint.
        trainer.add_callback(callback)
        trainer.add_callback(AtomicCheckpointCallback)
        run.start(config.steps, callback.first)
        if config.ablation.diversity != "kept":
            log.info(f"ABLATION: {ABLATED[config.ablation.diversity]}")
        callback.begin()
        if callback.first < config.steps:
            with callback.signals:
                trainer.train(resume_from_checkpoint=str(saved) if saved is not None else None)
        elif saved is not None:  # finished before: the adapter is written again as the checkpoint has it
            policy.load(saved)
        callback.finish()
        if procs.main:
            policy.save(run.path / "adapter", model_card(config, policy, callback.evaluations[-1]["figures"]))


def _check_base(run: Run, policy: Policy, saved: Path | None) -> None:
    """Raises UserError if the run would go on with another chat model than it was trained on."""
    if saved is None:
        return
    trained_on = json.loads((run.path / CARD).read_text())["base_fingerprint"]
    if trained_on != policy.base_fingerprint:
        raise UserError(f"model.path: {policy.base} has other weights than what {saved} was trained on; restore them")


class Trainer(PlainState, GRPOTrainer):
    """TRL's trainer, in which a resumed run sees the prompts in the same order as an uninterrupted one, and a pool may
    choose them."""

    pooled: PooledPrompts | None = None

    # TRL has no public hook between its loader and the generation.
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.pooled is not None:
            inputs = self.pooled.inputs(self.state.global_step + 1)
        return super()._generate_and_score_completions(inputs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        trl: Any = super()._get_train_sampler(dataset)
        return PromptsByEpoch(
            trl.data_source, trl.mini_repeat_count, trl.batch_size, trl.repeat_count, trl.shuffle, trl.seed
        )


class PromptsByEpoch(RepeatSampler):
    """Seeds the order of prompts by epoch. TRL uses one generator for all epochs, whose state no checkpoint has."""

    def set_epoch(self, epoch: int) -> None:
        # From seed and epoch alone, as all draws of a run.
        assert self.seed is not None
        self.generator.manual_seed(sampler.seed_for(self.seed, epoch))


def settings(config: ExpanderGDPOConfig, procs: Processes) -> TRLConfig:
    """TRL's settings for a recipe."""
    groups, optim, generation = config.groups, config.optim, config.generation
    per_process = groups.prompts_per_step * groups.group_size // procs.size
    if per_process % groups.micro_batch:
        raise UserError(
            f"groups.micro_batch: {groups.micro_batch} does not divide the {per_process} expansions of a process;"
            " lower it"
        )
    cuda = procs.device.type == "cuda"
    # generation.vllm is handed on as it is, so TRL may not know a name in it.
    try:
        return TRLConfig(
            output_dir=str(Path(config.output) / "checkpoints"),
            multi_objective_aggregation="normalize_then_sum",
            reward_weights=reward_weights(config, 0),
            num_generations=groups.group_size,
            per_device_train_batch_size=groups.micro_batch,
            gradient_accumulation_steps=per_process // groups.micro_batch,
            max_steps=config.steps,
            max_completion_length=generation.max_tokens,
            temperature=generation.temperature,
            top_p=1.0,  # a truncated distribution is not the one whose probabilities the loss uses
            top_k=0,  # off
            beta=optim.kl,
            epsilon=optim.clip_low,
            epsilon_high=optim.clip_high,
            learning_rate=optim.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=optim.warmup_steps,
            max_grad_norm=optim.max_grad_norm,
            weight_decay=0.0,
            bf16=config.model.dtype == "bfloat16",
            gradient_checkpointing=cuda,
            ddp_find_unused_parameters=False,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            remove_unused_columns=False,  # TRL would drop `row`, which the reward functions need
            logging_steps=1,
            save_strategy="steps",
            save_steps=config.checkpoint.every or config.steps,
            save_total_limit=config.checkpoint.keep,
            seed=config.seed,
            report_to="none",
            disable_tqdm=True,
            use_vllm=generation.use_vllm,
            **{f"vllm_{name}": value for name, value in generation.vllm.items()},
        )
    except TypeError as error:
        raise UserError(
            f"generation.vllm: {error}; use the fields of TRL's GRPOConfig without the prefix vllm_"
        ) from None


def model_card(config: ExpanderGDPOConfig, policy: Policy, figures: dict[str, float | None]) -> str:
    front = {
        "base_model": without_revision(public(policy.base)),
        "library_name": "peft",
        "tags": ["lora", "vllm", "prompt-expansion"],
    }
    ablation = config.ablation.diversity
    return card(
        "gdpo_card.md",
        front,
        config=config,
        renderer=public(config.renderer.path),
        prompts=public(config.prompts.train),
        base=public(policy.base),
        ablation="" if ablation == "kept" else ABLATED[ablation],
        template=template(),
        rows=[[name, value] for name, value in figures.items() if value is not None],
    )
