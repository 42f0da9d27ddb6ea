"""Damaged LoRA files and pipelines, by a seed: each is read right, or refused by one line with exit code 2.

Right is what stock diffusers makes of the same files, where it loads them; for a LoRA also what its trainer means.
`python -m tests.helpers.fuzz_loading KIND SEED` makes one of them and says what happened.
"""

import contextlib
import io
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Krea2Pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain import cli
from posttrain.errors import UserError
from posttrain.loading import quiet
from posttrain.model import key_names, sampler
from posttrain.model.lora_file import A, B, linear_shapes, read_lora
from tests.helpers import tiny
from tests.helpers.fuzz import check_line
from tests.helpers.malformed import spoiled, torn

READ, REFUSED = "read", "refused"
PROMPT, SIZE, STEPS, GUIDANCE = "a red circle", (32, 32), 2, 1.5
ODD = (math.nan, math.inf, -math.inf)


class Fuzz:
    """The undamaged pipeline in `folder`, and what stock diffusers makes of files."""

    def __init__(self, folder: Path):
        self.base = tiny.save(folder / "base")
        self.stock: Any = self._stock_pipeline(self.base)
        self.shapes = linear_shapes(self.stock.transformer.state_dict())
        self.adapted = [name for name in self.shapes if name.startswith("transformer_blocks.")]
        self.image = self._draw(self.stock)
        self.compared = 0
        """Results that stock diffusers had too."""

    # ---- LoRA files

    def lora(self, rng: random.Random, folder: Path) -> str:
        """READ or REFUSED. AssertionError if a wrong result is read, or another error raised."""
        file, factors, scale = self._lora_file(rng, folder)
        whole = self._damage_lora(rng, file)
        try:
            read = read_lora(file, self.shapes)
        except UserError as error:
            check_line(f"posttrain: error: {error}")
            assert not whole, f"a whole file is refused: {error}"
            return REFUSED
        ours = {key.removesuffix(f".{A}"): read[key.replace(A, B)] @ value for key, value in read.items() if A in key}
        if whole:
            for layer, (a, b) in factors.items():
                assert close(ours[layer], scale * b @ a), f"{layer}: not what its trainer means"
        stock = self._stock_updates(file)
        # It knows nothing of kohya's header and of PEFT's settings beside a file.
        if stock and not (folder / "adapter_config.json").exists() and not _kohya(file):
            self.compared += 1
            assert stock.keys() == ours.keys(), "stock reads other layers"
            for layer, update in stock.items():
                assert close(ours[layer], update), f"{layer}: not what stock diffusers reads"
        return READ

    def _lora_file(self, rng: random.Random, folder: Path) -> tuple[Path, dict[str, tuple[Tensor, Tensor]], float]:
        """A whole file as one of the trainers writes it: its path, factors by layer, and the scale that it states."""
        rank, alpha = rng.choice([1, 2, 4]), rng.choice([0.5, 1.0, 4.0, 16.0])
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in rng.sample(self.adapted, 3):
            outputs, inputs = self.shapes[layer]
            a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
            factors[layer] = a, b
        form = rng.choice(["diffusers", "header", "rslora", "original", "alpha", "kohya", "kohya header", "peft"])
        original = form in ("original", "alpha", "kohya", "kohya header")
        prefix = {"kohya": "lora_unet_", "peft": "base_model.model."}.get(form, "diffusion_model." if original else "")
        prefix = prefix or "transformer."
        state: dict[str, Tensor] = {}
        for layer, (a, b) in factors.items():
            name = key_names.original_name(f"{layer}.").removesuffix(".") if original else layer
            name = prefix + (name.replace(".", "_") if form == "kohya" else name)
            down, up = ("lora_down.weight", "lora_up.weight") if form == "kohya" else (A, B)
            state |= {f"{name}.{down}": a, f"{name}.{up}": b}
            if form in ("alpha", "kohya"):
                state[f"{name}.alpha"] = torch.tensor(alpha)
        settings = {"r": rank, "lora_alpha": alpha, "use_rslora": form == "rslora", "peft_type": "LORA"}
        settings["target_modules"] = list(factors)
        header = {"format": "pt"}
        if form in ("header", "rslora"):
            stated = {f"transformer.{key}": value for key, value in settings.items()}
            header["lora_adapter_metadata"] = json.dumps(stated)
        if form == "kohya header":
            header |= {"ss_network_alpha": str(alpha), "ss_network_dim": str(rank)}
        if form == "peft":
            (folder / "adapter_config.json").write_text(json.dumps(settings))
        file = folder / "adapter_model.safetensors"
        save_file(state, file, metadata=header)
        scale = 1.0 if form in ("diffusers", "original") else alpha / (math.sqrt(rank) if form == "rslora" else rank)
        return file, factors, scale

    def _damage_lora(self, rng: random.Random, file: Path) -> bool:
        """Damages the file, or not. Returns whether it still means the same."""
        with safe_open(file, framework="pt") as opened:
            header = dict(opened.metadata() or {})
        state, config = load_file(file), file.parent / "adapter_config.json"
        key = rng.choice([name for name, value in state.items() if value.ndim == 2])
        how = rng.choice(["nothing", "torn", "config", "header", "drop", "rename", "type", "shape", "number", "alpha",
                          "more", "prefix"])  # fmt: skip
        if how == "nothing":
            return True
        if how == "torn":
            file.write_bytes(torn(file.read_bytes(), rng))
            return False
        if how == "config":
            settings = json.loads(config.read_text()) if config.exists() else {"r": 4, "lora_alpha": 8, "bias": "none"}
            text = json.dumps(spoiled(settings, rng)).encode()
            config.write_bytes(text if rng.random() < 0.7 else torn(text, rng))
            return False
        if how == "header":
            kind = rng.choice(["lora_adapter_metadata", "ss_network_alpha", "ss_network_dim"])
            settings = {"transformer.r": 4, "transformer.lora_alpha": 8}
            header[kind] = rng.choice(["", "None", "nan", "7", "{}", json.dumps(spoiled(settings, rng))])
        elif how == "drop":
            del state[key]
        elif how == "rename":
            state[rng.choice([f"{key}x", key.replace("lora_", "lokr_"), key.replace("0", "77"), "x"])] = state.pop(key)
        elif how == "type":
            kind = rng.choice([torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
            state = {name: value.to(kind) for name, value in state.items()}
        elif how == "shape":
            value = state[key]
            state[key] = rng.choice([value.flatten(), value[None], value[:0].clone(), value.T.contiguous()])
            return state[key].shape == value.shape
        elif how == "number":
            state[key].view(-1)[rng.randrange(state[key].numel())] = rng.choice(ODD)
        elif how == "alpha":
            state[rng.choice([key.rpartition(".lora_")[0] or key, "x"]) + ".alpha"] = torch.tensor(
                rng.choice([0.0, 3, 9])
            )
        elif how == "more":
            name = rng.choice(["dora_scale", "lora_magnitude_vector", "lora_B.bias", "diff", "hada_w1_a"])
            state[f"{key.rpartition('.lora_')[0]}.{name}"] = torch.ones(3)
        else:
            state = {f"{rng.choice(['text_encoder.', 'unet.', 'x', 'transformer.'])}{k}": v for k, v in state.items()}
        save_file({name: value.clone() for name, value in state.items()}, file, metadata=header)
        return False

    def _stock_updates(self, file: Path) -> dict[str, Tensor]:
        """Scale B A by layer, as the stock pipeline loads it; empty if it does not."""
        updates: dict[str, Tensor] = {}
        try:
            with quiet():
                self.stock.load_lora_weights(str(file), adapter_name="fuzz")
        except Exception:  # whatever it raises, it does not load it
            return {}
        for name, module in self.stock.transformer.named_modules():
            if hasattr(module, "lora_A"):
                update = module.lora_B["fuzz"].weight @ module.lora_A["fuzz"].weight * module.scaling["fuzz"]
                updates[name] = update.detach()
        self.stock.unload_lora_weights()
        return updates

    # ---- pipelines

    def pipeline(self, rng: random.Random, folder: Path) -> str:
        """READ or REFUSED, by `posttrain sample` itself. AssertionError if it draws a wrong image."""
        damaged, out = folder / "k2", folder / "out"
        shutil.copytree(self.base, damaged)
        whole = self._damage_pipeline(rng, damaged)
        errors = io.StringIO()
        words = ["sample", f"--model.path={damaged}", "--model.dtype=float32", f"--prompt={PROMPT}", f"--output={out}"]
        words += [f"--size={list(SIZE)}", f"--steps={STEPS}", f"--guidance={GUIDANCE}"]
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(words)
        if code == 2:
            check_line(errors.getvalue())
            assert not whole, f"a whole pipeline is refused: {errors.getvalue()}"
            assert not list(out.glob("*.png"))
            return REFUSED
        assert code == 0, errors.getvalue()
        try:
            with quiet():
                expected = self._draw(self._stock_pipeline(damaged))
            self.compared += 1
        except Exception:  # stock cannot read it: then only the undamaged image is right
            expected = self.image
        difference = np.abs(np.asarray(Image.open(out / "000.png"), float) - expected).mean()
        assert difference < 1, f"the image is {difference:.1f} of 255 from the right one"
        return READ

    def _damage_pipeline(self, rng: random.Random, folder: Path) -> bool:
        """Damages one file, or none. Returns whether the pipeline still means the same."""
        how = rng.choice(
            ["nothing", "gone", "torn", "json", "json", "json", "tensors", "tensors", "tensors", "swapped", "tokenizer"]
        )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if how == "nothing":
            return True
        if how == "gone":
            rng.choice(files).unlink()
        elif how == "torn":
            victim = rng.choice(files)
            victim.write_bytes(torn(victim.read_bytes(), rng))
        elif how == "json":
            victim = rng.choice([path for path in files if path.suffix == ".json" and path.name != "tokenizer.json"])
            victim.write_text(json.dumps(spoiled(json.loads(victim.read_text()), rng)))
        elif how == "tokenizer":  # what stands beside its long lists, one of which `spoiled` would nearly always take
            victim = folder / "tokenizer/tokenizer.json"
            held = json.loads(victim.read_text())
            long = {name: held["model"].pop(name) for name in ("vocab", "merges")}
            held = spoiled(held, rng)
            if isinstance(held, dict) and isinstance(held.get("model"), dict):
                held["model"] = long | held["model"]
            victim.write_text(json.dumps(held))
        elif how == "swapped":
            kind = rng.choice([".json", ".safetensors"])
            victim, other = rng.sample([path for path in files if path.suffix == kind], 2)
            victim.write_bytes(other.read_bytes())
        else:
            victim = rng.choice([path for path in files if path.suffix == ".safetensors"])
            save_file(_damaged(load_file(victim), rng), victim, metadata={"format": "pt"})
        return False

    def _stock_pipeline(self, folder: Path) -> Any:
        pipe = Krea2Pipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _draw(self, pipe: Any) -> np.ndarray:
        """The image that `posttrain sample` should draw, (H, W, 3)."""
        (height, width), patch = SIZE, pipe.vae_scale_factor * pipe.patch_size
        shape = (height // patch * (width // patch), 64)
        noise = sampler.noise([sampler.seed_for(0, 0, 0)], shape)
        made = pipe(
            PROMPT, height=height, width=width, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise,
            negative_prompt="", output_type="np", max_sequence_length=64,
        )  # fmt: skip
        return np.asarray(made.images[0], float) * 255


def _damaged(state: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    key = rng.choice([name for name, value in state.items() if value.numel() > 1])
    value, how = state[key], rng.randrange(6)
    if how == 0:
        del state[key]
    elif how == 1:
        state[rng.choice([f"_orig_mod.{key}", f"{key}_", key.upper()])] = state.pop(key)
    elif how == 2:
        state[key] = rng.choice([value[:-1].clone(), value.flatten()[None].clone(), value[None].clone()])
    elif how == 3:
        value.view(-1)[rng.randrange(value.numel())] = rng.choice(ODD)
    elif how == 4:
        kind = rng.choice([torch.float8_e4m3fn, torch.int8, torch.uint8, torch.float16, torch.bfloat16])
        state = {name: tensor.to(kind) for name, tensor in state.items()}
    else:
        state["surplus.weight"] = torch.ones(2, 2)
    return state


def _kohya(file: Path) -> bool:
    with safe_open(file, framework="np") as opened:
        return "ss_network_alpha" in (opened.metadata() or {})


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-9


KINDS = {"lora": Fuzz.lora, "pipeline": Fuzz.pipeline}


def inputs(fuzz: Fuzz, kind: str, count: int, folder: Path) -> dict[int, Any]:
    """What became of the inputs with seeds 0 to count - 1: READ, REFUSED or the exception that was wrong."""
    outcomes: dict[int, Any] = {}
    for seed in range(count):
        place = folder / f"{kind}-{seed}"
        place.mkdir()
        try:
            outcomes[seed] = KINDS[kind](fuzz, random.Random(seed), place)
        except Exception as error:
            outcomes[seed] = error
        shutil.rmtree(place)
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "one").mkdir()
        print(KINDS[sys.argv[1]](Fuzz(Path(temporary)), random.Random(int(sys.argv[2])), Path(temporary) / "one"))
