"""The preflight of expander gdpo: a step of TRL's trainer on a few prompts, with the code of expander/gdpo.py."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from transformers import PrinterCallback, TrainerCallback

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.expander import gdpo
from posttrain.expander.callbacks import SharedRewards
from posttrain.expander.chat_template import messages
from posttrain.expander.gdpo_config import ExpanderGDPOConfig
from posttrain.expander.policy import Policy
from posttrain.expander.renderer import make_renderer
from posttrain.expander.score import Scorer
from posttrain.preflight.checks import Row, Skip, phase
from posttrain.preflight.common import SHOWN, Checks
from posttrain.training.loop import try_rewards
from prompts.records import PromptRecord, read_prompts
from rewards.diversity import Features

PROMPTS = 2
"""Most prompts of the tested step."""


def rows(config: ExpanderGDPOConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    if procs.size > 1:
        raise UserError("posttrain preflight: checks expander gdpo in one process; start it without a launcher")
    records = read_prompts(config.prompts.train)
    try_rewards(config, records, records, ["expansion"])
    phase("the chat model is read")
    policy = Policy(config.model, config.lora, config.seed, procs.device)
    phase("the renderer is read")
    renderer = make_renderer(config.renderer, procs.device)
    features = Features(config.diversity.path, config.diversity.batch, str(procs.device))
    few = min(config.groups.prompts_per_step, PROMPTS)
    expansions = few * config.groups.group_size
    # The largest micro-batch that divides the smaller step, as the recipe's own divides its step.
    micro = max(n for n in range(1, config.groups.micro_batch + 1) if expansions % n == 0)
    groups = changed(config.groups, prompts_per_step=few, micro_batch=micro)
    small = changed(config, groups=groups, output=str(folder / "run"), steps=1)
    # The first step of a warm-up has a rate of 0 and moves nothing.
    small.optim = changed(config.optim, warmup_steps=0)
    small.checkpoint = changed(config.checkpoint, every=0)
    return GDPOChecks(config, small, procs, policy, renderer, features, records, folder).run()


class _StepTimer(TrainerCallback):
    """Records TRL's metrics of a step, and how long it takes."""

    def __init__(self) -> None:
        self.logs: dict[str, float] = {}
        self.began = self.ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()
        control.should_save = False  # nothing of this step is kept

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        # At the end TRL logs once more, a summary without the step's own loss.
        if "loss" in logs:
            self.logs = dict(logs)


