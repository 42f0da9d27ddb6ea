"""Rewards that need no training: published models of preference, similarity and text, by their class.

    function: {class_path: rewards.ready.PickScore, init_args: {batch: 16, device: cuda}}

docs/rewards.md has a table of them with ranges and licences.
"""

from rewards.ready.hpsv3 import HPSv3
from rewards.ready.imagereward import ImageReward
from rewards.ready.similarity import CLIP, AestheticScore, HPSv2, PickScore, SigLIP
from rewards.ready.text import Text
from rewards.ready.unified import UnifiedReward

__all__ = ["CLIP", "AestheticScore", "HPSv2", "HPSv3", "ImageReward", "PickScore", "SigLIP", "Text", "UnifiedReward"]
