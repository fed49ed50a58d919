"""Attention written once more, of a decoder layer or of a vision block, apart from the code that is under test."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.parts import Linear, Mask, Projection, rounded
from jaxmllm.validation.diagnosis.rotary import Rotary
from jaxmllm.validation.diagnosis.sample import Sample

FEW_HEADS = 8


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of some queries, and of some heads, to all keys.

    Attributes:
      query: at the sampled rows; ``key`` and ``value`` at all positions; none of them turned.
      mask: what a query may see.
      rows: positions of the queries.
      source: the key-value head that each query head reads.
      scale: of the scores.
      turn_query, turn_key: rotary embedding, if there is any.
      over_queries: the softmax sums over queries.
      sink: a score of zero that takes its share of the weights.
      round_scores, round_weights: what they are rounded to.
    """

    query: Projection
    key: Projection
    value: Projection
    mask: Mask
    rows: np.ndarray
    source: np.ndarray
    scale: float
    turn_query: Rotary | None = None
    turn_key: Rotary | None = None
    over_queries: bool = False
    sink: bool = False
    round_scores: str | None = None
    round_weights: str | None = None

    def keys(self) -> np.ndarray:
        """Turned keys ``[B, S, k, E]``."""
        return self.key.array if self.turn_key is None else self.turn_key.turn(self.key.array)

    def weights(self) -> np.ndarray:
        """``[B, H, R, S]``."""
        query = self.query.array
        if self.turn_query is not None:
            query = self.turn_query.turn(query, self.rows)
        keys = self.keys()[:, :, self.source]
        scores = np.matmul(np.moveaxis(query, 1, 2), keys.transpose(0, 2, 3, 1)) * self.scale
        scores = np.where(self.mask.of(self.rows)[:, None], rounded(scores, self.round_scores), -1e30)
        axis = -2 if self.over_queries else -1
        highest = scores.max(axis=axis, keepdims=True)
        highest = np.maximum(highest, 0.0) if self.sink else highest
        weights = np.exp(scores - highest)
        total = weights.sum(axis=axis, keepdims=True) + (np.exp(-highest) if self.sink else 0.0)
        return rounded(weights / total, self.round_weights)

    def mixed(self) -> np.ndarray:
        """Values ``[B, R, H, E]``, weighted."""
        values = np.moveaxis(self.value.array[:, :, self.source], 1, 2)
        return np.moveaxis(np.matmul(self.weights(), values), 1, 2)


@dataclasses.dataclass(frozen=True)
class Output:
    """What attention adds to the stream: the heads' outputs through one map.

    Attributes:
      attention: of all heads.
      columns: outputs that are computed; ``None`` for all.
      width_first: heads are merged in the order place in the head, head.
      dropped: a head that is left out.
    """

    attention: Attention
    out: Linear
    columns: np.ndarray | None = None
    width_first: bool = False
    dropped: int | None = None

    @cached_property
    def mixed(self) -> np.ndarray:
        return self.attention.mixed()

    def __call__(self) -> np.ndarray:
        mixed = self.mixed
        if self.dropped is not None:
            mixed = mixed * (np.arange(mixed.shape[2]) != self.dropped)[:, None]
        merged = mixed.swapaxes(2, 3) if self.width_first else mixed
        return self.out.columns(self.columns)(merged.reshape(*mixed.shape[:2], -1))


def linear_of(case: Case, path: str, third: int | None = None) -> Linear | None:
    """A map with the port's weights; ``None`` where they are not at hand.

    Args:
      case: the departure.
      path: of its leaves.
      third: the part of a map to queries, keys and values together.
    """
    kernel, bias = case.leaf(f"{path}/kernel"), case.leaf(f"{path}/bias")
    if kernel is None:
        return None
    if third is not None:
        width = kernel.shape[1] // 3
        part = slice(third * width, (third + 1) * width)
        kernel, bias = kernel[:, part], None if bias is None else bias[part]
    return Linear(kernel, None if bias is None else bias.astype(np.float64))


def few_heads(case: Case, sample: Sample, count: int, kv_count: int) -> tuple[np.ndarray, np.ndarray]:
    """The query heads that are computed of attention weights, and the key-value heads they read."""
    if count <= FEW_HEADS:
        return np.arange(count), np.arange(kv_count)
    errors = np.where(sample.mask, sample.got - sample.expected, 0.0) ** 2
    worst = np.argsort(-np.nan_to_num(errors, nan=np.inf).sum(axis=(0, 2, 3)), kind="stable")[: FEW_HEADS // 2]
    heads = np.unique(np.concatenate([worst, np.linspace(0, count - 1, FEW_HEADS - len(worst)).astype(int)]))
    return heads, heads if kv_count == count else np.arange(kv_count)
