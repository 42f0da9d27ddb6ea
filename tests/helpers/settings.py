"""Settings that a test has changed, checked as a recipe's would be."""

import dataclasses
from typing import Any

from posttrain.config.load import make


def validate(config: Any) -> None:
    make(type(config), dataclasses.asdict(config))
