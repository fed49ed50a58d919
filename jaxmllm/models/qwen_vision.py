"""The vision towers of Qwen2-VL and Qwen2.5-VL: images of any size, rows and columns told by rotary embedding.

Sources: Wang et al., "Qwen2-VL" (arXiv 2409.12191); Bai et al., "Qwen2.5-VL" (arXiv 2502.13923). transformers'
``Qwen2VisionTransformerPretrainedModel`` and ``Qwen2_5_VisionTransformerPretrainedModel`` are the reference for the
numbers.

Further axis letters: M patches of an image with padding, F pixels of a patch, W windows, P patches of a window.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.errors import ConfigError
from jaxmllm.models.attention import BLOCKED, KeyValue, attention
from jaxmllm.models.config import ACTIVATIONS as ACTIVATION_NAMES
from jaxmllm.models.config import ConfigReader
from jaxmllm.models.images import Room
from jaxmllm.models.layers import ACTIVATIONS, Builder, Mlp, rope_frequencies, rotate
from jaxmllm.models.text_config import RopeConfig

NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """A vision tower of Qwen2-VL or Qwen2.5-VL.

    Attributes:
      hidden_size: width of the tower, D.
      out_size: width of the decoder, which the merger maps to.
      gated: RMSNorm and a gated feed-forward block (Qwen2.5-VL) rather than LayerNorm and a plain one (Qwen2-VL).
      temporal_patch_size: frames of a patch; an image is repeated so many times.
      merge: patches along one side of the square that makes an image token.
      window: image tokens along one side of an attention window; ``None`` where every layer sees the whole image.
      full_layers: layers that see the whole image although there are windows.
    """

    hidden_size: int
    intermediate_size: int
    out_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    gated: bool
    num_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge: int = 2
    rope_theta: float = 10_000.0
    window: int | None = None
    full_layers: tuple[int, ...] = ()

    @property
    def patch_values(self) -> int:
        """F, numbers that describe a patch."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def torch_patch_shape(self) -> tuple[int, ...]:
        """Shape of the patch embedding's convolution in a checkpoint."""
        return (self.hidden_size, self.num_channels, self.temporal_patch_size, self.patch_size, self.patch_size)


def read_vision_2(reader: ConfigReader) -> QwenVisionConfig:
    """Reads the vision config of Qwen2-VL; defaults are those of transformers' ``Qwen2VLVisionConfig``."""
    reader.choice("model_type", "qwen2_vl_vision", ("qwen2_vl_vision", "qwen2_vl"))
    width = reader.positive("embed_dim", 1280)
    ratio = reader.take("mlp_ratio", 4, (int, float))
    config = QwenVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * ratio),
        out_size=reader.positive("hidden_size", 3584),
        hidden_act=reader.choice("hidden_act", "quick_gelu", ACTIVATION_NAMES),
        gated=False,
        **_read_common(reader),
    )
    return _checked(reader, config)


def read_vision_2_5(reader: ConfigReader) -> QwenVisionConfig:
    """Reads the vision config of Qwen2.5-VL; defaults are those of transformers' ``Qwen2_5_VLVisionConfig``."""
    reader.choice("model_type", "qwen2_5_vl_vision", ("qwen2_5_vl_vision", "qwen2_5_vl"))
    reader.take("tokens_per_second", None)  # spaces the frames of videos
    layers = reader.take("fullatt_block_indexes", [7, 15, 23, 31], list)
    if any(type(layer) is not int for layer in layers):
        raise ConfigError(f"{reader.where}: fullatt_block_indexes is {layers!r}; expected whole numbers")
    common = _read_common(reader)
    unit = common["patch_size"] * common["merge"]
    window = reader.positive("window_size", 112)
    if window < unit:
        raise ConfigError(f"{reader.where}: window_size={window} is less than the {unit} pixels of an image token")
    config = QwenVisionConfig(
        hidden_size=reader.positive("hidden_size", 3584),
        intermediate_size=reader.positive("intermediate_size", 3420),
        out_size=reader.positive("out_hidden_size", 3584),
        hidden_act=reader.choice("hidden_act", "silu", ACTIVATION_NAMES),
        gated=True,
        window=window // common["merge"] // common["patch_size"],
        full_layers=tuple(layers),
        **common,
    )
    return _checked(reader, config)


