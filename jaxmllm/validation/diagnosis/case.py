"""What a diagnosis starts from: one component that departs, and what it was computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmllm.validation.components import split
from jaxmllm.validation.report import Kind

# Arrays by name; ``None`` where there is none of that name.
Lookup = Callable[[str], np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A departure that is to be explained.

    Attributes:
      component: that departs first; see ``jaxmllm.validation.components``.
      kind: from which input the port computed it.
      got: the port's array, the rows that are kept.
      expected: the reference's.
      mask: which of their numbers mean something; may have fewer axes than they.
      rows: the rows that are kept, ``None`` for all: positions of the sequence (of ``attn_probs`` the queries'), else
        rows of the last axis but one.
      read: the reference's arrays by component; ``decoder.K.resid_pre`` and other inputs of stages whole, others the
        rows that are kept.
      leaf: the port's weights by path (``decoder/layers/mlp/gate/kernel``); of stacked ones the layer in question.
      tensor: what the checkpoint says of the same, in the port's layout, where the checkpoint is at hand.
      inputs: the arrays that both models were given.
      config: of the family.
      departures: all components that depart from their own input, in order.
    """

    component: str
    kind: Kind
    got: np.ndarray
    expected: np.ndarray
    mask: np.ndarray
    rows: tuple[int, ...] | None
    read: Lookup
    leaf: Lookup
    tensor: Lookup
    inputs: Mapping[str, np.ndarray]
    config: Any
    departures: tuple[str, ...] = ()

    @property
    def part(self) -> str:
        """``decoder``, ``vision``, ``qformer``, or the component itself."""
        return split(self.component)[0]

    @property
    def layer(self) -> int | None:
        """The layer in question; ``None`` where the component belongs to none."""
        return split(self.component)[1]

    @property
    def site(self) -> str:
        """The component's site in its layer."""
        return split(self.component)[2]

    def sibling(self, site: str) -> str:
        """The name of another site of the same layer."""
        return f"{self.part}.{self.layer}.{site}"
