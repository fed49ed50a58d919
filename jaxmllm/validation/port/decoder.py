"""The decoder's components: one layer from any input, and the production run of all layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxmllm.models.capture import ATTENTION, RESIDUAL_SITES, Capture, Site
from jaxmllm.models.capture import Rows as CapturedRows
from jaxmllm.models.decoder import Tap
from jaxmllm.models.edits import resolve
from jaxmllm.models.forward import layout_of, merge
from jaxmllm.models.images import place_images
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layers import rope_tables
from jaxmllm.validation.components import FAINT
from jaxmllm.validation.port.model import Port, apply

Rows = tuple[int, ...] | None


def capture_of(rows: Rows) -> Capture:
    """All sites of the decoder, at the rows that are compared."""
    kept: CapturedRows = "all" if rows is None else rows
    # the residual stream at all positions, since the run goes on from it
    residual = tuple(Site(site, "all" if site.startswith("resid_p") else kept) for site in RESIDUAL_SITES)
    return Capture(residual) | Capture.attention(kept, "all", "each")


@functools.partial(jax.jit, static_argnames=("graphdef", "capture"))
def _layer(graphdef: nnx.GraphDef, params: Any, hidden: Array, inputs: Inputs, capture: Capture) -> dict[str, Array]:
    module = merge(graphdef, params)
    config, layout = module.decoder.config, layout_of(inputs, module.config.image_token_id)
    resolved = resolve(None, 1, config.num_heads, layout)

    def tap(number: Array, edits: Any, _: Any) -> Tap:
        acting = (edits, resolved.queries_and_keys, resolved.hooks)
        return Tap(number, *acting, capture, layout, 0, layout.length, config.windows)

    _, (captured, own) = module.decoder.run(
        hidden, layout.positions, resolved, tap, lambda tap, own: (tap.captured, own)
    )
    stacked, norms = nnx.split(module.decoder.layers)
    layer = nnx.merge(stacked, jax.tree.map(lambda leaf: leaf[0], norms))
    faint = {
        "attn_in~faint": layer.attention_norm(hidden * FAINT),
        "mlp_in~faint": layer.mlp_norm(captured["resid_mid"][0] * FAINT),
    }
    sites = {name: value[0] for name, value in captured.items()}
    return sites | {"keys": own.key[0], "values": own.value[0]} | faint


def layer_sites(
    port: Port, number: int, hidden: Float[np.ndarray | Array, "B S D"], inputs: Inputs, rows: Rows
) -> dict[str, np.ndarray]:
    """The sites of one decoder layer, from what enters it.

    Args:
      port: the port.
      number: of the layer.
      hidden: what enters it.
      inputs: of the model.
      rows: the positions that are kept; all of ``resid_pre`` and ``resid_post``.

    Returns:
      Site -> array at the kept rows, float32; see ``components.DECODER_SITES``.
    """
    given = jnp.asarray(hidden, port.dtype)
    sites = _layer(port.graphdef(number), port.params(number), given, inputs, capture_of(rows))
    kept = {site: np.asarray(value, np.float32) for site, value in sites.items()}
    if rows is not None:
        for site in ("keys", "values", "attn_in~faint"):
            kept[site] = kept[site][:, list(rows)]
    return kept


def production_run(port: Port, arrays: Mapping[str, Any], rows: Rows) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One production forward pass from the prompts on.

    Returns:
      Site -> ``[L, ...]`` as ``layer_sites`` gives it (without keys, values and faint norms), and the logits at the
      kept rows.
    """
    assert port.model is not None
    inputs = port.model.as_inputs(arrays)
    at: Any = "all"
    if rows is not None:
        at = jnp.broadcast_to(jnp.asarray(rows), (inputs.input_ids.shape[0], len(rows)))
    out = port.model.forward(port.model.params, inputs, capture=capture_of(rows), logits_at=at)
    return {site: np.asarray(value, np.float32) for site, value in out.captured.items()}, np.asarray(out.logits)


def chained_run(
    port: Port, embedded: Float[np.ndarray, "B S D"], inputs: Inputs, rows: Rows
) -> Iterator[dict[str, np.ndarray]]:
    """The sites of every layer that a production run keeps, each layer from what the one before it gave; one is held at
    a time."""
    hidden, kept = embedded, (*RESIDUAL_SITES, ATTENTION)
    for number in range(port.num_layers):
        sites = layer_sites(port, number, hidden, inputs, rows)
        yield {site: sites[site] for site in kept}
        hidden = sites["resid_post"]


def _positions(module: Any, inputs: Inputs) -> Array:
    return layout_of(inputs, module.config.image_token_id).positions


def _rotary(module: Any, inputs: Inputs) -> Array:
    config = module.config.text
    return jnp.concatenate(rope_tables(config.rope, config.head_dim, _positions(module, inputs)), axis=-1)


def _embedding(module: Any, inputs: Inputs, features: Array | None) -> Array:
    embedded = module.decoder.embed(inputs.input_ids)
    if inputs.images is None or features is None:
        return embedded
    placeholders = inputs.input_ids == module.config.image_token_id
    return place_images(embedded, features, placeholders, inputs.images.counts)


def _final_norm(module: Any, hidden: Array) -> Array:
    return module.decoder.norm(hidden)


def _logits(module: Any, normed: Array) -> Array:
    return module.decoder.read(normed)


def _call(port: Port, function: Any, *args: Any) -> np.ndarray:
    value = apply(port.graphdef(0), port.params(), function, *args)
    return np.asarray(value, np.int64 if jnp.issubdtype(value.dtype, jnp.integer) else np.float32)


def positions(port: Port, inputs: Inputs) -> np.ndarray:
    """Rotary positions ``[B, S]`` or ``[B, S, 3]``."""
    return _call(port, _positions, inputs)


def rotary(port: Port, inputs: Inputs) -> np.ndarray:
    """Cosines, then sines ``[B, S, 2 E]``."""
    return _call(port, _rotary, inputs)


def embedding(port: Port, inputs: Inputs, image_tokens: Float[np.ndarray, "I N D"] | None) -> np.ndarray:
    """Token embeddings with these image tokens in place ``[B, S, D]``."""
    features = None if image_tokens is None else jnp.asarray(image_tokens, port.dtype)
    return _call(port, _embedding, inputs, features)


def final_norm(port: Port, hidden: np.ndarray) -> np.ndarray:
    """What the head reads of the last layer's output."""
    return _call(port, _final_norm, jnp.asarray(hidden, port.dtype))


def logits(port: Port, normed: np.ndarray) -> np.ndarray:
    """Logits of what the head reads."""
    return _call(port, _logits, jnp.asarray(normed, port.dtype))
