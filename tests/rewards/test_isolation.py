"""One reward cannot touch another, nor the run: what it gets is its own, and what it sets is put back."""

import asyncio
import ctypes
import os
import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from rewards.background import ScoreQueue
from rewards.base import RewardSpec, score_all
from rewards.isolation import CLONE_FS
from rewards.load import load_rewards


def draws(images, prompts, requirements):
    """As annotating scorers do; and takes what it has handled off its lists."""
    scores = []
    for image, needs in zip(images, requirements):
        ImageDraw.Draw(image).rectangle((0, 0, 7, 7), fill=(0, 0, 0))
        image.thumbnail((4, 4))
        scores.append(float(len(needs)))
        needs.clear()
    images.clear()
    prompts.clear()
    return scores


async def draws_async(images, prompts, requirements):
    return draws(images, prompts, requirements)


def looks(images, prompts, requirements):
    values = zip(images, prompts, requirements, strict=True)
    return [image.width + image.getpixel((0, 0))[0] / 256 + len(needs) * len(prompt) for image, prompt, needs in values]


@pytest.mark.parametrize("first", [draws, draws_async])
def test_images_prompts_and_columns_are_copies(first):
    """Also of rows that share an image and a list, as those of a group do: each row has 2 requirements."""
    image, needs = Image.new("RGB", (8, 8), (128, 0, 0)), ["red", "round"]
    images, prompts, columns = [image] * 3, ["abc"] * 3, {"requirements": [needs] * 3}
    for order in ([first, looks], [looks, first]):
        scores = asyncio.run(score_all(load_rewards(order), images, prompts, columns))
        assert scores.values_NK[:, scores.names.index("looks")].tolist() == [14.5] * 3
        assert scores.values_NK[:, scores.names.index(first.__name__)].tolist() == [2.0] * 3
    assert image.size == (8, 8) and needs == ["red", "round"] and len(images) == len(prompts) == 3


def sets_everything(folder):
    os.chdir(folder)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float16)
    torch.use_deterministic_algorithms(True)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)


class Setter:
    def __init__(self, folder):
        self.folder = folder
        sets_everything(folder)

    def __call__(self, images, prompts):
        sets_everything(self.folder)
        return [0.5] * len(images)


class AsyncSetter(Setter):
    async def __call__(self, images, prompts):
        sets_everything(self.folder)
        await asyncio.sleep(0.01)
        return [0.5] * len(images)


def state():
    return (
        os.getcwd(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["Setter", "AsyncSetter"])
def test_what_it_sets_is_put_back(name, tmp_path):
    """By its constructor too, and where several overlap."""
    before = state()
    function = {"class_path": f"tests.rewards.test_isolation.{name}", "init_args": {"folder": str(tmp_path)}}
    rewards = load_rewards([RewardSpec(f"r{i}", function) for i in range(3)])
    assert state() == before
    scores = asyncio.run(score_all(rewards, [Image.new("RGB", (8, 8))], ["a"]))
    assert scores.valid_NK.all()
    assert state() == before


def test_rewards_draw_numbers_of_their_own():
    """Which go on from call to call, and leave those of the run as they are."""
    drawn = []

    def noisy(images, prompts):
        drawn.append(random.random())
        return [drawn[-1]]

    [reward] = load_rewards([noisy])
    before = random.getstate()
    for _ in range(2):
        asyncio.run(score_all([reward], [Image.new("RGB", (8, 8))], ["a"]))
    assert drawn[0] != drawn[1] and random.getstate() == before


def test_the_working_directory_of_others_stays_while_a_reward_changes_its_own(tmp_path):
    """Files of a run may have relative paths, and are written while its rewards are asked."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_FS) != 0:
        pytest.skip("this container forbids unshare")
    inside, seen = threading.Event(), threading.Event()
    before = os.getcwd()

    def moves(images, prompts):
        os.chdir(tmp_path)
        inside.set()
        assert seen.wait(20)
        return [float(os.getcwd() == str(tmp_path))]

    async def moves_async(images, prompts):
        return moves(images, prompts)

    for function in (moves, moves_async):
        inside.clear()
        seen.clear()
        with ScoreQueue(load_rewards([function])) as queue:
            queue.submit([Image.new("RGB", (8, 8))], ["a"])
            assert inside.wait(20) and os.getcwd() == before
            seen.set()
            assert queue.gather().values_NK.tolist() == [[1.0]]


def test_a_default_type_that_others_may_compute_with_is_told_once(capsys):
    def sets(images, prompts):
        torch.set_default_dtype(torch.float16)
        return [0.5]

    rewards = load_rewards([sets])
    for _ in range(2):
        asyncio.run(score_all(rewards, [Image.new("RGB", (8, 8))], ["a"]))
    assert capsys.readouterr().err.count("reward sets: during a call torch's default type became torch.float16") == 1
    assert torch.get_default_dtype() == torch.float32
