"""Bugs between the vision tower and the decoder: projectors, the Q-Former, tiles, image tokens in the prompt."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmllm.models import anyres, images, instructblip, vipllava
from jaxmllm.models.anyres import Tiling
from jaxmllm.models.layers import Builder
from jaxmllm.models.llava import Llava
from jaxmllm.models.llava_next import LlavaNext
from jaxmllm.models.qformer import FeedForward, QFormer, QFormerLayer
from jaxmllm.models.vipllava import VipLlava
from tests.validation.faults.fault import Biasless, Fault, NoNorm, Patch, around, become, listed, recast, wherever

FAULTS: list[Fault] = []
fault = functools.partial(listed, FAULTS)


def projector_with(patch: Patch, change) -> None:
    """``change(projector)`` once it is built."""

    def init(original, self, *given):
        original(self, *given)
        change(self.projector)

    around(patch, Llava, "__init__", init)


@fault("Llava.projector", "grouped_queries", "connector", "bias")
def projector_bias_dropped(patch):
    projector_with(patch, lambda projector: become(projector.down, Biasless))


@fault("Llava.projector", "grouped_queries", "connector", "tanh")
def tanh_gelu_where_the_projector_has_gelu(patch):
    projector_with(patch, lambda projector: setattr(projector, "activation", "gelu_pytorch_tanh"))


@fault("Llava.projector", "tied_linear_rope", "connector", "activation")
def projector_activation_of_the_config_ignored(patch):
    projector_with(patch, lambda projector: setattr(projector, "activation", "gelu"))


@fault("VipLlava.encode_images", "vip_five_layers", "connector", "norm")
def projector_norm_missing(patch):
    recast(patch, VipLlava, "projector_norm", NoNorm)


@fault("vipllava.DEFAULT_LAYERS", "vip_five_layers", "vision.features", "feature layers in the order")
def feature_layers_of_the_config_in_reverse(patch):
    def read(original, *given):
        fields = original(*given)
        return fields | {"feature_layers": fields["feature_layers"][::-1]}

    around(patch, vipllava, "read_shared", read)


def in_order(patch: Patch, change) -> None:
    """``change(tiling, order)`` in the place of the order of LLaVA-NeXT's tokens."""
    order = Tiling.order.fget
    patch.setattr(Tiling, "order", property(lambda self: change(self, order(self))))


@fault("Tiling.order", "two_by_two_tiles", "image_tokens", "another order")
def tiles_column_by_column(patch):
    def change(tiling, order):
        rows, columns = tiling.tiles
        tile, inside = np.divmod(order - 1, tiling.grid**2)
        row, column = np.divmod(tile - 1, columns)
        return np.where(tile >= 1, 1 + (1 + column * rows + row) * tiling.grid**2 + inside, order)

    in_order(patch, change)


@fault("Tiling.order", "next_llama", "image_tokens", "newline")
def newlines_before_the_rows(patch):
    def change(tiling, order):
        base, lines = order[: tiling.grid**2], order[tiling.grid**2 :]
        return np.concatenate([base, np.roll(lines.reshape(tiling.kept[0], -1), 1, axis=1).ravel()])

    in_order(patch, change)


@fault("Tiling.order", "next_llama", "image_tokens", "before the whole image")
def whole_image_behind_its_tiles(patch):
    in_order(patch, lambda tiling, order: np.roll(order, -(tiling.grid**2)))


@fault("Tiling.order", "next_llama", "image_tokens", "padding")
def padding_of_tiles_cut_from_one_side(patch):
    def change(tiling, order):
        kept = Tiling(tiling.tiles, tiling.grid, tiling.kept)
        rows, columns = (kept.grid * tiles for tiles in kept.tiles)
        row, column = np.arange(kept.kept[0])[:, None], np.arange(kept.kept[1])[None]
        tile = row // kept.grid * kept.tiles[1] + column // kept.grid
        inside = row % kept.grid * kept.grid + column % kept.grid
        lines = np.pad(1 + (1 + tile) * kept.grid**2 + inside, ((0, 0), (0, 1)))
        assert rows >= kept.kept[0] and columns >= kept.kept[1]
        return np.concatenate([order[: kept.grid**2], lines.ravel()])

    in_order(patch, change)


