"""How well a reference answer is predicted."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmllm.models.layers import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """How well a reference answer is predicted; every leaf has the same leading axes, written ``...``.

    Attributes:
      log_probability: of the whole answer, natural logarithm, summed over its tokens.
      correct: whether greedy decoding would give every token of the answer.
      rank: of the answer's first token among all tokens; 0 is the first.
    """

    log_probability: Leaf
    correct: Leaf
    rank: Leaf


def score(logits: Float[Array, "*axes A V"], answer_ids: Int[Array, "#B A"]) -> Scores:
    """Scores of an answer from the logits at the positions that predict its tokens; -1 in ``answer_ids`` is padding."""
    there = answer_ids >= 0
    wanted = jnp.maximum(answer_ids, 0)[..., None]
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    token = jnp.take_along_axis(log_probabilities, jnp.broadcast_to(wanted, (*logits.shape[:-1], 1)), axis=-1)
    right = logits.argmax(axis=-1) == answer_ids
    return Scores(
        log_probability=jnp.sum(jnp.where(there, token[..., 0], 0.0), axis=-1),
        correct=jnp.all(right | ~there, axis=-1),
        rank=jnp.sum(log_probabilities[..., 0, :] > token[..., 0, :], axis=-1),
    )
