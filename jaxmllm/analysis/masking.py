"""Layer-wise visual masking: how much does an answer suffer when the image is hidden at each layer?

The plain form: every branch (one layer's edit) runs the whole decoder. The image is encoded once for all branches, and
branches run one after another under ``lax.map``, so memory does not grow with their number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmllm.analysis.edits import blind_image, erase_image, from_layer, knockout, stack_edits, up_to_layer, window
from jaxmllm.analysis.scores import Scores, score
from jaxmllm.errors import InputError
from jaxmllm.models import forward as pure
from jaxmllm.models.capture import ATTENTION, EARLY_LOGITS, Capture, row_index
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layout import gather_rows
from jaxmllm.processing import append_answers, encode_answers

Scope = str | int  # "single", "from", "up_to", or the width of a window

EDIT_MAKERS: dict[str, Callable[[Any], Edits]] = {
    "erase": erase_image,
    "blind": blind_image,
    "knockout": knockout,
}


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """A masking sweep over one batch of questions.

    Attributes:
      layers: the layer of each branch.
      edited: scores ``[branches, B]``.
      clean: scores ``[B]`` of the unedited model.
      early: scores ``[L, B]`` of the answer read from every layer's output (early output).
      attention: ``[L, B, N]``: head-mean attention of the last prompt token to the image tokens in the clean pass.
    """

    layers: tuple[int, ...]
    edited: Scores
    clean: Scores
    early: Scores
    attention: Float[np.ndarray, "L B N"]

    @property
    def drop(self) -> Float[np.ndarray, " branches"]:
        """Accuracy lost by layer, 0..1."""
        return np.asarray(self.clean.correct).mean() - np.asarray(self.edited.correct).mean(axis=-1)


def layer_edits(edits: str, scope: Scope, num_layers: int) -> list[Edits]:
    """One edit a layer.

    Args:
      edits: ``erase``, ``blind`` or ``knockout``.
      scope: ``single``: layer i alone; ``from``: i and all after; ``up_to``: all up to i; an odd number: a window of so
        many layers around i, clipped to the model.
      num_layers: L.

    Raises:
      InputError: an unknown edit or scope.
    """
    if edits not in EDIT_MAKERS:
        raise InputError(f"unknown edits {edits!r}; expected one of {', '.join(EDIT_MAKERS)}")
    make = EDIT_MAKERS[edits]
    layers = range(num_layers)
    if scope == "single":
        return [make(layer) for layer in layers]
    if scope == "from":
        return [make(from_layer(layer)) for layer in layers]
    if scope == "up_to":
        return [make(up_to_layer(layer)) for layer in layers]
    if isinstance(scope, int) and scope > 0 and scope % 2:
        half = scope // 2
        return [make(window(max(0, i - half), min(num_layers, i + half + 1))) for i in layers]
    raise InputError(f"unknown scope {scope!r}; expected 'single', 'from', 'up_to' or an odd number of layers")


CLEAN_CAPTURE = Capture.attention(rows="last", keys="image") | Capture.early_output(rows="answer")


@functools.partial(jax.jit, static_argnames=("graphdef",))
def sweep_batch(
    graphdef: nnx.GraphDef,
    params: pure.Params,
    inputs: Inputs,
    answer_ids: Int[Array, "B A"],
    branches: Mapping[str, Edits],
) -> tuple[dict[str, Scores], Scores, Scores, Float[Array, "L B N"]]:
    """Clean pass with its captures, then every branch.

    Args:
      graphdef: of the model.
      params: of the model.
      inputs: prompts followed by their answers.
      answer_ids: the answers' tokens.
      branches: by name, edits stacked along a leading branch axis.

    Returns:
      Scores by name ``[branches, B]``; clean ``[B]``; early output ``[L, B]``; attention ``[L, B, N]``.
    """
    module = pure.merge(graphdef, params)
    layout = pure.layout_of(inputs, module.config.image_token_id)
    embedded = pure.embed(module, inputs)

    def answer_logits(hidden: Array) -> Array:
        return module.decoder.logits(gather_rows(hidden, row_index("answer", layout)))

    def branch(edits: Edits) -> Scores:
        return score(answer_logits(module.decoder(embedded, layout, edits)[0]), answer_ids)

    hidden, captured = module.decoder(embedded, layout, None, CLEAN_CAPTURE)
    edited = {name: jax.lax.map(branch, edits) for name, edits in branches.items()}
    attention = captured[ATTENTION][:, :, 0]
    return edited, score(answer_logits(hidden), answer_ids), score(captured[EARLY_LOGITS], answer_ids), attention


def sweep(
    model: Any,
    inputs: Mapping[str, Any],
    targets: Sequence[str],
    edits: str | Sequence[Edits] = "erase",
    scope: Scope = "single",
    params: pure.Params | None = None,
) -> SweepResult:
    """Hides the image at every layer in turn and scores the reference answers.

    Args:
      model: a loaded model.
      inputs: prompts, from ``model.prepare``.
      targets: the reference answer of each question.
      edits: ``erase``, ``blind``, ``knockout``, or edits of your own, one a branch and all of one structure.
      scope: which layers each branch edits; see ``layer_edits``.
      params: weights to use instead of ``model.params``.

    Raises:
      InputError, ProcessorError: edits, inputs or answers that do not fit.

    Source: arXiv 2601.08151, part 1 (layer-wise visual masking, attention evolution, early output).
    """
    branches = layer_edits(edits, scope, model.num_layers) if isinstance(edits, str) else list(edits)
    for branch in branches:
        branch.check(model.num_layers)
    prompts = append_answers(inputs, encode_answers(model.processor, targets))
    edited, clean, early, attention = jax.tree.map(
        np.asarray,
        sweep_batch(
            model.graphdef,
            model.params if params is None else params,
            model.as_inputs(prompts),
            jnp.asarray(prompts["answer_ids"]),
            {"sweep": stack_edits(branches)},
        ),
    )
    return SweepResult(tuple(range(len(branches))), edited["sweep"], clean, early, attention)
