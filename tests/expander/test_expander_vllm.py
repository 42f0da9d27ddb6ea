"""The trained adapter behind the real vLLM: it is sent the messages, and nothing else is needed."""

import json
import os
import urllib.request
from pathlib import Path

import pytest
import torch

from posttrain.expander.chat_template import messages
from posttrain.expander.config import ExpanderDataConfig
from posttrain.expander.data import make
from posttrain.expander.model import Expander
from posttrain.expander.sft import train
from posttrain.expander.sft_pairs import Pair, tokens
from rewards.serve import ServerSpec, serve
from tests.expander.test_expander import BASE, recipe

VLLM = os.environ.get("POSTTRAIN_VLLM", "")
PROMPTS = ["a red star", 'draw the word "AT" and a green cross', "two blue squares, dark style"]


def post(url: str, **body) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="POSTTRAIN_VLLM names no vLLM executable")
def test_vllm_serves_the_adapter_as_it_is(tmp_path: Path):
    make(
        ExpanderDataConfig(
            str(tmp_path / "data"), "posttrain.nano.world.expander_pairs:candidates", count=120, heldout=0.2
        )
    )
    train(recipe(tmp_path, tmp_path / "data"))
    adapter = str(tmp_path / "run" / "adapter")
    spec = ServerSpec(
        "base", BASE, {"tuned": adapter}, executable=VLLM,
        extra_args=["--max-model-len", "512", "--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager"],
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    expanders = {"base": Expander.load(BASE, dtype=torch.float32), "tuned": Expander.load(adapter, dtype=torch.float32)}
    with serve([spec], tmp_path / "logs") as urls:
        url = urls["base"][0]
        for prompt in PROMPTS:
            asked = messages(prompt)
            found = post(url.removesuffix("/v1") + "/tokenize", model="base", messages=asked)["tokens"]
            ids, length = tokens(Pair(prompt, "x"), expanders["base"].tokenizer)
            assert found == ids[:length]  # what training saw is what the server makes of the messages
            for name, expander in expanders.items():
                reply = post(f"{url}/chat/completions", model=name, messages=asked, temperature=0, max_tokens=48)
                # A temperature of nearly 0 is the likeliest token each time, as 0 is to the server.
                alone = expander.expand([prompt], 1, temperature=1e-4, max_tokens=48)[0][0].text
                assert reply["choices"][0]["message"]["content"].strip() == alone
