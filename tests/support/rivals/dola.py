"""DoLa: the next token's log-probabilities less those of the early layer that differs most from the final one.

voidism/DoLa@805230e: transformers-4.28.1/src/transformers/generation/utils.py (``relative_top_filter`` and
``dola_greedy_decode``) and models/llama/modeling_llama.py, where early logits skip the final norm.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

FLOOR = -1e3

Model = Callable[[list[int]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class DolaResult:
    """New tokens with the final ``eos`` if one came, and for each its early layer and its scores ``[V]``.

    The scores are those that the token is the argmax of, after the repetition penalty.
    """

    tokens: list[int]
    layers: list[int]
    scores: list[np.ndarray]


def dola(
    model: Model,
    prompt: list[int],
    candidates: list[int],
    *,
    eos: int,
    max_new_tokens: int,
    relative_top: float = 0.1,
    repetition_penalty: float = 1.2,
) -> DolaResult:
    """Decodes greedily with ``model(tokens)``: final logits ``[V]`` and those of the early layers ``[C, V]``."""
    tokens: list[int] = []
    layers, kept = [], []
    while len(tokens) < max_new_tokens and tokens[-1:] != [eos]:
        final, early = model(prompt + tokens)
        chosen, scores = dola_scores(final, early, relative_top)
        scores = penalise_repetition(scores, prompt + tokens, repetition_penalty)
        tokens.append(int(scores.argmax()))
        layers.append(candidates[chosen])
        kept.append(scores)
    return DolaResult(tokens, layers, kept)


def dola_scores(
    final_logits: np.ndarray, early_logits: np.ndarray, relative_top: float = 0.1
) -> tuple[int, np.ndarray]:
    """The index of the early layer chosen among ``[C, V]``, and the scores ``[V]``."""
    chosen, scores = dola_batch_scores(final_logits[None], early_logits[None], relative_top)
    return chosen, scores[0]


def dola_batch_scores(
    final_logits: np.ndarray, early_logits: np.ndarray, relative_top: float = 0.1
) -> tuple[int, np.ndarray]:
    """One early layer for the whole batch ``[B, V]``, chosen among ``[B, C, V]``, and the scores ``[B, V]``."""
    final, early = final_logits.astype(np.float64), early_logits.astype(np.float64)
    chosen = int(divergences(final, early).mean(0).argmax())
    base = early[:, chosen]
    if relative_top <= 0:
        return chosen, final - base  # raw logits, not normalised
    filtered = relative_top_filter(final, relative_top)
    base = log_softmax(base)
    base[0, filtered[0] < FLOOR] = FLOOR  # of the first example alone
    return chosen, filtered - base


def divergences(final: np.ndarray, early: np.ndarray) -> np.ndarray:
    """Of each early layer from the final one, ``[B, C]``: half KL(M || final) plus half KL(M || early), over V.

    M is the mean of the two distributions. This is not the Jensen-Shannon divergence, whose KLs start at the two.
    """
    log_final, log_early = log_softmax(final)[:, None], log_softmax(early)
    mean = (np.exp(log_final) + np.exp(log_early)) / 2
    return (divergence(mean, log_final) + divergence(mean, log_early)) / 2


def divergence(probabilities: np.ndarray, log_others: np.ndarray) -> np.ndarray:
    """KL divergence, divided by the size of the vocabulary; a token of probability 0 counts for nothing."""
    possible = probabilities > 0
    logs = np.log(np.where(possible, probabilities, 1.0))
    differences = logs - np.where(possible, log_others, 0.0)
    return (probabilities * differences).mean(-1)


def relative_top_filter(logits: np.ndarray, relative_top: float) -> np.ndarray:
    """Log-probabilities, -inf where the probability is below ``relative_top`` times the largest."""
    scores = log_softmax(logits)
    return np.where(scores < scores.max(-1, keepdims=True) + np.log(relative_top), -np.inf, scores)


def penalise_repetition(scores: np.ndarray, tokens: list[int], penalty: float) -> np.ndarray:
    """Scores of tokens that have occurred, divided by the penalty if positive and times it if negative, once each."""
    penalised = scores.copy()
    for token in set(tokens):
        penalised[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    return penalised


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
