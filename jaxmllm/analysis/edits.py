"""Constructors of interventions, in the field's terms.

>>> from jaxmllm.analysis import erase_image, knockout, compose, window
>>> both = compose(erase_image(12), knockout(window(0, 4), queries="question", keys="image"))

Layers are counted from 0. An edit knows neither the model nor the inputs: its layers and positions are settled when it
meets them in ``forward``. Layer numbers and strengths may be traced: ``jax.vmap(lambda i: ... erase_image(i))`` works.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmllm.errors import InputError
from jaxmllm.models.capture import RESIDUAL_SITES
from jaxmllm.models.edits import OPEN_END, Edits, HeadScale, Hook, Knockout, Layers, Mask, Positions
from jaxmllm.models.layout import ROLES, Role

# One layer, several, a range, or spans made by ``window``, ``from_layer`` and ``up_to_layer``.
LayerSet = Any
# A role's name, or weights: [S] or [B, S] over the sequence.
PositionSet = Any
Strength = float | Float[Array | np.ndarray, "..."]


class Spans(tuple):
    """Half-open ranges of layers, as pairs ``(start, stop)``."""


def window(start: Any, stop: Any) -> Spans:
    """Layers ``start .. stop - 1``.

    Raises:
      InputError: no layer lies between them.
    """
    if isinstance(start, int) and isinstance(stop, int) and stop <= start:
        raise InputError(f"window({start}, {stop}) holds no layer; stop must be above start")
    return Spans(((start, stop),))


def from_layer(layer: Any) -> Spans:
    """A layer and all that follow it."""
    return Spans(((layer, OPEN_END),))


def up_to_layer(layer: Any) -> Spans:
    """All layers up to and including one."""
    return Spans(((0, layer + 1),))


def _layers(layers: LayerSet, strength: Strength) -> Layers:
    if isinstance(layers, Spans):
        spans: Iterable[tuple[Any, Any]] = layers
    elif isinstance(layers, slice):
        if layers.step not in (None, 1):
            raise InputError(f"layers {layers}: a slice of layers must have step 1; give a list instead")
        spans = ((layers.start or 0, OPEN_END if layers.stop is None else layers.stop),)
    elif isinstance(layers, (list, tuple, range, set, frozenset)):
        spans = tuple((layer, layer + 1) for layer in layers)
        if not spans:
            raise InputError("no layers given; leave the edit out instead")
    else:
        spans = ((layers, layers + 1),)
    ends = [end for span in spans for end in span]
    named = layers if isinstance(layers, (list, tuple, set, frozenset)) else [layers]
    if any(isinstance(layer, (bool, np.bool_)) for layer in named):
        raise InputError(f"layers must be whole numbers, found {layers!r}")
    if all(isinstance(end, (int, np.integer)) for end in ends):
        if min(ends) < 0:
            raise InputError(f"no layer {min(ends)}: layers are counted from 0")
        array: Any = np.asarray(ends, np.int32)
    elif any(isinstance(end, (float, str)) or not jnp.issubdtype(jnp.result_type(end), jnp.integer) for end in ends):
        raise InputError(f"layers must be whole numbers, found {layers!r}")
    else:
        array = jnp.stack([jnp.asarray(end, jnp.int32) for end in ends])
    return Layers(array.reshape(-1, 2), _float(strength))


def _positions(positions: PositionSet) -> Positions:
    if isinstance(positions, str):
        if positions not in ROLES:
            raise InputError(f"unknown positions {positions!r}; expected one of {', '.join(ROLES)}, or weights")
        return Positions(None, positions)
    return Positions(_float(positions), "all")


def _image(weights: Any | None) -> Positions:
    return Positions(None if weights is None else _float(weights), "image")


def _float(value: Any) -> Any:
    return value.astype(jnp.float32) if isinstance(value, jax.Array) else np.asarray(value, np.float32)


def erase_image(layer: LayerSet, weights: Any | None = None, strength: Strength = 1.0) -> Edits:
    """Erase: zeroes the residual stream at image positions at the input of a layer; it then evolves from zero.

    Args:
      layer: one layer or several; the first one alone removes what the image tokens carried until then.
      weights: how far each image token is erased, ``[N]`` or ``[B, N]`` in sequence order; by default all, whole.
      strength: 1 erases, 0 does nothing; one number or one a layer ``[L]``.

    Source: arXiv 2601.08151, layer-wise visual masking (reading "the residual stream is zeroed from here on").
    """
    return Edits(erase=(Mask(_layers(layer, strength), _image(weights)),))


def blind_image(layers: LayerSet, weights: Any | None = None, strength: Strength = 1.0) -> Edits:
    """Blind: only these layers see zeros at image positions; the residual stream passes by.

    The inputs of the layer's attention and of its feed-forward block are zeroed, after their norms. What the blocks
    then write (attention from a zero query mixes the values it can see evenly) is added as usual.

    Arguments as for ``erase_image``. Source: arXiv 2601.08151, layer-wise visual masking (reading "one layer only").
    """
    return Edits(blind=(Mask(_layers(layers, strength), _image(weights)),))


def knockout(
    layers: LayerSet, queries: PositionSet = "question", keys: PositionSet = "image", strength: Strength = 1.0
) -> Edits:
    """Attention knockout: queries may not attend to keys in these layers.

    Args:
      layers: one layer or several; ``window(i - 4, i + 5)`` is the usual window of nine.
      queries: a role (``question``, ``last``, ``text``, ``image``, ``prefix``, ``all``) or weights ``[S]``, ``[B, S]``.
      keys: likewise.
      strength: attention is multiplied by ``1 - strength`` (times both weights) before it is normalised.

    Source: Geva et al., "Dissecting Recall of Factual Associations" (arXiv 2304.14767), as additive attention bias.
    """
    return Edits(knockout=(Knockout(_layers(layers, strength), _positions(queries), _positions(keys)),))


def review_mask(layer: LayerSet, weights: Any, strength: Strength = 1.0) -> Edits:
    """Review mask: at a layer, attention from text to each image token is multiplied by that token's weight.

    Args:
      layer: the review layer.
      weights: what is kept of each image token, 0..1, ``[N]`` or ``[B, N]`` in sequence order; for example
        contrastive attention scaled to 1.
      strength: 1 applies the weights, 0 does nothing.

    Source: arXiv 2601.08151 v1, part 2 (the strength is left open there).
    """
    return Edits(knockout=(Knockout(_layers(layer, strength), _positions("question"), _image(1.0 - _float(weights))),))


def scale_heads(layers: LayerSet, scale: Any, strength: Strength = 1.0) -> Edits:
    """Scales the outputs of attention heads, before the output projection.

    Args:
      layers: one layer or several.
      scale: one factor a query head ``[H]``; 0 ablates a head, 1 leaves it.
      strength: interpolates from no change (0) to ``scale`` (1).
    """
    return Edits(head_scale=(HeadScale(_layers(layers, strength), _float(scale)),))


def at_site(site: str, function: Hook) -> Edits:
    """The escape hatch: ``function(value, layer_index)`` replaces the value at a site, at every layer.

    Args:
      site: a residual site (``resid_pre``, ``attn_out``, ``mlp_out``, ...; values ``[B, S, D]``) or ``z`` (heads'
        outputs, ``[B, S, H, E]``).
      function: traced inside the layer scan; ``layer_index`` is an array, so choose layers with ``jnp.where``.
    """
    if site not in (*RESIDUAL_SITES, "z"):
        raise InputError(f"unknown site {site!r}; expected one of {', '.join((*RESIDUAL_SITES, 'z'))}")
    return Edits(hooks=((site, function),))


def compose(*edits: Edits | None) -> Edits:
    """All of several edits. Masks of one kind multiply, knockouts add up; order matters for hooks only."""
    present = [edit for edit in edits if edit is not None]
    return Edits(
        erase=tuple(term for edit in present for term in edit.erase),
        blind=tuple(term for edit in present for term in edit.blind),
        knockout=tuple(term for edit in present for term in edit.knockout),
        head_scale=tuple(term for edit in present for term in edit.head_scale),
        hooks=tuple(hook for edit in present for hook in edit.hooks),
    )


def stack_edits(edits: Iterable[Edits]) -> Edits:
    """Edits of one structure as one pytree with a leading branch axis, for ``vmap`` and ``lax.map``.

    Raises:
      InputError: none given, or they differ in structure (kinds, roles or shapes).
    """
    branches = list(edits)
    if not branches:
        raise InputError("no edits to stack")
    try:
        return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *branches)
    except (ValueError, TypeError) as error:
        raise InputError(f"edits of one stack must have one structure ({error})") from error


__all__ = [
    "ROLES",
    "LayerSet",
    "PositionSet",
    "Role",
    "Spans",
    "at_site",
    "blind_image",
    "compose",
    "erase_image",
    "from_layer",
    "knockout",
    "review_mask",
    "scale_heads",
    "stack_edits",
    "up_to_layer",
    "window",
]
