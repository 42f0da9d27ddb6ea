"""Tiny models of the architectures of published scorers, with random weights, in the files of their releases."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLModel,
    SiglipConfig,
    SiglipModel,
)  # fmt: skip
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from rewards.ready.loaded import HIDDEN, score_head
from tests.helpers import tiny

TEXTS = [*tiny.PROMPTS, "two red stars on a blue square", "a photo of the sea at dusk"]
SIDE = 32
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"height": SIDE, "width": SIDE}


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's class, with merges learnt from a few prompts."""
    pieces = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]"), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=alphabet, special_tokens=[letter + "</w>" for letter in sorted(alphabet)],
    )  # fmt: skip
    pieces.train_from_iterator([text.lower() for text in TEXTS] * 20, trainer)
    model = json.loads(pieces.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for special in ("<|startoftext|>", "<|endoftext|>"):  # the last two, as in CLIP's
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge) for merge in model["merges"]])


def randomised(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> Any:
    """All parameters random, those too that a fresh model has at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
            elif name == "logit_scale":
                parameter.fill_(4.6)  # e^4.6 = 99.5
    return model.eval()


def clip(folder: Path, seed: int = 0) -> Path:
    words = clip_tokenizer()
    text = TOWER | {"vocab_size": len(words), "max_position_embeddings": 20, "eos_token_id": words.eos_token_id,
                    "bos_token_id": words.bos_token_id, "hidden_act": "gelu"}  # fmt: skip
    vision = TOWER | {"image_size": SIDE, "patch_size": 8, "hidden_act": "gelu"}
    randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)), seed).save_pretrained(
        folder
    )
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE).save_pretrained(folder)
    return folder


def siglip(folder: Path) -> Path:
    words = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer, pad_token="<|endoftext|>")
    text = TOWER | {"vocab_size": len(words), "max_position_embeddings": 16, "projection_size": 64}
    vision = TOWER | {"image_size": SIDE, "patch_size": 8}
    randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    words.save_pretrained(folder)
    SiglipImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return folder


def aesthetic(file: Path, width: int = 48) -> torch.nn.Sequential:
    head = randomised(score_head(width, *HIDDEN), scale=0.1)
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, file)
    return head


def bert_tokenizer(folder: Path) -> Path:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in TEXTS for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    BertTokenizer(vocab={word: i for i, word in enumerate(special + words)}).save_pretrained(folder)
    return folder


def imagereward(folder: Path) -> tuple[BlipVisionModel, BlipTextModel, torch.nn.Sequential]:
    """ImageReward.pt in BLIP's names and bert/ with the tokenizer; the same parts as transformers has them."""
    bert_tokenizer(folder / "bert")
    vision = BlipVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=8, layer_norm_eps=1e-6,
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=90, hidden_size=64, encoder_hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=40, is_decoder=True, bos_token_id=None, eos_token_id=None,
        sep_token_id=None,
    )  # fmt: skip
    parts = (
        randomised(BlipVisionModel(vision), scale=0.05),
        randomised(BlipTextModel(text, add_pooling_layer=False), 1, 0.05),
    )
    head = randomised(score_head(64, *HIDDEN), scale=0.05)
    state = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None], "blip.text_proj.bias": torch.zeros(3)}
    for key, value in parts[0].state_dict().items():
        for pattern, replacement in BLIP:
            key = re.sub(pattern, replacement, key)
        state[f"blip.visual_encoder.{key}"] = value
    state |= {f"blip.text_encoder.{key}": value for key, value in parts[1].state_dict().items()}
    state |= {f"mlp.layers.{key}": value for key, value in head.state_dict().items()}
    torch.save(state, folder / "ImageReward.pt")
    return *parts, head


BLIP = [
    (r"^embeddings\.class_embedding$", "cls_token"), (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."), (r"^encoder\.layers\.", "blocks."),
    (r"self_attn\.qkv", "attn.qkv"), (r"self_attn\.projection", "attn.proj"), (r"layer_norm(\d)", r"norm\1"),
    (r"^post_layernorm", "norm"),
]  # fmt: skip
"""transformers' names in those of salesforce/BLIP's vit.py."""


def hpsv3(folder: Path) -> tuple[Qwen2VLModel, torch.nn.Sequential]:
    """HPSv3.safetensors in the names of its release and base/ with a Qwen2-VL's settings; the same parts."""
    words: Any = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer()._tokenizer, pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"],
    )  # fmt: skip
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    words.save_pretrained(folder / "base")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "base")
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": len(words) + 20,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
    )  # fmt: skip
    config.save_pretrained(folder / "base")
    config.text_config.vocab_size = len(words) + 1  # its authors resize to the tokenizer with the token of the head
    model = randomised(Qwen2VLModel(config), scale=0.05)
    head = torch.nn.Sequential(*(torch.nn.Linear(*sizes) for sizes in ((64, 1024), (1024, 16), (16, 2))))
    state = {key.replace("language_model.", "model.", 1): value for key, value in model.state_dict().items()}
    state["lm_head.weight"] = torch.zeros(len(words) + 1, 64)
    for place, layer in zip((0, 3, 5), head):
        state |= {f"rm_head.{place}.{key}": value for key, value in layer.state_dict().items()}
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / "HPSv3.safetensors")
    return model, head