class GDPOChecks(Checks):
    def __init__(
        self, config: ExpanderGDPOConfig, small: ExpanderGDPOConfig, procs: Processes, policy: Policy, renderer: Any,
        features: Features, records: list[PromptRecord], folder: Path,
    ):  # fmt: skip
        super().__init__(config, procs, folder, "groups.micro_batch or renderer.micro_batch")
        self.small, self.policy, self.renderer, self.features, self.records = small, policy, renderer, features, records
        self.timer = _StepTimer()
        self.parts = ["generate", "train"]
        """Of a step; those of scoring are known after one."""

    def run(self) -> list[Row]:
        images = self.config.groups.prompts_per_step * self.config.groups.group_size
        with contextlib.ExitStack() as servers:
            self.check("judges", lambda: self.judges(servers))
            self.check("step", self.step)
        # Without the servers: they may share the GPU.
        self.check("cost", lambda: self.cost(self.parts, images, "expansions in one process"))
        self.check("export", self.export)
        return self.rows

    def judged_images(self) -> tuple[list[Any], Sequence[PromptRecord]]:
        """Draws the unexpanded prompts."""
        prompts = [record.prompt for record in self.records[:SHOWN]]
        images = [image for image in self.renderer(prompts, range(len(prompts))).images if image is not None]
        measured = f"{len(images)} of {counted(len(prompts), 'image')} drawn"
        self.rows.append(Row("renderer", len(images) == len(prompts), measured, "see what the renderer's server says"))
        return images, self.records

    def step(self) -> Iterator[Row]:
        """Runs a step: expansions are generated, drawn, scored, and trained on."""
        rewards = self.asked(self.small.rewards)
        if all(spec.heldout_only for spec in rewards):
            raise Skip("no reward can be asked")
        config = changed(self.small, rewards=rewards)
        scorer = Scorer(config, self.renderer, self.features, self.policy.template, self.urls or {})
        scorer.noise = self.noise  # as a run has it from its first evaluation
        shared = SharedRewards(config, self.policy, scorer, self.records, self.procs)
        data = []
        for i, record in enumerate(self.records):
            data.append({"prompt": messages(record.prompt, self.policy.thinking), "row": i})
        trainer = gdpo.Trainer(
            model=self.policy.model,
            reward_funcs=shared.functions(),  # type: ignore[arg-type]
            args=gdpo.settings(config, self.procs),
            train_dataset=Dataset.from_list(data),
            processing_class=self.policy.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.timer)
        before = self._adapter()
        with warnings.catch_warnings():  # the libraries call each other by old names
            warnings.filterwarnings("ignore", r".*gradient_checkpointing. is deprecated", FutureWarning)
            trainer.train()
        scored, size = shared.scored, config.groups.group_size
        assert scored is not None
        self._time(shared, scored.seconds)
        yield from self._scores(scored, size)
        loss, norm = self.timer.logs.get("loss", math.nan), self.timer.logs.get("grad_norm", math.nan)
        # Without a difference in scores every advantage is 0, and so is the gradient: no fault of the code.
        flat = all(scored.figures(size)[f"flat/{name}"] == 1.0 for name in scorer.trained)
        measured = f"loss {loss:.4g}, gradient norm {norm:.3g}"
        measured += "; no reward tells these expansions apart, so there is nothing to learn from" if flat else ""
        good = math.isfinite(loss) and math.isfinite(norm) and (norm > 0 or flat)
        yield Row("loss and gradient", good, measured, "use model.dtype float32; if that does not help, report it")
        after = self._adapter()
        moved = sum(not torch.equal(before[name], after[name]) for name in after)
        self.moved = moved > 0
        if flat and not self.moved:
            yield Row("policy moves", None, "no reward tells these expansions apart")
        else:
            yield Row(
                "policy moves", self.moved, f"{moved} of {counted(len(after), 'tensor')} changed", "raise optim.lr"
            )

    def _scores(self, scored: Any, size: int) -> Iterator[Row]:
        """Checks expansions, images and scores. Each expansion that passes format and safety is drawn once."""
        figures = scored.figures(size)
        passed, count = int(scored.gate_N.sum()), len(scored.gate_N)
        measured = f"{passed} of {counted(count, 'expansion')} passed format and safety"
        causes = Counter(itertools.chain(*scored.causes_N, *scored.unsafe_N))
        for cause, times in causes.most_common():
            measured += f"; {times} fail {cause}"
        yield Row("expansions", passed > 0, measured, "train with expander sft first, or raise generation.max_tokens")
        # Only what passed the gate is drawn.
        images = [image for image, gate in zip(scored.images_N, scored.gate_N) if gate]
        missing = images.count(None)
        # Equal expansions share an image, so there may be fewer renders than expansions.
        measured = (
            f"{counted(scored.renders, 'image')} drawn for {counted(len(images), 'expansion')}, {missing} missing"
        )
        yield Row("one render each", missing == 0 and scored.renders <= count, measured, "see the renderer's server")
        for k, name in enumerate(scored.names):
            valid, flat = int(scored.valid_NK[:, k].sum()), figures[f"flat/{name}"]
            measured = f"{valid} of {counted(count, 'score')} given; {flat:.0%} of the groups are flat"
            if not valid and not scored.failures:
                yield Row(f"scores of {name}", None, "it does not apply to these prompts")
                continue
            if not valid:
                measured += f"; {scored.failures.most_common(1)[0][0]}"
            yield Row(f"scores of {name}", valid > 0, measured, "fix the reward: it gave no score")

    def _time(self, shared: SharedRewards, scoring: Mapping[str, float]) -> None:
        """The seconds of a step of the recipe and of an evaluation, from those of the smaller step."""
        config, self.parts = self.config, ["generate", *scoring, "train"]
        scale = config.groups.prompts_per_step / self.small.groups.prompts_per_step
        self.seconds["generate"] = scale * (shared.called - self.timer.began)
        for name, seconds in scoring.items():
            self.seconds[name] = scale * seconds
        # An evaluation is a step without training, of other prompts.
        share = config.eval.prompts * config.eval.group_size
        share /= config.groups.prompts_per_step * config.groups.group_size
        evaluation = share * sum(self.seconds.values())
        # Backward and the optimiser begin when the last reward function has returned.
        self.seconds["train"] = scale * (self.timer.ended - shared.returned)
        self.seconds["evaluation"] = evaluation

    def export(self) -> Iterator[Row]:
        """Checks that the saved adapter, loaded beside the trained one, gives the same logits."""
        if not self.moved:
            raise Skip("the policy has not moved")
        # Beside the trained adapter, so that the chat model is not loaded a second time.
        with tempfile.TemporaryDirectory(dir=self.folder) as saved:
            self.policy.save(Path(saved), "")
            model: Any = self.policy.model
            own = self._logits()
            model.load_adapter(saved, "again")
            model.set_adapter("again")
            again = self._logits()
            with model.disable_adapter():
                base = self._logits()
            model.set_adapter("default")
            model.delete_adapter("again")
        moved, missed = float((own - base).norm() / base.norm()), float((again - own).norm() / base.norm())
        measured = f"logits move by {moved:.2g} of themselves; the loaded adapter misses {missed:.1g}"
        remedy = "what is saved is not what was trained: report it"
        yield Row("export", missed <= 0.2 * moved, measured, remedy)

    @torch.no_grad()
    def _logits(self) -> torch.Tensor:
        model, tokenizer = self.policy.model, self.policy.tokenizer
        training = model.training
        model.eval()  # dropout would make the logits differ
        text = tokenizer.apply_chat_template(
            messages(self.records[0].prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.policy.device)
        logits = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits[0, -1].float().cpu()
        model.train(training)
        return logits

    def _adapter(self) -> dict[str, torch.Tensor]:
        """Copies of the B factors. The A factors have no gradient while B is 0."""
        state = get_peft_model_state_dict(self.policy.model)
        return {name: value.detach().cpu().clone() for name, value in state.items() if ".lora_B." in name}
