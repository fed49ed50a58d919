"""Weights wherever they lie: parts of leaves, read one by one from a Hugging Face folder or from a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmllm.convert.checkpoint import open_safetensors
from jaxmllm.convert.names import NameTable
from jaxmllm.convert.pieces import Region
from jaxmllm.convert.store import is_store, open_arrays


@runtime_checkable
class Weights(Protocol):
    """Where leaves are read from.

    Attributes:
      files: all that the weights are made of.
    """

    @property
    def files(self) -> tuple[Path, ...]: ...

    def dtype(self, leaf: str) -> np.dtype:
        """The type that a leaf has there."""
        ...

    def read(
        self, leaf: str, region: Region, dtype: np.dtype, seen: Callable[[np.ndarray], None] | None = None
    ) -> np.ndarray:
        """A part of a leaf in our layout, C-contiguous.

        Args:
          leaf: its path, joined by ``/``.
          region: what of it is wanted.
          dtype: what it is cast to.
          seen: is given every array as it was read, before it is cast and laid out.

        Raises:
          CheckpointError: the part cannot be read.
        """
        ...


def open_weights(folder: Path, table: NameTable, skeleton: Mapping[str, Any]) -> Weights:
    """Opens a Hugging Face folder or a store, and checks names and shapes.

    Args:
      folder: either.
      table: the family's names.
      skeleton: nested dict of leaves with a ``shape``.

    Raises:
      CheckpointError: weights that are missing, broken, left over or misshaped, all listed.
    """
    return open_arrays(folder, skeleton) if is_store(folder) else open_safetensors(folder, table, skeleton)
