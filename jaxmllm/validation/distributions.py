"""Differences of arrays as distributions, in the array's own units, in ulps and relative to the tensor's scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far an array is from a reference.

    Attributes:
      count: numbers compared.
      scale: root mean square of the reference.
      mean, p99, max: of the absolute differences; infinite where one side is not finite and the other differs.
      ulp_mean, ulp_p99, ulp_max: the same in ulps: units in the last place of the reference's number or, where that is
        smaller, of the tensor's scale, in the type that was computed in.
      cosine: of the angle between both arrays; 1 where both are zero.
      worst: index of the largest difference in the kept array.
      gain: what rows (last axis) are scaled by as a whole: the mean over rows of |<difference, row>| / <row, row>. What
        each number is rounded by averages out in it, and what all numbers of a row have in common stays.
    """

    count: int
    scale: float
    mean: float
    p99: float
    max: float
    ulp_mean: float
    ulp_p99: float
    ulp_max: float
    cosine: float
    worst: tuple[int, ...] = ()
    gain: float = 0.0

    @property
    def relative(self) -> float:
        """The largest difference over the scale."""
        return self.max / self.scale if self.scale else self.max and float("inf")

    def to_json(self) -> dict[str, Any]:
        """As JSON; numbers that are not finite become text."""
        fields = dataclasses.asdict(self) | {"worst": list(self.worst)}
        return {
            name: str(value) if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in fields.items()
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Errors:
        """The inverse of ``to_json``."""
        numbers = {name: float(value) if isinstance(value, str) else value for name, value in fields.items()}
        return cls(**numbers | {"worst": tuple(fields["worst"])})


def spacing(values: np.ndarray | float, dtype: np.dtype) -> np.ndarray:
    """The unit in the last place of numbers in a type, as float64; subnormals count as the smallest normal number."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(values).astype(np.float64), float(info.tiny))))
    return np.asarray(np.exp2(exponent - info.nmant))


def measure(got: np.ndarray, expected: np.ndarray, mask: np.ndarray, dtype: str) -> Errors:
    """The distribution of differences.

    Args:
      got, expected: arrays of one shape.
      mask: which of their numbers count; may have fewer axes than they, and then stands for whole rows.
      dtype: what both were computed in: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
      ValueError: the shapes differ.
    """
    if np.shape(got) != np.shape(expected):
        raise ValueError(f"an array of shape {np.shape(got)} cannot be compared with one of shape {np.shape(expected)}")
    mask = np.asarray(mask, bool)
    kept = np.argwhere(mask)
    a, b = np.asarray(got)[mask].astype(np.float64), np.asarray(expected)[mask].astype(np.float64)
    if not b.size:
        return Errors(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    scale = float(np.sqrt(np.mean(np.where(np.isfinite(b), b, 0.0) ** 2)))
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.where(same, 0.0, np.where(np.isfinite(gap), gap, np.inf))
    ulps = gap / spacing(np.maximum(np.where(np.isfinite(b), np.abs(b), 0.0), scale), DTYPES[dtype])
    worst = np.unravel_index(int(np.argmax(gap)), gap.shape)
    return Errors(
        count=int(b.size),
        scale=scale,
        mean=float(gap.mean()),
        p99=_percentile(gap),
        max=float(gap.max()),
        ulp_mean=float(ulps.mean()),
        ulp_p99=_percentile(ulps),
        ulp_max=float(ulps.max()),
        cosine=_cosine(a, b),
        worst=tuple(int(at) for at in (*kept[worst[0]], *worst[1:])),
        gain=_gain(got, expected, mask),
    )


def _gain(got: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    """See ``Errors.gain``; infinite where a difference is not finite."""
    a, b = (np.atleast_1d(np.asarray(array)).astype(np.float64) for array in (got, expected))
    counted = np.broadcast_to(mask.reshape(mask.shape + (1,) * (b.ndim - mask.ndim)), b.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        along = np.where(counted & (a != b), (a - b) * b, 0.0).sum(axis=-1)
        square = np.where(counted, b * b, 0.0).sum(axis=-1)
        rows = square > 0
        shares = np.abs(along[rows]) / square[rows]
    if not np.isfinite(shares).all():
        return float("inf")
    return float(shares.mean()) if shares.size else 0.0


def _percentile(values: np.ndarray) -> float:
    """The 99th percentile: the smallest number that 99% of the numbers do not exceed."""
    flat = values.ravel()
    place = min(len(flat) - 1, int(np.ceil(0.99 * len(flat))) - 1)
    return float(np.partition(flat, place)[place])


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan") if not np.array_equal(a, b, equal_nan=True) else 1.0
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    if lengths == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(np.clip(np.vdot(a, b) / lengths, -1.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two output distributions agree.

    Attributes:
      rows: distributions compared.
      top1: share of rows with the same most probable token.
      undecided: share of rows in which another token wins, but by less than the noise of the logits.
      kl_mean, kl_max: Kullback-Leibler divergence of the port from the reference, in nats.
    """

    rows: int
    top1: float
    undecided: float
    kl_mean: float
    kl_max: float


def agreement(got: np.ndarray, expected: np.ndarray, noise: float) -> Agreement:
    """Compares logits ``[R, V]``.

    Args:
      got, expected: logits of the port and of the reference.
      noise: largest difference of a logit that means nothing.
    """
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    log_a, log_b = (rows - _logsumexp(rows) for rows in (a, b))
    # a token that is impossible on both sides, as where a model masks some, adds nothing
    impossible = np.isneginf(log_a) & np.isneginf(log_b)
    gaps = np.where(impossible, 0.0, np.where(impossible, 0.0, log_b) - np.where(impossible, 0.0, log_a))
    divergence = np.sum(np.exp(log_b) * gaps, axis=-1)
    winner_a, winner_b = a.argmax(axis=-1), b.argmax(axis=-1)
    other = winner_a != winner_b
    lead = b[np.arange(len(b)), winner_b] - b[np.arange(len(b)), winner_a]
    return Agreement(
        rows=len(b),
        top1=float(np.mean(~other)),
        undecided=float(np.mean(other & (lead <= 2 * noise))),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
    )


def _logsumexp(rows: np.ndarray) -> np.ndarray:
    top = rows.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(rows - top).sum(axis=-1, keepdims=True))
