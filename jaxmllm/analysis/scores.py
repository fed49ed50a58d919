"""How well a reference answer is predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
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


@dataclasses.dataclass(frozen=True)
class BlockScores:
    """Scores of some questions under some branches, in order; R is the number of questions.

    Attributes:
      edited ``[branches, R]``, clean ``[R]``.
      early ``[L, R]``: the answer read from every layer's output (early output).
      attention ``[L, R, N]``: head-mean attention of the last prompt token to the image tokens in the clean pass.
    """

    edited: Scores
    clean: Scores
    early: Scores
    attention: Float[np.ndarray, "L R N"]


def join_scores(blocks: Sequence[BlockScores]) -> BlockScores:
    """Scores of several blocks, one after another."""
    edited, clean, early = (
        jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *(getattr(block, name) for block in blocks))
        for name in ("edited", "clean", "early")
    )
    width = max(block.attention.shape[-1] for block in blocks)
    attention = [np.pad(block.attention, ((0, 0), (0, 0), (0, width - block.attention.shape[-1]))) for block in blocks]
    return BlockScores(edited, clean, early, np.concatenate(attention, axis=1))


def in_order(scores: BlockScores, order: Int[np.ndarray, " R"]) -> BlockScores:
    """The same questions in another order."""
    edited, clean, early = (
        jax.tree.map(lambda leaf: leaf[..., order], part) for part in (scores.edited, scores.clean, scores.early)
    )
    return BlockScores(edited, clean, early, scores.attention[:, order])


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
