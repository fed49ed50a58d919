"""How probable given answers are: teacher forcing, and the letters of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmllm.analysis.scores import Scores, score
from jaxmllm.errors import InputError
from jaxmllm.models import forward as pure
from jaxmllm.models.edits import Edits
from jaxmllm.processing import append_answers, encode_answers


def score_answers(
    model: Any,
    inputs: Mapping[str, Any],
    answers: Sequence[str],
    edits: Edits | None = None,
    params: pure.Params | None = None,
) -> Scores:
    """Scores ``[B]`` of one given answer a question: log-probability, greedy correctness, rank of the first token.

    Args:
      model: a loaded model.
      inputs: prompts, from ``model.prepare``.
      answers: one a question; their end token is not counted.
      edits: interventions.
      params: weights to use instead of ``model.params``.

    Raises:
      ProcessorError, InputError: answers or inputs that do not fit.
    """
    forced = append_answers(inputs, encode_answers(model.processor, answers))
    out = model.forward(
        model.params if params is None else params,
        model.as_inputs(forced, bucketed=True),
        edits=edits,
        logits_at="answer",
    )
    return jax.tree.map(np.asarray, score(out.logits, jnp.asarray(forced["answer_ids"])))


def score_options(
    model: Any,
    inputs: Mapping[str, Any],
    options: Sequence[str],
    edits: Edits | None = None,
    params: pure.Params | None = None,
) -> Float[np.ndarray, "B O"]:
    """Log-probabilities (natural) of the same options for every question, such as the letters A to D.

    Options of one token each, as letters are, cost one forward pass together; longer ones a pass each.

    Args:
      model: a loaded model.
      inputs: prompts, from ``model.prepare``.
      options: texts of the options.
      edits: interventions.
      params: weights to use instead of ``model.params``.

    Raises:
      ProcessorError, InputError: options or inputs that do not fit; no options.
    """
    if isinstance(options, str) or not options:
        raise InputError(f"options are {options!r}; expected a list of texts, such as ['A', 'B', 'C', 'D']")
    tokens = encode_answers(model.processor, options)
    if any(len(ids) > 1 for ids in tokens):
        many = len(inputs["input_ids"])
        of_each = [score_answers(model, inputs, [option] * many, edits, params).log_probability for option in options]
        return np.stack(of_each, axis=-1)
    weights = model.params if params is None else params
    out = model.forward(weights, model.as_inputs(inputs, bucketed=True), edits=edits, logits_at="last")
    return np.asarray(jax.nn.log_softmax(out.logits[:, 0], axis=-1))[:, [ids[0] for ids in tokens]]
