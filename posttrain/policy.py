"""The policy: the role that a run trains, a LoRA adapter or all weights (`lora: null`), and its checkpoints.

The reference of an adapter is the base without it; of all weights, a frozen copy made when training begins.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from posttrain.checkpoint import Checkpoint
from posttrain.config import LoraConfig
from posttrain.k2 import K2
from posttrain.roles import TARGETS
from prompts.errors import UserError

POLICY = "policy"


def add_policy(k2: K2, lora: LoraConfig | None, seed: int, reference: bool) -> None:
    """The role as a run begins with it. With `reference`, the role None is what the model is now."""
    if lora is None:
        k2.add_full_role(POLICY, reference)
    else:
        k2.add_role(POLICY, lora.rank, lora.alpha, TARGETS if lora.targets is None else lora.targets, seed)


def add_saved_policy(k2: K2, saved: Checkpoint) -> None:
    """The role as a checkpoint has it."""
    lora = saved.state["lora"]
    if lora is None:
        k2.add_full_role(POLICY)
    else:
        k2.add_role(POLICY, **lora)
    load_policy(k2, saved)


def load_policy(k2: K2, saved: Checkpoint) -> None:
    """Put a checkpoint's values into the role. Raises UserError if it holds another kind of role."""
    own, other = described(k2), saved.state["lora"]
    if (own is None) != (other is None):
        kinds = {True: "all weights", False: "an adapter"}
        raise UserError(
            f"lora: {saved.path} has trained {kinds[other is None]} and this recipe trains {kinds[own is None]};"
            " restore lora, or start another run"
        )
    k2.load_role_state_dict(POLICY, saved.tensors[file_of(own)])


def described(k2: K2) -> dict[str, Any] | None:
    """What a checkpoint's `lora` says: rank, alpha and targets; None for all weights."""
    role = k2.roles[POLICY]
    return None if role is None else asdict(role)


def file_of(lora: dict[str, Any] | None) -> str:
    """The stem of the file that holds the role in a checkpoint."""
    return "weights" if lora is None else "adapter"


def policy_state(k2: K2) -> dict[str, Tensor]:
    """The role's values on the CPU, copied, so that they stay what they are now."""
    return {key: value.to("cpu", copy=True) for key, value in k2.role_state_dict(POLICY).items()}


def saved_tensors(k2: K2) -> dict[str, dict[str, Tensor]]:
    """The role as a file of a checkpoint."""
    return {file_of(described(k2)): policy_state(k2)}
