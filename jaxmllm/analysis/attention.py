"""Measures of how attention to the image changes with depth.

All of them take what ``Capture.attention(rows="last", keys="image")`` returns with its row axis taken off:
``[L, B, N]``, the head-mean attention from the reading position to the image tokens. They work on any array with the
image tokens last, and are differentiable and jit-able.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmllm.errors import InputError

AnyArray = Array | np.ndarray
Candidates = str | Sequence[int]  # "all", "deep", "shallow", or layers


def image_distribution(attention: Float[AnyArray, "*axes N"]) -> Float[Array, "*axes N"]:
    """Attention renormalised to sum to 1 over the image tokens (a row without any attention becomes uniform)."""
    attention = jnp.asarray(attention, jnp.float32)
    total = attention.sum(axis=-1, keepdims=True)
    positive = total > 0
    return jnp.where(positive, attention / jnp.where(positive, total, 1.0), 1.0 / attention.shape[-1])


def hellinger(p: Float[AnyArray, "*#axes N"], q: Float[AnyArray, "*#axes N"]) -> Float[Array, "..."]:
    """Hellinger distance ``sqrt(sum_j (sqrt(p_j) - sqrt(q_j))^2) / sqrt(2)`` of distributions on the last axis, 0..1.

    Source: arXiv 2601.08151, part 1 (attention evolution).
    """
    difference = _root(jnp.asarray(p, jnp.float32)) - _root(jnp.asarray(q, jnp.float32))
    return _root(jnp.sum(difference**2, axis=-1) / 2.0)


def _root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root whose gradient at 0 is 0 rather than infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def attention_evolution(attention: Float[AnyArray, "L *axes N"]) -> Float[Array, " L *axes"]:
    """Hellinger distance of every layer's attention over the image to the last layer's."""
    distribution = image_distribution(attention)
    return hellinger(distribution, distribution[-1:])


def candidate_layers(candidates: Candidates, num_layers: int) -> list[int]:
    """The layers among which the pre-fusion layer is chosen.

    ``all``: every layer but the last (whose distance to itself is 0); ``deep``: above 17 of 32; ``shallow``: below 16
    of 32, both in proportion to the depth; or the layers themselves, such as a fusion set.

    Raises:
      InputError: an unknown name, a layer that does not exist, or no candidate left.
    """
    if isinstance(candidates, str):
        chosen = {
            "all": list(range(num_layers - 1)),
            "deep": [layer for layer in range(num_layers - 1) if layer > 17 / 32 * num_layers],
            "shallow": [layer for layer in range(num_layers - 1) if layer < 16 / 32 * num_layers],
        }.get(candidates)
        if chosen is None:
            raise InputError(f"unknown candidates {candidates!r}; expected 'all', 'deep', 'shallow' or layers")
    else:
        chosen = [int(layer) for layer in candidates]
        outside = [layer for layer in chosen if not 0 <= layer < num_layers]
        if outside:
            raise InputError(f"no layers {outside}: the model has decoder layers 0..{num_layers - 1}")
    if not chosen:
        raise InputError(f"no candidate layer in {candidates!r} of a model with {num_layers} layers")
    return chosen


def pre_fusion_layer(attention: Float[AnyArray, "L *axes N"], candidates: Candidates = "all") -> Int[Array, "*axes"]:
    """``i* = argmax over candidate layers of H(A(i), A(last))``, for each example.

    Source: arXiv 2601.08151, part 2. There the candidates are all, deep, shallow or (best) the fusion layers.
    """
    layers = jnp.asarray(candidate_layers(candidates, attention.shape[0]))
    return layers[jnp.argmax(attention_evolution(attention)[layers], axis=0)]


def contrastive_attention(
    attention: Float[AnyArray, "L B N"],
    pre: Int[AnyArray, " B"] | int | None = None,
    post: Int[AnyArray, " B"] | int = -1,
    candidates: Candidates = "all",
) -> Float[Array, "B N"]:
    """``A(post) - A(pre)`` over the image tokens: noise that both layers share cancels, what gained attention stays.

    Args:
      attention: head-mean attention of the reading position, each layer renormalised here.
      pre: the pre-fusion layer, one for all or one an example; by default ``pre_fusion_layer`` among ``candidates``.
      post: the layer it is subtracted from; the last by default.
      candidates: see ``candidate_layers``; used when ``pre`` is not given.

    Source: arXiv 2601.08151, part 2.
    """
    distribution = image_distribution(attention)
    if pre is None:
        pre = pre_fusion_layer(attention, candidates)
    return _at_layer(distribution, post) - _at_layer(distribution, pre)


def _at_layer(values: Float[Array, "L B N"], layer: Int[AnyArray, " B"] | int) -> Float[Array, "B N"]:
    examples = jnp.arange(values.shape[1])
    return values[jnp.broadcast_to(jnp.asarray(layer), examples.shape), examples]
