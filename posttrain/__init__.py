"""Post-training for Krea 2 (K2).

recipe -> model -> rollout -> rewards -> advantages -> loss -> checkpoint -> export

The names below are the library: what a notebook or a method of one's own needs (docs/library.md). Each is imported from
its module when it is first used, so that `import posttrain` takes no time and no torch.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from posttrain import supported
from posttrain.resources import NANO, bind_packages

if TYPE_CHECKING:
    from posttrain.config.groups import GroupsConfig
    from posttrain.config.sections import (
        CheckpointConfig,
        EvalConfig,
        LoraConfig,
        ModelConfig,
        OptimConfig,
        PromptsConfig,
        TrackConfig,
    )
    from posttrain.errors import UserError
    from posttrain.grpo.losses import clipped_policy, velocity_kl
    from posttrain.grpo.rollout import Trajectory, Transition, rollout
    from posttrain.image_reader import read_image
    from posttrain.library import MethodConfig, MethodRun, draw, load_model, open_method, score, total
    from posttrain.model import sampler
    from posttrain.model.k2 import K2, Encoding, Text, to_pil
    from posttrain.training.advantages import gdpo, sum_then_normalise
    from posttrain.training.policy import POLICY
    from prompts.records import PromptRecord, columns, read_prompts
    from rewards.base import Failure, Reward, RewardSpec, Scored, Scores
    from rewards.load import load_rewards

__version__ = "0.1.0"

_MODULES = {
    "posttrain.config.groups": ("GroupsConfig",),
    "posttrain.config.sections": (
        "CheckpointConfig", "EvalConfig", "LoraConfig", "ModelConfig", "OptimConfig", "PromptsConfig", "TrackConfig",
    ),
    "posttrain.errors": ("UserError",),
    "posttrain.grpo.losses": ("clipped_policy", "velocity_kl"),
    "posttrain.grpo.rollout": ("Trajectory", "Transition", "rollout"),
    "posttrain.image_reader": ("read_image",),
    "posttrain.library": ("MethodConfig", "MethodRun", "draw", "load_model", "open_method", "score", "total"),
    "posttrain.model.k2": ("K2", "Encoding", "Text", "to_pil"),
    "posttrain.training.advantages": ("gdpo", "sum_then_normalise"),
    "posttrain.training.policy": ("POLICY",),
    "prompts.records": ("PromptRecord", "columns", "read_prompts"),
    "rewards.base": ("Failure", "Reward", "RewardSpec", "Scored", "Scores"),
    "rewards.load": ("load_rewards",),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "K2",
    "NANO",
    "POLICY",
    "CheckpointConfig",
    "Encoding",
    "EvalConfig",
    "Failure",
    "GroupsConfig",
    "LoraConfig",
    "MethodConfig",
    "MethodRun",
    "ModelConfig",
    "OptimConfig",
    "PromptRecord",
    "PromptsConfig",
    "Reward",
    "RewardSpec",
    "Scored",
    "Scores",
    "Text",
    "TrackConfig",
    "Trajectory",
    "Transition",
    "UserError",
    "clipped_policy",
    "columns",
    "draw",
    "gdpo",
    "load_model",
    "load_rewards",
    "open_method",
    "read_image",
    "read_prompts",
    "rollout",
    "sampler",
    "score",
    "sum_then_normalise",
    "to_pil",
    "total",
    "velocity_kl",
]  # fmt: skip

_problem = supported.problem(sys.version_info[:2], sys.platform)
if _problem is not None:  # said here, since what is imported next needs what is missing
    sys.stderr.write(f"posttrain: error: {_problem}\n")
    sys.exit(2)

bind_packages()

# At any import of diffusers torchao warns, where it is installed, about parts that nothing here uses.
for _name in ("torchao", "diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# DeepSpeed, where it is installed, is imported by others, sets its own level and prints to stdout which device it uses.
logging.getLogger("DeepSpeed").addFilter(
    lambda entry: entry.levelno >= logging.WARNING and not entry.getMessage().startswith("Setting accelerator")
)


def __getattr__(name: str) -> Any:
    """A public name, imported from its module at its first use."""
    if name == "sampler":  # the one public name that is a module
        return importlib.import_module("posttrain.model.sampler")
    if name not in _HOMES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