def _read_common(reader: ConfigReader) -> dict:
    """What both towers' configs say in the same words."""
    reader.take("tie_word_embeddings", None)  # old files write it into every nested config
    rope = ConfigReader(reader.take("rope_parameters", {}, dict), f"{reader.where}: rope_parameters")
    rope.choice("rope_type", "axial", ("axial", "default"))
    theta = float(rope.take("rope_theta", 10_000.0, (int, float)))
    rope.finish()
    common = {
        "num_layers": reader.positive("depth", 32),
        "num_heads": reader.positive("num_heads", 16),
        "num_channels": reader.positive("in_channels", 3),
        "patch_size": reader.positive("patch_size", 14),
        "temporal_patch_size": reader.positive("temporal_patch_size", 2),
        "merge": reader.positive("spatial_merge_size", 2),
        "rope_theta": theta,
    }
    # Other words of the first files for the same things, which transformers does not read.
    for name, read in (("in_chans", "num_channels"), ("spatial_patch_size", "patch_size")):
        if reader.take(name, common[read], int) != common[read]:
            raise ConfigError(f"{reader.where}: {name}={reader.fields[name]} contradicts the {common[read]} in use")
    return common


def _checked(reader: ConfigReader, config: QwenVisionConfig) -> QwenVisionConfig:
    reader.finish()
    if config.hidden_size % (4 * config.num_heads):
        raise ConfigError(
            f"{reader.where}: a width of {config.hidden_size} does not give {config.num_heads} heads of a multiple of "
            "four, which rows, columns and rotation need"
        )
    return config


@dataclasses.dataclass(frozen=True)
class PatchLayout:
    """Where the patches of each image stand in the tower.

    Attributes:
      index ``[I, M]``: row of the processor's array; 0 at padding.
      places ``[I, M, 2]``: row and column of each patch in its image.
      real ``[I, M]``: patches that are not padding.
      order ``[I, N]``: the group of ``merge**2`` patches that makes each image token; ``None`` where groups come in
        the tokens' order.
      tokens: N.
    """

    index: Int[np.ndarray, "I M"]
    places: Int[np.ndarray, "I M 2"]
    real: Bool[np.ndarray, "I M"]
    order: Int[np.ndarray, "I N"] | None
    tokens: int


