"""The CLIP family: scores are what transformers computes itself, and HPSv2's file gives what open_clip computes."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from posttrain.errors import UserError
from rewards.base import Failure, RewardSpec
from rewards.load import check_rewards, load_rewards
from rewards.ready import CLIP, AestheticScore, HPSv2, PickScore, SigLIP
from rewards.ready.similarity import from_open_clip, padded
from tests.helpers import scorers

PROMPTS = [
    "a red circle", "Two blue squares above a small green triangle, flat style", "the word HELLO", "",
    "a fox in the snow at night with a lantern, pastel, soft light, seen from far away, and a second fox behind it",
]  # fmt: skip


def shown(n=5, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(64, 64), (50, 80), (100, 32), (32, 32), (47, 33)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes[:n]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(scorers.clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return str(scorers.siglip(tmp_path_factory.mktemp("siglip")))


@torch.no_grad()
def own(kind, processor, folder, **padding):
    """Logits of each image with its own prompt as transformers' forward has them, with the model."""
    model = kind.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    texts = [prompt.lower() for prompt in PROMPTS]
    ids = tokens(texts, truncation=True, max_length=length, return_tensors="pt", **padding).input_ids
    pixels = processor.from_pretrained(folder)(images=shown(), return_tensors="pt")["pixel_values"]
    return model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal(), model


def test_clip_and_pickscore_are_transformers_own(clip):
    logits, model = own(CLIPModel, CLIPImageProcessorPil, clip, padding=True)
    scale = model.logit_scale.exp().item()
    cosines = CLIP(clip, device="cpu")(shown(), PROMPTS)
    assert cosines == pytest.approx((logits / scale).tolist(), abs=1e-6)
    picks = PickScore(clip, device="cpu", processor=clip)(shown(), PROMPTS)
    assert picks == pytest.approx(logits.tolist(), abs=1e-4) and scale == pytest.approx(99.48, abs=0.01)
    assert len({round(float(score), 4) for score in cosines}) == 5


def test_siglip_is_transformers_own(siglip):
    logits, model = own(SiglipModel, SiglipImageProcessorPil, siglip, padding="max_length")
    expected = (logits - model.logit_bias) / model.logit_scale.exp()
    assert SigLIP(siglip, device="cpu")(shown(), PROMPTS) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", [CLIP, SigLIP])
def test_batches_and_order_do_not_matter(kind, clip, siglip):
    folder = clip if kind is CLIP else siglip
    whole = kind(folder, batch=5, device="cpu")(shown(), PROMPTS)
    assert kind(folder, batch=2, device="cpu")(shown(), PROMPTS) == pytest.approx(whole, abs=1e-6)
    back = kind(folder, batch=3, device="cpu")(shown()[::-1], PROMPTS[::-1])
    assert back == pytest.approx(whole[::-1], abs=1e-6)
    assert kind(folder, device="cpu")([], []) == []


def test_other_modes_are_read_as_rgb(clip):
    grey = shown()[0].convert("L")
    scorer = CLIP(clip, device="cpu")
    assert scorer([grey], ["a red circle"]) == scorer([grey.convert("RGB")], ["a red circle"])


def test_half_precision_is_near(clip):
    exact, half = (CLIP(clip, device="cpu", dtype=name)(shown(), PROMPTS) for name in ("float32", "bfloat16"))
    assert half != exact and half == pytest.approx(exact, abs=0.05)


def test_the_aesthetic_head_sees_unit_features(clip, tmp_path):
    head = scorers.aesthetic(tmp_path / "aesthetic-model.pth")
    for given in (tmp_path, tmp_path / "aesthetic-model.pth"):  # a directory that has the file, or the file
        scorer = AestheticScore(str(given), path=clip, device="cpu")
        with torch.no_grad():
            features = scorer.image_features(shown())
            expected = head(features)[:, 0].tolist()
        assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * 5)
        assert scorer(shown(), PROMPTS) == pytest.approx(expected, abs=1e-6)
    torch.save({"weight": torch.full((1, 48), 0.5), "bias": torch.tensor([2.0])}, tmp_path / "linear.pth")
    linear = AestheticScore(str(tmp_path), "linear.pth", path=clip, device="cpu")
    assert linear(shown(), PROMPTS) == pytest.approx((features.sum(-1) / 2 + 2).tolist(), abs=1e-6)


