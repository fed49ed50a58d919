"""The numbers that hypotheses are measured on: a part of a component, so that layers of real sizes can be tried."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmllm.validation.diagnosis.case import Case

MOST_ROWS = 64
MOST_COLUMNS = 512


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some rows and columns of a component.

    Attributes:
      got, expected: the port's and the reference's, float64.
      mask: of their shape.
      kept: the rows, counted among those that the case holds.
      positions: the same rows, counted in the whole array.
      columns: indices along the last axis; ``None`` for all.
    """

    got: np.ndarray
    expected: np.ndarray
    mask: np.ndarray
    kept: np.ndarray
    positions: np.ndarray
    columns: np.ndarray | None = None

    def rows_of(self, array: np.ndarray) -> np.ndarray:
        """The sampled rows ``[B, R, ...]`` of an array ``[B, S, ...]``, whole or with the rows that the case holds."""
        index = self.positions if self.positions.max() < array.shape[1] else self.kept
        return np.asarray(array[:, index], np.float64)

    @property
    def difference(self) -> float:
        """How far the port is from the reference; see ``distance``."""
        return distance(self.got, self.expected, self.mask)


def batched(array: np.ndarray) -> np.ndarray:
    """Arrays of patches or tokens ``[M, D]`` as one example ``[1, M, D]``; others as they are."""
    return array[None] if array.ndim == 2 else array


def draw(case: Case, axis: int = 1, columns: bool = False) -> Sample:
    """Chooses rows: those that differ most and, between them, evenly spaced ones; likewise columns.

    Args:
      case: the departure; arrays ``[M, D]`` count as ``[1, M, D]``.
      axis: of the rows.
      columns: whether the last axis may be cut as well.
    """
    got, expected = batched(case.got), batched(case.expected)
    mask = np.asarray(case.mask, bool)
    mask = mask[None] if case.got.ndim == 2 else mask
    mask = np.broadcast_to(mask.reshape(*mask.shape, *(1,) * (got.ndim - mask.ndim)), got.shape)
    rows = _worst_and_even(_errors(got, expected, mask, axis), MOST_ROWS)
    got, expected, mask = (np.take(array, rows, axis=axis) for array in (got, expected, mask))
    chosen = None
    if columns and got.shape[-1] > MOST_COLUMNS:
        chosen = _worst_and_even(_errors(got, expected, mask, got.ndim - 1), MOST_COLUMNS)
        got, expected, mask = (array[..., chosen] for array in (got, expected, mask))
    positions = rows if case.rows is None else np.asarray(case.rows)[rows]
    return Sample(got.astype(np.float64), expected.astype(np.float64), mask, rows, positions, chosen)


def distance(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Root mean square of the differences; infinite where one side is not finite and the other differs."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, a - b)[mask]
    if not np.isfinite(gap).all():
        return float("inf")
    return float(np.sqrt(np.mean(gap**2))) if gap.size else 0.0


def _errors(got: np.ndarray, expected: np.ndarray, mask: np.ndarray, axis: int) -> np.ndarray:
    """Sum of the squared differences of each row."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(mask, got.astype(np.float64) - expected, 0.0) ** 2
    others = tuple(each for each in range(gap.ndim) if each != axis)
    return np.nan_to_num(gap, nan=np.inf).sum(axis=others)


def _worst_and_even(errors: np.ndarray, most: int) -> np.ndarray:
    if len(errors) <= most:
        return np.arange(len(errors))
    worst = np.argsort(-errors, kind="stable")[: most // 2]
    even = np.linspace(0, len(errors) - 1, most - len(worst)).astype(int)
    return np.unique(np.concatenate([worst, even]))
