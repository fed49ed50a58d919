"""The components of images: vision tower, connector, image tokens; in torch's order of pictures, patches and tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxmllm.models.images import pad_rows
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.qwen_vision import lay_out
from jaxmllm.validation.components import FAINT
from jaxmllm.validation.port.model import Port, apply

Named = tuple[str, np.ndarray]


def is_qwen(port: Port) -> bool:
    """Whether the tower reads patches of images of any size."""
    return port.config.model_type in ("qwen2_vl", "qwen2_5_vl")


# --- torch's order of rows, and ours


def pictures(port: Port, inputs: Inputs, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
    """What the vision tower reads, one picture a row: of LLaVA-NeXT the tiles of all images, padding left out."""
    assert inputs.images is not None
    images = dict(inputs.images.arrays)
    if port.config.model_type == "llava_next":
        sizes = [(int(height), int(width)) for height, width in arrays["image_sizes"]]
        counts = [port.config.tiling(size).num_tiles for size in sizes]
        images["pixel_values"] = jnp.concatenate(
            [tiles[:count] for tiles, count in zip(images["pixel_values"], counts, strict=True)]
        )
    return images


def to_ours(port: Port, arrays: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Rows in torch's order ``[M, D]`` (patches of all images) as the tower lays them out ``[I, M, D]``."""
    if not is_qwen(port):
        return rows
    layout = _layout(port, arrays)
    return rows[layout.index] * layout.real[..., None]


def to_torchs(port: Port, arrays: dict[str, np.ndarray], ours: np.ndarray) -> np.ndarray:
    """The inverse of ``to_ours``."""
    if not is_qwen(port):
        return ours
    layout = _layout(port, arrays)
    rows = np.zeros((int(layout.real.sum()), ours.shape[-1]), ours.dtype)
    rows[layout.index[layout.real]] = ours[layout.real]
    return rows


def _layout(port: Port, arrays: dict[str, np.ndarray]) -> Any:
    vision = port.config.vision
    grids = np.asarray(arrays["image_grid_thw"])[:, 1:].astype(np.int64) // vision.merge
    return lay_out(vision, grids, lambda size: size)


# --- the vision tower


def _embed(module: Any, images: dict[str, Array]) -> Array:
    qwen = hasattr(module.vision, "merger")
    return module.vision.embed(images if qwen else images["pixel_values"])


