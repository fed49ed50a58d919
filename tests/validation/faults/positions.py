"""Bugs in rotary positions and tables, in masks and in sliding windows."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from jaxmllm.models import decoder, forward, fused, layers, registry, text_config
from jaxmllm.models.attention import BLOCKED, attention
from jaxmllm.models.layout import Layout
from tests.validation.faults.fault import Fault, Patch, around, listed

FAULTS: list[Fault] = []
fault = functools.partial(listed, FAULTS)


def change_rope(patch: Patch, **changes) -> None:
    """The rotary config that is read has other fields."""
    around(patch, text_config, "read_rope", lambda original, *given: dataclasses.replace(original(*given), **changes))


def change_positions(patch: Patch, family: str, change) -> None:
    """``change(config, ids, valid, images, positions)`` in the place of a family's multimodal positions."""
    known = registry.FAMILIES[family]

    def positions(config, ids, valid, images):
        return change(config, ids, valid, images, known.positions(config, ids, valid, images))

    patch.setitem(registry.FAMILIES, family, dataclasses.replace(known, positions=positions))


def change_mask(patch: Patch, sees, padding: bool = False) -> None:
    """``sees(keys, queries)`` in the place of causality; with ``padding``, padding is seen as well."""

    def may_attend(self, rows, seen, window=None):
        allowed = sees(jnp.arange(seen), rows[..., None])
        return jnp.broadcast_to(allowed, (len(self.valid), *allowed.shape[1:])) & (self.valid[:, None, :seen] | padding)

    def plain(query, parts, valid):
        *past, own = parts
        before = valid.shape[1] - query.shape[1]

        def bias_of(start, stop, seen):
            allowed = sees(jnp.arange(seen), before + jnp.arange(start, stop)[:, None])
            return jnp.where(allowed & (valid[:, None, :seen] | padding), 0.0, 2 * BLOCKED)

        return attention(query, own, past, bias_of)

    patch.setattr(Layout, "may_attend", may_attend)
    patch.setattr(fused, "plain", plain)


@fault("layers.rotate", "grouped_queries", "decoder.0.keys", "interleaved")
def rotary_pairs_interleaved(patch):
    def rotate(x, tables):
        half = x.shape[-1] // 2
        cosine, sine = (table[:, :, None, :half] for table in tables)
        first, second = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
        turned = jnp.stack([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
        return turned.reshape(x.shape).astype(x.dtype)

    patch.setattr(decoder, "rotate", rotate)


@fault("layers.rotate", "grouped_queries", "decoder.0.keys", "direction")
def rotary_in_the_opposite_direction(patch):
    around(patch, decoder, "rotate", lambda original, x, tables: original(x, (tables[0], -tables[1])))


@fault("text_config.read_rope", "next_qwen2_windows", "rotary", "base")
def rotary_base_ignored(patch):
    change_rope(patch, theta=10_000.0)


@fault("text_config.read_rope", "tied_linear_rope", "rotary", "scaling")
def linear_rotary_scaling_ignored(patch):
    change_rope(patch, kind="default")


@fault("text_config.read_rope", "llama3_rope", "rotary", "scaling")
def llama3_rotary_scaling_ignored(patch):
    change_rope(patch, kind="default")


@fault("text_config.read_rope", "yarn_rope", "rotary", "scaling")
def yarn_rotary_scaling_ignored(patch):
    change_rope(patch, kind="default")


@fault("layers._yarn_attention_factor", "yarn_rope", "rotary", "factor")
def yarn_attention_factor_missing(patch):
    patch.setattr(layers, "_yarn_attention_factor", lambda rope: 1.0)


@fault("text_config.read_rope", "dynamic_rope", "rotary", "dynamic scaling")
def dynamic_rotary_scaling_ignored(patch):
    change_rope(patch, kind="default")


@fault("text_config._read_sections", "qwen2_vl", "rotary", "section")
def multimodal_sections_in_reverse_order(patch):
    around(patch, text_config, "_read_sections", lambda original, rope: original(rope)[::-1])


@fault("qwen2_vl.positions", "qwen2_vl", "positions", "rows and columns")
def rows_and_columns_of_the_grid_exchanged_in_positions(patch):
    change_positions(patch, "qwen2_vl", lambda config, ids, valid, images, positions: positions[..., [0, 2, 1]])


@fault("qwen2_vl.positions", "qwen2_5_vl", "positions", "text")
def image_tokens_counted_as_text_in_positions(patch):
    def count(config, ids, valid, images, positions):
        counted = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
        return np.broadcast_to(counted[..., None], positions.shape) * valid[..., None]

    change_positions(patch, "qwen2_5_vl", count)


@fault("qwen2_vl.positions", "qwen2_vl", "positions", "behind every image")
def text_behind_an_image_one_position_early(patch):
    def shift(config, ids, valid, images, positions):
        image = ids == config.image_token_id
        ended = np.cumsum(np.pad(image[:, :-1] & ~image[:, 1:], ((0, 0), (1, 0))), axis=1)
        return positions - ended[..., None] * valid[..., None]

    change_positions(patch, "qwen2_vl", shift)


@fault("layout.make_layout", "grouped_queries", "positions", "one too high")
def positions_counted_from_one(patch):
    def make(original, *given):
        layout = original(*given)
        return dataclasses.replace(layout, positions=layout.positions + 1)

    around(patch, forward, "make_layout", make)


@fault("layout.make_layout", "dynamic_rope", "generation", "own pass: positions")
def padding_counted_in_positions(patch):
    def make(original, *given):
        layout = original(*given)
        counted = jnp.broadcast_to(jnp.arange(layout.length), layout.positions.shape)
        return dataclasses.replace(layout, positions=counted)

    around(patch, forward, "make_layout", make)


@fault("Layout.may_attend", "grouped_queries", "decoder.0.attn_probs", "diagonal")
def own_position_not_seen(patch):
    change_mask(patch, lambda keys, queries: keys < queries)


@fault("Layout.may_attend", "grouped_queries", "decoder.0.attn_probs", "future")
def one_future_position_seen(patch):
    change_mask(patch, lambda keys, queries: keys <= queries + 1)


@fault("Layout.may_attend", "grouped_queries", "decoder.0.attn_probs", "causal")
def no_causal_mask(patch):
    change_mask(patch, lambda keys, queries: keys < queries + keys.shape[0])


@fault("Layout.may_attend", "grouped_queries", "generation", "own pass: positions, the mask")
def padding_seen(patch):
    change_mask(patch, lambda keys, queries: keys <= queries, padding=True)


@fault("text_config._read_windows", "next_mistral_window", "decoder.0.attn_probs", "sliding window of")
def sliding_window_ignored(patch):
    around(patch, text_config, "_read_windows", lambda original, *given: original(*given) and None)


@fault("text_config._read_windows", "next_mistral_window", "decoder.0.attn_probs", "window")
def sliding_window_one_position_wider(patch):
    around(
        patch,
        text_config,
        "_read_windows",
        lambda original, *given: tuple(size + 1 for size in original(*given)),
    )


@fault("text_config._read_windows", "next_qwen2_windows", "decoder.0.attn_probs", "window")
def sliding_window_in_the_layers_that_have_none(patch):
    def swap(original, *given):
        windows = original(*given)
        size = next(size for size in windows if size)
        return tuple(None if window else size for window in windows)

    around(patch, text_config, "_read_windows", swap)
