"""Attention over keys that may come in several parts, without ever holding a square of scores.

Queries are worked off in static chunks, and under a causal mask a chunk meets only the keys up to its end. Keys may
come in parts with leading axes of their own: a part that all examples share is kept, and multiplied, once. That is what
a sweep needs, in which the erased image's keys serve every question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmllm.models.layers import Leaf
from jaxmllm.models.sharding import MODEL, mesh_axis

# Score of a query-key pair that may not attend: far below any real score, yet finite, so that a row in which
# everything is blocked gives a distribution rather than NaN, and so that three of them can be added in float32.
BLOCKED = float(np.finfo(np.float32).min) / 4

# Queries a chunk. Measured on a CPU: 128 keeps a head's scores in cache at S from 600 to 3,000.
QUERY_CHUNK = 128

# exp2 is several times faster than exp on XLA's CPU backend.
LOG2_E = 1.4426950408889634


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys (rotated) and values of a run of positions.

    Attributes:
      key ``[G, T, K, E]``, value ``[G, T, K, E]``: G divides the number of examples; row b of the batch reads row
        ``b // (B // G)``. So G is 1 for what all share and B for what each has alone.
    """

    key: Leaf
    value: Leaf

    @property
    def length(self) -> int:
        """T, the number of positions."""
        return self.key.shape[1]


# Bias of the queries ``[start, stop)`` towards the first ``seen`` keys (all parts counted): [#B, r, seen], float32.
BiasOf = Callable[[int, int, int], Float[Array, "#B r seen"]]


def attention(
    query: Float[Array, "B S H E"],
    own: KeyValue,
    past: Sequence[KeyValue] = (),
    bias_of: BiasOf | None = None,
    causal: bool = False,
) -> Float[Array, "B S H E"]:
    """Grouped-query attention; softmax in float32, scores scaled by ``E ** -0.5``.

    Args:
      query: rotated queries.
      own: keys and values of the queries' own positions (or, where nothing is causal, of any others).
      past: parts that stand before them, in order.
      bias_of: additive bias in float32; ``None`` is none.
      causal: no query sees keys behind its own position, so these need not be multiplied. ``bias_of`` must still
        block them within a chunk.
    """
    batch, length, heads, width = query.shape
    kv_heads = own.key.shape[2]
    before = sum(part.length for part in past)
    queries = jnp.moveaxis(query.reshape(batch, length, kv_heads, heads // kv_heads, width), 2, 0)
    parts = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 2, 0), [*past, own])
    chunks = [(start, min(start + QUERY_CHUNK, length)) for start in range(0, length, QUERY_CHUNK)]
    biases = [
        None if bias_of is None else bias_of(start, stop, before + (stop if causal else own.length))
        for start, stop in chunks
    ]

    def one_head(head: tuple[Array, list[KeyValue]]) -> Float[Array, "B S h E"]:
        queries, parts = head
        mixed = []
        for (start, stop), bias in zip(chunks, biases, strict=True):
            seen = stop if causal else own.length
            near = jax.tree.map(lambda leaf, seen=seen: leaf[:, :seen], parts[-1])
            mixed.append(_mix(queries[:, start:stop], [*parts[:-1], near], bias))
        return jnp.concatenate(mixed, axis=1)

    def all_at_once(*heads: Any) -> Float[Array, "K B S h E"]:
        return jax.vmap(lambda *head: one_head(head))(*heads)

    def one_by_one(*heads: Any) -> Float[Array, "K B S h E"]:
        return jax.lax.map(one_head, heads)

    # One head at a time keeps the scores in a CPU's cache (twice as fast); an accelerator wants all heads at once. So
    # does a single query, whose scores are few: heads apart would each be copied. Heads that lie on several devices
    # are not gathered either.
    if length == 1 or mesh_axis(MODEL) > 1:
        mixed = all_at_once(queries, parts)
    else:
        mixed = jax.lax.platform_dependent(queries, parts, cpu=one_by_one, default=all_at_once)
    return jnp.moveaxis(mixed, 0, 2).reshape(batch, length, heads, width)


def _mix(
    query: Float[Array, "B r h E"], parts: Sequence[KeyValue], bias: Float[Array, "#B r seen"] | None
) -> Float[Array, "B r h E"]:
    """Attention of one key-value head: softmax over all parts together, each multiplied where it lies."""
    batch, rows, group, width = query.shape
    scale, offset, scores = width**-0.5, 0, []
    for part in parts:
        shared, length, _ = part.key.shape
        product = jnp.einsum(
            "gqe,gte->gqt", query.reshape(shared, -1, width), part.key, preferred_element_type=jnp.float32
        )
        scaled = product.reshape(batch, rows, group, length) * scale
        if bias is not None:
            scaled = scaled + bias[:, :, None, offset : offset + length]
        scores.append(scaled)
        offset += length
    highest = jax.lax.stop_gradient(_highest(scores))
    # The difference before the factor: fused the other way round, equal scores as large as BLOCKED would differ.
    weights = [jnp.exp2((score - highest) * LOG2_E) for score in scores]
    total = mixed = jnp.zeros((), jnp.float32)
    for part, weight in zip(parts, weights, strict=True):
        shared, length, _ = part.key.shape
        total = total + weight.sum(axis=-1)
        weight = weight.reshape(shared, -1, length).astype(part.value.dtype)
        product = jnp.einsum("gqt,gte->gqe", weight, part.value, preferred_element_type=jnp.float32)
        mixed = mixed + product.reshape(batch, rows, group, width)
    return (mixed / total[..., None]).astype(query.dtype)


def _highest(scores: Sequence[Float[Array, "B r h _"]]) -> Float[Array, "B r h 1"]:
    highest = scores[0].max(axis=-1, keepdims=True)
    for score in scores[1:]:
        highest = jnp.maximum(highest, score.max(axis=-1, keepdims=True))
    return highest


def attention_rows(
    query: Float[Array, "B R H E"], parts: Sequence[KeyValue], bias: Float[Array, "B R T"]
) -> Float[Array, "B H R T"]:
    """The attention weights of a few query rows over all parts, in float32: softmax of scaled scores plus bias."""
    batch, rows, heads, width = query.shape
    scores = []
    for part in parts:
        shared, length, kv_heads, _ = part.key.shape
        # heads first, as in ``attention``, so that the keys are brought into that order once
        grouped = jnp.moveaxis(query.reshape(batch, rows, kv_heads, -1, width), 2, 0).astype(jnp.float32)
        grouped = grouped.reshape(kv_heads, shared, -1, width)
        keys = jnp.moveaxis(part.key, 2, 0).astype(jnp.float32)
        product = jnp.einsum("kgqe,kgte->kgqt", grouped, keys) * width**-0.5
        product = product.reshape(kv_heads, batch, rows, heads // kv_heads, length)
        scores.append(product.transpose(1, 0, 3, 2, 4).reshape(batch, heads, rows, length))
    return jax.nn.softmax(jnp.concatenate(scores, axis=-1) + bias[:, None], axis=-1)