def vision_embed(port: Port, inputs: Inputs, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What enters the tower's first block."""
    hidden = apply(port.graphdef(0), port.params(), _embed, pictures(port, inputs, arrays))
    return to_torchs(port, arrays, np.asarray(hidden, np.float32))


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _block(graphdef: nnx.GraphDef, params: Any, hidden: Array, more: tuple) -> dict[str, Array]:
    block = nnx.merge(graphdef, params)
    attn_in = block.attention_norm(hidden)
    attn_out = block.attention(attn_in, *more)
    middle = hidden + attn_out
    mlp_in = block.mlp_norm(middle)
    return {
        "attn_in": attn_in,
        "attn_in~faint": block.attention_norm(hidden * FAINT),
        "attn_out": attn_out,
        "mlp_in": mlp_in,
        "mlp_in~faint": block.mlp_norm(middle * FAINT),
        "mlp_out": block.mlp(mlp_in),
        "resid_post": block(hidden, *more),
    }


def _tower(module: Any, images: dict[str, Array]) -> tuple[Any, ...]:
    """What every block of Qwen's towers reads beside its input."""
    return module.vision.rope(images["places"]), images["real"], module.vision.see_whole()


class Blocks:
    """The blocks of the vision tower, each from any input."""

    def __init__(self, port: Port, inputs: Inputs, arrays: dict[str, np.ndarray]):
        self._port, self._arrays = port, arrays
        module = nnx.merge(port.graphdef(0), nnx.State(port.params()))
        self._graphdef, self._params = nnx.split(module.vision.layers)
        self.depth = int(jax.tree.leaves(self._params)[0].shape[0])
        self._more: tuple[Any, ...] = ()
        if is_qwen(port):
            assert inputs.images is not None
            self._more = apply(port.graphdef(0), port.params(), _tower, inputs.images.arrays)

    def sites(self, number: int, hidden: np.ndarray) -> dict[str, np.ndarray]:
        """Sites of a block, from what enters it in torch's order; see ``components.BLOCK_SITES``."""
        params = jax.tree.map(lambda leaf: leaf[number], self._params)
        given = jnp.asarray(to_ours(self._port, self._arrays, hidden), self._port.dtype)
        more = self._more
        if more:
            rope, real, whole = more
            more = (rope, real, whole[number])
        sites = _block(self._graphdef, params, given, more)
        return {
            site: to_torchs(self._port, self._arrays, np.asarray(value, np.float32)) for site, value in sites.items()
        }


def _features(module: Any, pixels: Array) -> Array:
    return module.vision_features(pixels) if hasattr(module, "vision_features") else module.vision(pixels)


def vision_features(port: Port, inputs: Inputs, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """What the connector reads, by the production tower from the pixels on; Qwen's merger reads the last block."""
    if is_qwen(port):
        return None
    pixels = pictures(port, inputs, arrays)["pixel_values"]
    return np.asarray(apply(port.graphdef(0), port.params(), _features, pixels), np.float32)


# --- the connector


def _connect(module: Any, features: Array, images: dict[str, Array]) -> Array:
    if hasattr(module, "qformer"):
        return module.connect(features, images)
    return module.vision.merge(features, images) if hasattr(module.vision, "merger") else module.connect(features)


def _project(module: Any, hidden: Array) -> Array:
    return module.projection(hidden[:, : module.qformer.query_tokens.shape[1]])


def connector(port: Port, inputs: Inputs, arrays: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
    """The connector's output from what it reads; Qwen's from the last block's output, token by token."""
    assert inputs.images is not None
    given = jnp.asarray(to_ours(port, arrays, features), port.dtype)
    images = {name: value for name, value in inputs.images.arrays.items() if name != "pixel_values"}
    connected = np.asarray(apply(port.graphdef(0), port.params(), _connect, given, images), np.float32)
    return flat_tokens(inputs, connected) if is_qwen(port) else connected


def projected(port: Port, hidden: np.ndarray) -> np.ndarray:
    """InstructBLIP's projection of what the Q-Former's last layer gave, query tokens and instruction."""
    return np.asarray(apply(port.graphdef(0), port.params(), _project, jnp.asarray(hidden, port.dtype)), np.float32)


def _qformer_embed(module: Any, ids: Array) -> Array:
    return jnp.concatenate(module.qformer.embed(ids), axis=1)


def _qformer_layer(module: Any, number: Array, hidden: Array, source: Array, mask: Array) -> dict[str, Array]:
    qformer = module.qformer
    graphdef, params = nnx.split(qformer.layers)
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[number], params))
    bias, queries = qformer.bias(mask), qformer.query_tokens.shape[1]
    asked: list[Array] = []

    def look(asking: Array) -> Array:
        asked.append(qformer.look(number, asking, source))
        return asked[0]

    after = layer(hidden[:, :queries], hidden[:, queries:], bias, look)
    return {
        "attn_out": layer.attention(hidden, hidden, bias),
        "cross_out": asked[0],
        "resid_post": jnp.concatenate(after, axis=1),
    }


def qformer_embed(port: Port, inputs: Inputs) -> np.ndarray:
    """Query tokens and instruction as they enter the Q-Former's first layer."""
    assert inputs.images is not None
    ids = inputs.images.arrays["qformer_input_ids"]
    return np.asarray(apply(port.graphdef(0), port.params(), _qformer_embed, ids), np.float32)


def qformer_sites(
    port: Port, inputs: Inputs, number: int, hidden: np.ndarray, features: np.ndarray
) -> dict[str, np.ndarray]:
    """Sites of a layer of the Q-Former, from what enters it and what it looks at."""
    assert inputs.images is not None
    given = (jnp.asarray(number), jnp.asarray(hidden, port.dtype), jnp.asarray(features, port.dtype))
    mask = inputs.images.arrays["qformer_attention_mask"]
    sites = apply(port.graphdef(0), port.params(), _qformer_layer, *given, mask)
    return {site: np.asarray(value, np.float32) for site, value in sites.items()}


# --- image tokens


def _arrange(module: Any, connected: Array, order: Array) -> Array:
    return module.arrange(connected, order)


def _encode(module: Any, images: dict[str, Array]) -> Array:
    return module.encode_images(images)


def image_tokens(port: Port, inputs: Inputs) -> np.ndarray:
    """All image tokens ``[N, D]``, by the production encoder from the pixels on."""
    assert inputs.images is not None
    tokens = apply(port.graphdef(0), port.params(), _encode, inputs.images.arrays)
    return flat_tokens(inputs, np.asarray(tokens, np.float32))


def arranged(port: Port, inputs: Inputs, arrays: dict[str, np.ndarray], connected: np.ndarray) -> np.ndarray:
    """Image tokens ``[N, D]`` from the connector's output."""
    assert inputs.images is not None
    if port.config.model_type != "llava_next":
        return connected.reshape(-1, connected.shape[-1])
    counts = [port.config.tiling((int(y), int(x))).num_tiles for y, x in arrays["image_sizes"]]
    ends = np.cumsum(counts)
    own = [
        connected[end - count : end].reshape(-1, connected.shape[-1]) for end, count in zip(ends, counts, strict=True)
    ]
    stacked = jnp.asarray(pad_rows(own, max(map(len, own))), port.dtype)
    order = inputs.images.arrays["order"]
    tokens = apply(port.graphdef(0), port.params(), _arrange, stacked, order)
    return flat_tokens(inputs, np.asarray(tokens, np.float32))


def flat_tokens(inputs: Inputs, tokens: np.ndarray) -> np.ndarray:
    """Tokens of each image ``[I, N, D]`` one after another ``[N, D]``, without padding."""
    assert inputs.images is not None
    return np.concatenate([own[:count] for own, count in zip(tokens, np.asarray(inputs.images.counts), strict=True)])


def padded_tokens(inputs: Inputs, flat: np.ndarray) -> np.ndarray:
    """The inverse of ``flat_tokens``."""
    assert inputs.images is not None
    ends = np.cumsum(np.asarray(inputs.images.counts))
    return pad_rows(np.split(flat, ends[:-1]), inputs.images.tokens)


def chain(blocks: Blocks, embedded: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The sites of every block, each from what the block before it gave."""
    hidden = embedded
    for number in range(blocks.depth):
        sites = blocks.sites(number, hidden)
        yield sites
        hidden = sites["resid_post"]
