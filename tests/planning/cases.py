"""What the tests of planning share."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from jaxmllm.models.registry import family_of
from tests.support.checkpoints import published_config
from tests.support.families import VARIANTS

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def config_of(fields: dict) -> Any:
    return family_of(fields).read_config(fields)


def tiny(variant: str = "grouped_queries") -> Any:
    """The config of a tiny model."""
    return config_of(VARIANTS[variant])


def published(name: str) -> Any:
    """The config of a published size."""
    return config_of(published_config(name))


def written(folder: Path, fields: dict) -> Path:
    """A ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return path