# ---- HPSv2 ----------------------------------------------------------------------------------------------------------


def open_clip_state():
    """A ViT of open_clip by its names and shapes, filled with numbers that depend on the name alone."""
    width, image, embed, vocabulary = 64, 64, 48, 97
    shapes = {
        "positional_embedding": (20, width), "text_projection": (width, embed), "logit_scale": (),
        "token_embedding.weight": (vocabulary, width), "ln_final.weight": (width,), "ln_final.bias": (width,),
        "visual.class_embedding": (image,), "visual.positional_embedding": (17, image), "visual.proj": (image, embed),
        "visual.conv1.weight": (image, 3, 8, 8),
        **{f"visual.ln_{place}.{kind}": (image,) for place in ("pre", "post") for kind in ("weight", "bias")},
    }  # fmt: skip
    for tower, size in (("transformer", width), ("visual.transformer", image)):
        for layer in range(2):
            block = {
                "ln_1.weight": (size,), "ln_1.bias": (size,), "ln_2.weight": (size,), "ln_2.bias": (size,),
                "attn.in_proj_weight": (3 * size, size), "attn.in_proj_bias": (3 * size,),
                "attn.out_proj.weight": (size, size), "attn.out_proj.bias": (size,),
                "mlp.c_fc.weight": (4 * size, size), "mlp.c_fc.bias": (4 * size,),
                "mlp.c_proj.weight": (size, 4 * size), "mlp.c_proj.bias": (size,),
            }  # fmt: skip
            shapes |= {f"{tower}.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    state = {}
    for name, shape in shapes.items():
        seed = sum(map(ord, name))
        count = int(np.prod(shape))
        # The same on every machine: a sine needs no generator.
        state[name] = 0.3 * torch.sin(torch.arange(count) * 1.7 + seed).reshape(shape).float()
    return state


GOLDEN_IMAGE = [-0.193573758, -0.038867284, 0.203590348]
GOLDEN_TEXT = [0.199613288, 0.016099127, -0.203766644]


@torch.no_grad()
def test_open_clip_weights_give_what_open_clip_computes():
    """Its own features of one image and one text: open_clip of hpsv2 1.2.0, in float32 on a CPU."""
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "hidden_act": "gelu"}  # fmt: skip
    text = tower | {"vocab_size": 97, "max_position_embeddings": 20, "eos_token_id": 96}
    vision = tower | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)).eval()
    model.load_state_dict(from_open_clip(open_clip_state()))  # strict
    pixels = torch.sin(torch.arange(3 * 32 * 32) * 0.37).reshape(1, 3, 32, 32)
    ids = torch.tensor([[95, 5, 6, 7, 96] + [0] * 15])
    image = model.get_image_features(pixel_values=pixels).pooler_output
    words = model.get_text_features(input_ids=ids).pooler_output
    unit = [torch.nn.functional.normalize(features, dim=-1)[0, :3].tolist() for features in (image, words)]
    assert unit[0] == pytest.approx(GOLDEN_IMAGE, abs=1e-5) and unit[1] == pytest.approx(GOLDEN_TEXT, abs=1e-5)


def as_open_clip(model):
    """The weights of a CLIPModel in open_clip's names: the way back."""
    state, joined = {}, {}
    for key, value in model.state_dict().items():
        key = key.replace("vision_model.", "visual.").replace("text_model.", "")
        key = key.replace("encoder.layers.", "transformer.resblocks.").replace("self_attn.", "attn.")
        key = re.sub(r"layer_norm([12])", r"ln_\1", key).replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        key = key.replace("embeddings.position_embedding.weight", "positional_embedding")
        key = key.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        key = key.replace("embeddings.class_embedding", "class_embedding")
        key = key.replace("embeddings.patch_embedding", "conv1")
        key = key.replace("pre_layrnorm", "ln_pre").replace("post_layernorm", "ln_post")
        key = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}.get(key, key)
        if match := re.search(r"\.([qkv])_proj\.(weight|bias)$", key):
            joined.setdefault(f"{key[: match.start()]}.in_proj_{match[2]}", {})[match[1]] = value
        else:
            state[key] = value.T if key in ("visual.proj", "text_projection") else value
    return state | {key: torch.cat([parts[name] for name in "qkv"]) for key, parts in joined.items()}