def lay_out(config: QwenVisionConfig, grids: Int[np.ndarray, "I 2"], room: Room) -> PatchLayout:
    """Lays out the patches of images, each window in one piece and padded to its full size.

    Args:
      config: the tower.
      grids: rows and columns of every image's tokens.
      room: what numbers of tokens are padded to. Windows are padded by the tokens they have place for.
    """
    square, counts = config.merge**2, grids.prod(axis=1)
    orders = [_in_windows(int(rows), int(columns), config.window) for rows, columns in grids]
    tokens, slots = room(int(counts.max())), room(max(map(len, orders)))
    if config.window is not None:
        slots = -(-slots // config.window**2) * config.window**2
    unit = np.full((len(grids), slots), -1)  # the image token that each group of patches makes
    order = np.zeros((len(grids), tokens), np.int32)
    for number, units in enumerate(orders):
        unit[number, : len(units)] = units
        order[number, units[units >= 0]] = np.flatnonzero(units >= 0)
    real = unit >= 0
    starts = np.cumsum(counts) - counts
    index = np.where(real, unit + starts[:, None], 0)[..., None] * square + np.arange(square)
    row, column = np.divmod(np.where(real, unit, 0), grids[:, 1:])
    inner = np.divmod(np.arange(square), config.merge)
    places = [axis[..., None] * config.merge + inside for axis, inside in zip((row, column), inner, strict=True)]
    real = np.repeat(real, square, axis=1)
    return PatchLayout(
        index=np.where(real, index.reshape(real.shape), 0),
        places=np.stack(places, axis=-1).reshape(*real.shape, 2).astype(np.int32) * real[..., None],
        real=real,
        order=None if config.window is None else order,
        tokens=tokens,
    )


def _in_windows(rows: int, columns: int, side: int | None) -> Int[np.ndarray, " slots"]:
    """Numbers of an image's tokens, window by window; -1 where a window reaches beyond the image."""
    numbers = np.arange(rows * columns).reshape(rows, columns)
    if side is None:
        return numbers.ravel()
    numbers = np.pad(numbers, ((0, -rows % side), (0, -columns % side)), constant_values=-1)
    tall, wide = numbers.shape[0] // side, numbers.shape[1] // side
    return numbers.reshape(tall, side, wide, side).transpose(0, 2, 1, 3).ravel()


Rope = tuple[Float[Array, "I M E"], Float[Array, "I M E"]]


def axial_tables(places: Int[Array, "I M 2"], head_dim: int, theta: float) -> Rope:
    """Cosines and sines: a quarter of the head's width turns by the row, the next by the column, and both again."""
    frequencies, _ = rope_frequencies(RopeConfig(theta=theta), head_dim // 2)
    angles = places[..., None].astype(jnp.float32) * frequencies
    angles = jnp.tile(angles.reshape(*places.shape[:2], -1), 2)
    return jnp.cos(angles), jnp.sin(angles)


def attend_whole(
    query: Float[Array, "I M H E"],
    key: Float[Array, "I M H E"],
    value: Float[Array, "I M H E"],
    real: Bool[Array, "I M"],
) -> Float[Array, "I M H E"]:
    """Attention to all patches that are not padding."""

    def bias_of(start: int, stop: int, seen: int) -> Float[Array, "I r seen"]:
        blocked = jnp.where(real[:, None, :seen], 0.0, BLOCKED)
        return jnp.broadcast_to(blocked, (len(real), stop - start, seen))

    return attention(query, KeyValue(key, value), bias_of=bias_of)


class QwenVisionAttention(nnx.Module):
    """Self-attention of one image's patches: of all of them, or within windows."""

    def __init__(self, config: QwenVisionConfig, build: Builder):
        width = config.hidden_size
        self.qkv = build.linear(width, 3 * width)
        self.out = build.linear(width, width)
        self.num_heads = config.num_heads
        self.window = None if config.window is None else (config.window * config.merge) ** 2

    def __call__(
        self, hidden: Float[Array, "I M D"], rope: Rope, real: Bool[Array, "I M"], whole: Bool[Array, ""]
    ) -> Float[Array, "I M D"]:
        images, length, width = hidden.shape
        split = self.qkv(hidden).reshape(images, length, 3, self.num_heads, -1)
        query, key, value = (split[:, :, part] for part in range(3))
        parts = (rotate(query, rope), rotate(key, rope), value, real)
        mixed = (
            attend_whole(*parts) if self.window is None else jax.lax.cond(whole, attend_whole, self.windowed, *parts)
        )
        return self.out(mixed.reshape(images, length, width))

    def windowed(self, *parts: Array) -> Float[Array, "I M H E"]:
        """Attention of windows, one after another in the layout, each by itself."""
        apart = [part.reshape(-1, self.window, *part.shape[2:]) for part in parts]
        return attend_whole(*apart).reshape(parts[0].shape)


class GatedVisionMlp(nnx.Module):
    """``down(act(gate(x)) * up(x))`` with biases."""

    def __init__(self, config: QwenVisionConfig, build: Builder):
        self.gate = build.linear(config.hidden_size, config.intermediate_size)
        self.up = build.linear(config.hidden_size, config.intermediate_size)
        self.down = build.linear(config.intermediate_size, config.hidden_size)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "I M D"]) -> Float[Array, "I M D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class QwenVisionLayer(nnx.Module):
    """Pre-norm transformer layer of either tower."""

    def __init__(self, config: QwenVisionConfig, build: Builder):
        width = config.hidden_size
        norm = build.rms_norm if config.gated else build.layer_norm
        self.attention_norm = norm(width, NORM_EPS)
        self.attention = QwenVisionAttention(config, build)
        self.mlp_norm = norm(width, NORM_EPS)
        self.mlp = (
            GatedVisionMlp(config, build)
            if config.gated
            else Mlp((width, config.intermediate_size, width), config.hidden_act, build)
        )

    def __call__(
        self, hidden: Float[Array, "I M D"], rope: Rope, real: Bool[Array, "I M"], whole: Bool[Array, ""]
    ) -> Float[Array, "I M D"]:
        hidden = hidden + self.attention(self.attention_norm(hidden), rope, real, whole)
        return hidden + self.mlp(self.mlp_norm(hidden))


class Merger(nnx.Module):
    """Makes one image token of each square of ``merge**2`` patches."""

    def __init__(self, config: QwenVisionConfig, build: Builder):
        wide = config.hidden_size * config.merge**2
        self.norm = (build.rms_norm if config.gated else build.layer_norm)(config.hidden_size, NORM_EPS)
        self.mlp = Mlp((wide, wide, config.out_size), "gelu", build)

    def __call__(self, groups: Float[Array, "I N square D"]) -> Float[Array, "I N out"]:
        return self.mlp(self.norm(groups).reshape(*groups.shape[:2], -1))


class QwenVisionTower(nnx.Module):
    """Patch embedding, stacked layers, merger."""

    def __init__(self, config: QwenVisionConfig, build: Builder):
        self.config = config
        self.dtype = build.dtype
        self.patch_embed = build.linear(config.patch_values, config.hidden_size, use_bias=False)
        self.layers = build.stack(config.num_layers, lambda build: QwenVisionLayer(config, build))
        self.merger = Merger(config, build)

    def rope(self, places: Int[Array, "I M 2"]) -> Rope:
        """Rotary tables of the patches."""
        return axial_tables(places, self.config.hidden_size // self.config.num_heads, self.config.rope_theta)

    def __call__(self, arrays: dict[str, Array]) -> Float[Array, "I N out"]:
        """Image tokens of laid out patches (``patches``, ``places``, ``real`` and, with windows, ``order``)."""
        rope, real = self.rope(arrays["places"]), arrays["real"]
        graphdef, params = nnx.split(self.layers)

        def step(hidden: Array, layer: tuple) -> tuple[Array, None]:
            layer_params, layer_whole = layer
            return nnx.merge(graphdef, layer_params)(hidden, rope, real, layer_whole), None

        # Recomputed in the backward pass, a layer need not store its attention weights; forward is unaffected.
        hidden, _ = jax.lax.scan(jax.checkpoint(step), self.embed(arrays), (params, self.see_whole()))
        return self.merge(hidden, arrays)

    def see_whole(self) -> Bool[Array, " layers"]:
        """Which layers attend to the whole image although there are windows."""
        return jnp.asarray(np.isin(np.arange(self.config.num_layers), self.config.full_layers))

    def embed(self, arrays: dict[str, Array]) -> Float[Array, "I M D"]:
        """What enters the first layer."""
        return self.patch_embed(arrays["patches"].astype(self.dtype))

    def merge(self, hidden: Float[Array, "I M D"], arrays: dict[str, Array]) -> Float[Array, "I N out"]:
        """Image tokens of the patches after the last layer."""
        groups = hidden.reshape(hidden.shape[0], -1, self.config.merge**2, self.config.hidden_size)
        if "order" in arrays:
            groups = jnp.take_along_axis(groups, arrays["order"][..., None, None], axis=1)
        return self.merger(groups)
