"""The model families: one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxmllm.errors import ConfigError
from jaxmllm.models import llava
from jaxmllm.models.layers import Builder


@dataclasses.dataclass(frozen=True)
class Family:
    """What the library needs to know of a family.

    Attributes:
      read_config: ``config.json`` as a dict -> the family's frozen config.
      module: makes the family's NNX module from its config.
    """

    read_config: Callable[[Mapping[str, Any]], Any]
    module: Callable[[Any, Builder], nnx.Module]


FAMILIES: dict[str, Family] = {
    "llava": Family(llava.read_config, llava.Llava),
}


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family that a ``config.json`` names by its ``model_type``.

    Raises:
      ConfigError: no such field, or a family that is not implemented.
    """
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type is {name!r}; jaxmllm implements {', '.join(sorted(FAMILIES))}. "
            "Other families need a port first (docs/adding-a-model.md)."
        )
    return FAMILIES[name]