@pytest.fixture(scope="module")
def hpsv2(clip, tmp_path_factory):
    file = tmp_path_factory.mktemp("hpsv2") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": as_open_clip(CLIPModel.from_pretrained(clip)), "epoch": 1}, file)
    return file


def test_hpsv2_is_a_cosine_of_the_whole_image(clip, hpsv2):
    square = [image.resize((32, 32)) for image in shown()]  # there its pixels are CLIP's own
    expected = CLIP(clip, device="cpu")(square, PROMPTS)
    for given in (hpsv2, hpsv2.parent):
        assert HPSv2(str(given), processor=clip, device="cpu")(square, PROMPTS) == pytest.approx(expected, abs=1e-6)
    assert HPSv2(str(hpsv2), processor=clip, device="cpu")(shown(), PROMPTS) != pytest.approx(expected, abs=1e-3)


def test_the_longer_side_is_resized_and_the_rest_is_black():
    """A white image of 64 x 32 in a square of 32: rows 8 to 23 are white."""
    rows = padded(Image.new("RGB", (64, 32), "white"), 32)[0, :, 5]
    assert rows.tolist() == pytest.approx([0.0] * 8 + [1.0] * 16 + [0.0] * 8)


# ---- mistakes -------------------------------------------------------------------------------------------------------


def refused(make, *parts):
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    return message


def test_mistakes_are_told_in_one_line(clip, siglip, hpsv2, tmp_path):
    refused(lambda: CLIP(clip, batch=0), "batch: 0", "use 1 or more")
    refused(lambda: CLIP(clip, dtype="float8"), "dtype: float8", "bfloat16")
    refused(lambda: CLIP(clip, device="gpu"), "device: gpu", "use cpu, cuda")
    refused(lambda: CLIP(clip, device="cuda:99"), "device: cuda:99", "GPUs here")
    refused(lambda: CLIP(str(tmp_path / "none")), "none", "no such directory")
    refused(lambda: CLIP(siglip, device="cpu"), "is a siglip", "CLIP reads models of type clip")
    refused(lambda: HPSv2(str(tmp_path), processor=clip), "no HPS_v2.1_compressed.pt in it")
    broken = tmp_path / "HPS_v2.1_compressed.pt"
    broken.write_bytes(hpsv2.read_bytes()[:5000])
    refused(lambda: HPSv2(str(broken), processor=clip, device="cpu"), str(broken), "file of weights")
    state = torch.load(hpsv2, weights_only=True)["state_dict"]
    torch.save({"state_dict": {k: v for k, v in state.items() if "resblocks.1" not in k}}, broken)
    refused(lambda: HPSv2(str(broken), processor=clip, device="cpu"), "missing", "layers.1")
    torch.save({"state_dict": state | {"visual.proj": torch.full((64, 48), torch.nan)}}, broken)
    refused(lambda: HPSv2(str(broken), processor=clip, device="cpu"), "not finite")
    told = refused(lambda: AestheticScore(str(hpsv2), path=clip, device="cpu"), "no state dict")
    assert str(hpsv2) in told


def test_a_pickle_that_runs_code_is_refused(clip, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    torch.save({"state_dict": Bomb()}, tmp_path / "HPS_v2.1_compressed.pt")
    refused(lambda: HPSv2(str(tmp_path), processor=clip, device="cpu"), "file of weights")
    assert "boom" not in capsys.readouterr().out  # it was not run


def test_a_score_that_is_not_finite_is_a_failure(clip):
    scorer = PickScore(clip, device="cpu", processor=clip)
    scorer.model.logit_scale.fill_(torch.inf)
    assert all(isinstance(score, Failure) for score in scorer(shown(2), PROMPTS[:2]))


def test_a_recipe_names_them(clip):
    specs = [
        RewardSpec("pick", {"class_path": "rewards.ready.PickScore",
                            "init_args": {"path": clip, "processor": clip, "batch": 16, "device": "cpu"}}),
    ]  # fmt: skip
    check_rewards(specs)
    (reward,) = load_rewards(specs)
    assert reward.function(shown(1), PROMPTS[:1]) == PickScore(clip, device="cpu", processor=clip)(
        shown(1), PROMPTS[:1]
    )
    assert reward.function.record() == {"model": clip}
