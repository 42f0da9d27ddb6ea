"""A page to play with style references: strengths are dragged, and the image is drawn anew.

posttrain style play --model.path RAW --adapter runs/style --references a.png:0.8 b.png:0.4
"""

from __future__ import annotations

import importlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.errors import UserError
from posttrain.image_reader import read_image
from posttrain.model import sampler
from posttrain.model.k2 import K2, to_pil
from posttrain.references.draw import MOST_VELOCITY
from posttrain.references.shown import LONGEST, Drawer, Encoded, encoded, named, scaled
from posttrain.runs.stop import until_terminated
from posttrain.sample_images import loaded
from posttrain.style_page_config import PlayConfig
from posttrain.training.evaluate import SamplingSettings

SMALL = 256
"""Pixels; smaller images are shown with their pixels as squares."""
KEPT = 16
"""References whose latents are kept, so that dragging a strength encodes nothing."""


def play(config: PlayConfig) -> None:
    """The command. Raises UserError before it serves if anything given is wrong."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        importlib.import_module("gradio")
    except ImportError:
        raise UserError("style play: needs gradio, which is not installed; pip install 'posttrain[annotate]'") from None
    begin = [named(text, Path(), "references") for text in config.references]
    images = [read_image(one.path) for one in begin]
    with until_terminated():
        k2, role = loaded(config.model, config.adapter, True)
        player = Player(k2, role, config)
        # Bound here, so that a port in use is a line to the user and not a traceback of uvicorn's.
        try:
            listener = socket.create_server((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"port: {config.host}:{config.port} cannot be listened at ({error.strerror}); choose another --port"
            ) from None
        with listener:
            import uvicorn

            app = page(player, config, images, [one.strength for one in begin])
            # A page that is open keeps its connection, for which the server would wait at its end.
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
            print(f"posttrain: style play at http://{config.host}:{listener.getsockname()[1]}/", flush=True)
            server.run(sockets=[listener])


class Player:
    """Draws one image at a time: the model has one set of roles and caches."""

    def __init__(self, k2: K2, role: str | None, config: PlayConfig):
        self.k2, self.role, self.config = k2, role, config
        self.steps = sampler.STEPS[k2.is_distilled] if config.steps is None else config.steps
        self.guidance = sampler.GUIDANCE[k2.is_distilled] if config.guidance is None else config.guidance
        self._one_at_a_time = threading.Lock()
        self._kept: dict[bytes, Encoded] = {}

    def draw(self, prompt: str, seed: int, images: list[Image.Image], strengths: list[float]) -> Image.Image:
        """Raises UserError for references that cannot be shown."""
        k2, (height, width) = self.k2, self.config.size
        with self._one_at_a_time, k2.role(self.role):
            one = self._encoded(list(map(self._pixels, images))) if images else None
            drawer = Drawer(k2, [one], [tuple(strengths)], (height, width), self.config.strength)
            noise = sampler.noise([sampler.seed_for(seed, 0, 0)], (k2.image_tokens(height, width), k2.latent_channels))
            null = k2.text([""]) if self.guidance else None
            latents = drawer([0], k2.text([prompt]), noise, SamplingSettings(self.steps, self.guidance), null)
            return to_pil(k2.decode(latents, height, width))[0]

    def _pixels(self, image: Image.Image) -> np.ndarray:
        longest = min(LONGEST, max(self.config.size))
        return scaled(image.convert("RGB"), longest, self.k2.pixel_multiple, "references")

    def _encoded(self, images: list[np.ndarray]) -> Encoded:
        # By their pixels: the page sends new images each time, also where the user has changed none.
        key = b"".join([repr(image.shape).encode() + image.tobytes() for image in images])
        if key not in self._kept:
            if len(self._kept) == KEPT:
                del self._kept[next(iter(self._kept))]  # the oldest, as a dict keeps the order
            self._kept[key] = encoded(self.k2, images)
        return self._kept[key]


def page(player: Player, config: PlayConfig, images: list[Image.Image], strengths: list[float]) -> Any:
    """An ASGI application, for this machine alone."""
    import fastapi
    import gradio as gr

    from posttrain.annotate.app import Guard

    least, most = (0.0, 1.0) if config.strength == "attention" else (-MOST_VELOCITY, MOST_VELOCITY)

    def draw(prompt: str, seed: float, *given: Any) -> tuple[Image.Image | None, str]:
        # Gradio passes all inputs in one row: the slots' images, None in empty ones, then the sliders' strengths.
        shown, chosen = [], []
        for image, strength in zip(given[: config.slots], given[config.slots :]):
            if image is not None:
                shown.append(image)
                chosen.append(strength)
        if not prompt.strip():
            return None, "Write what the image should show."
        began = time.perf_counter()
        try:
            image = player.draw(prompt, int(seed), shown, chosen)
        except UserError as error:
            return None, str(error)
        return image, f"{time.perf_counter() - began:.1f} s"

    with gr.Blocks(title="posttrain style play", analytics_enabled=False) as blocks:
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(config.prompt, label="Prompt", elem_id="prompt")
                seed = gr.Number(config.seed, label="Seed", precision=0, minimum=0)
                slots, sliders = [], []
                for i in range(config.slots):
                    image = images[i] if i < len(images) else None
                    strength = strengths[i] if i < len(images) else 1.0
                    with gr.Row(equal_height=True):
                        slots.append(
                            gr.Image(
                                image,
                                type="pil",
                                image_mode="RGB",
                                label=f"Reference {i + 1}",
                                height=140,
                                sources=["upload", "clipboard"],
                                min_width=120,
                            )
                        )
                        sliders.append(
                            gr.Slider(least, most, strength, step=0.05, label="Strength", elem_id=f"strength-{i + 1}")
                        )
            with gr.Column(scale=2):
                result = gr.Image(
                    type="pil", format="png", label="Image", elem_id="result", interactive=False, height=560
                )
                note = gr.Markdown(elem_id="note")
        inputs, outputs = [prompt, seed, *slots, *sliders], [result, note]
        # While an image is drawn, only the last of several changes waits.
        events = [prompt.submit, seed.change]
        for component in (*slots, *sliders):
            events.append(component.change)
        gr.on([*events, blocks.load], draw, inputs, outputs, trigger_mode="always_last", api_visibility="private")
    app = fastapi.FastAPI(openapi_url=None)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    options: dict[str, Any] = {"footer_links": [], "show_error": False, "ssr_mode": False, "mcp_server": False}
    # Images of the nano world are shown with their pixels as squares.
    css = "#result img { width: 100%; height: 100%; object-fit: contain; }"
    css += "#result img { image-rendering: pixelated; }" if max(config.size) < SMALL else ""
    gr.mount_gradio_app(app, blocks, path="/", theme=theme, css=css, enable_monitoring=False, pwa=False, **options)
    return Guard(app, {"localhost", "127.0.0.1", "::1"})
