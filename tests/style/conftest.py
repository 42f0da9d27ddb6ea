import pytest

from posttrain.distributed.processes import Processes
from posttrain.model.k2 import K2
from posttrain.sft.cache import encode_images
from posttrain.style.dataset import StyleSet, Views
from tests.helpers import style_runs


@pytest.fixture
def config(tmp_path, model):
    return style_runs.config(tmp_path, model)


@pytest.fixture
def made(config):
    k2 = K2.load(config.model.path)
    source = StyleSet(config.images)
    return k2, Views(source, encode_images(k2, source, config.images, Processes()), config)
