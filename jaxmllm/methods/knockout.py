"""Attention knockout as a method: text may not read the image in a window of layers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxmllm.analysis.edits import knockout, window
from jaxmllm.errors import InputError
from jaxmllm.methods.base import Method
from jaxmllm.models.edits import Edits
from jaxmllm.models.layout import ROLES


@dataclasses.dataclass(frozen=True)
class AttentionKnockout(Method):
    """Attention from some tokens to others is blocked around a layer, while decoding too.

    Attributes:
      layer: the middle of the window.
      layers: its width, odd; the window ``[layer - layers // 2, layer + layers // 2]`` is clipped to the model.
      queries, keys: roles of tokens (``question``, ``last``, ``image``, ``prefix``, ``text``, ``all``).

    Source: FightingFighting/cross-modal-information-flow-in-MLLM@c9a1111 (a window of nine layers).
    """

    name: ClassVar[str] = "knockout"

    layer: int = 0
    layers: int = 9
    queries: str = "question"
    keys: str = "image"

    def __post_init__(self) -> None:
        if self.layers < 1 or self.layers % 2 == 0:
            raise InputError(f"layers is {self.layers}; expected an odd number of layers")
        if self.queries not in ROLES or self.keys not in ROLES:
            raise InputError(f"queries={self.queries!r}, keys={self.keys!r}; expected roles: {', '.join(ROLES)}")

    def edits(self, num_layers: int) -> Edits | None:
        if not 0 <= self.layer < num_layers:
            raise InputError(f"no layer {self.layer}: the model has decoder layers 0..{num_layers - 1}")
        half = self.layers // 2
        span = window(max(0, self.layer - half), min(num_layers, self.layer + half + 1))
        return knockout(span, self.queries, self.keys)
