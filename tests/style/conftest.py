import pytest

from tests.helpers import style_runs


@pytest.fixture
def config(tmp_path, model):
    return style_runs.config(tmp_path, model)