@fault("Tiling.order", "next_llama", "vision", "refuses")
def newlines_dropped(patch):
    in_order(patch, lambda tiling, order: order[order > 0])


@fault("anyres.tiling", "next_llama", "vision", "refuses")
def sides_of_the_kept_patches_exchanged(patch):
    wherever(
        patch,
        anyres.tiling,
        lambda original, *given: dataclasses.replace(original(*given), kept=original(*given).kept[::-1]),
    )


@fault("LlavaNext.arrange", "next_llama", "image_tokens", "newlines are zero")
def newline_zero(patch):
    def arrange(original, self, connected, order):
        self.newline = nnx.Param(jnp.zeros_like(self.newline[...]))
        return original(self, connected, order)

    around(patch, LlavaNext, "arrange", arrange)


@fault("QFormer.embed", "instructblip_cross_seldom", "qformer.embed", "counted on from the query tokens")
def qformer_positions_counted_from_the_query_tokens(patch):
    def embed(self, input_ids):
        many = self.query_tokens.shape[1]
        text = self.word_embed(input_ids) + self.position_embed(many + jnp.arange(input_ids.shape[1]))
        queries = jnp.broadcast_to(self.query_tokens[...], (len(input_ids), *self.query_tokens.shape[1:]))
        return self.norm(queries), self.norm(text)

    patch.setattr(QFormer, "embed", embed)


@fault("QFormer.bias", "instructblip_cross_seldom", "qformer.0.attn_out", "mask")
def instruction_mask_ignored(patch):
    around(patch, QFormer, "bias", lambda original, self, mask: original(self, jnp.ones_like(mask)))


@fault("QFormer.config", "instructblip_cross_seldom", "qformer.2", "cross-attention")
def cross_attention_in_every_second_layer(patch):
    def init(original, self, config, *given):
        original(self, config, *given)
        # the weights are those of the config, and who reads them counts by the class's default
        self.config = dataclasses.replace(config, cross_attention_frequency=2)

    around(patch, QFormer, "__init__", init)


@fault("QFormer.look", "instructblip_cross_seldom", "qformer.0", "cross")
def cross_attention_one_layer_late(patch):
    around(patch, QFormer, "look", lambda original, self, number, *given: original(self, number - 1, *given))


@fault("QFormerLayer.__call__", "instructblip_cross_seldom", "qformer.0.resid_post", "feed-forward")
def feed_forward_blocks_of_queries_and_words_exchanged(patch):
    def call(original, self, *given):
        self.query_mlp, self.text_mlp = self.text_mlp, self.query_mlp
        return original(self, *given)

    around(patch, QFormerLayer, "__call__", call)


@fault("FeedForward.__call__", "instructblip_cross_seldom", "qformer.0.resid_post", "norm before the feed-forward")
def qformer_norm_before_the_block(patch):
    patch.setattr(FeedForward, "__call__", lambda self, hidden: self.mlp(self.norm(hidden)) + hidden)


@fault("qformer.read_qformer", "instructblip_cross_everywhere", "qformer", "epsilon")
def qformer_norm_epsilon_of_the_config_ignored(patch):
    around(
        patch,
        instructblip,
        "read_qformer",
        lambda original, *given: dataclasses.replace(original(*given), layer_norm_eps=1e-12),
    )


@fault("images.place_images", "grouped_queries", "embedding", "images")
def features_of_the_images_exchanged(patch):
    wherever(
        patch,
        images.place_images,
        lambda original, embedded, features, *given: original(embedded, features[::-1], *given),
    )


@fault("images.place_images", "grouped_queries", "embedding", "one place late")
def image_tokens_one_place_late(patch):
    wherever(
        patch,
        images.place_images,
        lambda original, embedded, features, *given: original(embedded, jnp.roll(features, 1, axis=1), *given),
    )


@fault("Builder.embed", "grouped_queries", "embedding", "root of D")
def token_embedding_scaled_by_the_root_of_the_width(patch):
    class Scaled(nnx.Embed):
        def __call__(self, inputs, out_sharding=None):
            return super().__call__(inputs) * self.features**0.5

    def make(original, *given):
        module = original(*given)
        become(module, Scaled)
        return module

    around(patch, Builder, "embed", make)
