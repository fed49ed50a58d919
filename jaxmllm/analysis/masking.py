"""Layer-wise visual masking: how much does an answer suffer when the image is hidden at each layer?

A branch is one edit, of one layer or window. This is the plain way to run many of them: edit all, run all. The fast way
(``jaxmllm.analysis.sweeping``) has to agree with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmllm.analysis.edits import blind_image, erase_image, from_layer, knockout, stack_edits, up_to_layer, window
from jaxmllm.analysis.scores import BlockScores, Scores, score
from jaxmllm.errors import InputError
from jaxmllm.models import forward as pure
from jaxmllm.models.capture import ATTENTION, EARLY_LOGITS, Capture, row_index
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layout import gather_rows
from jaxmllm.models.sharding import context, put_rows, to_host

Scope = str | int  # "single", "from", "up_to", or the width of a window

EDIT_MAKERS: dict[str, Callable[[Any], Edits]] = {
    "erase": erase_image,
    "blind": blind_image,
    "knockout": knockout,
}


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
    graphdef: Any,
    params: pure.Params,
    inputs: Inputs,
    answer_ids: Int[Array, "B A"],
    branches: Mapping[str, Edits],
) -> tuple[dict[str, Scores], Scores, Scores, Float[Array, "L B N"]]:
    """The plain sweep: clean pass with its captures, then the whole decoder for every branch.

    The image is encoded once for all branches, and branches run one after another under ``lax.map``, so memory does not
    grow with their number.

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
    edited = {
        # hooks are no arrays, so branches of hooks alone are all the same one
        name: jax.lax.map(branch, edits) if jax.tree.leaves(edits) else jax.tree.map(lambda x: x[None], branch(edits))
        for name, edits in branches.items()
    }
    attention = captured[ATTENTION][:, :, 0]
    return edited, score(answer_logits(hidden), answer_ids), score(captured[EARLY_LOGITS], answer_ids), attention


def run_plain(
    model: Any, params: pure.Params, inputs: Inputs, answer_ids: Int[np.ndarray, "R A"], branches: Sequence[Edits]
) -> BlockScores:
    """Clean pass and every branch over all questions in one batch; branches may be of unlike kinds."""
    alike: dict[Any, list[int]] = {}
    for number, edits in enumerate(branches):
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(edits)]
        alike.setdefault((jax.tree.structure(edits), *shapes), []).append(number)
    stacks = {str(place): stack_edits([branches[n] for n in numbers]) for place, numbers in enumerate(alike.values())}
    with context(model.mesh):
        asked, wanted = put_rows((inputs, answer_ids), model.mesh)
        by_stack, clean, early, attention = to_host(sweep_batch(model.graphdef, params, asked, wanted, stacks))
    order = np.argsort(np.concatenate([np.array(numbers, int) for numbers in alike.values()]))
    whole = [
        jax.tree.map(lambda leaf, many=len(numbers): np.broadcast_to(leaf, (many, *leaf.shape[1:])), by_stack[name])
        for name, numbers in zip(stacks, alike.values(), strict=True)
    ]
    edited = jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *whole)
    return BlockScores(edited, clean, early, attention)
