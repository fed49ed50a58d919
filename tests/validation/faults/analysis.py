"""Bugs in edits, in contrastive attention and in the probabilities of answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxmllm.analysis import attention as contrast
from jaxmllm.analysis import scores
from jaxmllm.models import decoder, edits, inputs
from jaxmllm.models.decoder import SelfAttention, Tap
from jaxmllm.models.edits import Knockout, Positions
from jaxmllm.models.layout import Layout
from tests.validation.faults.fault import Fault, Patch, around, listed, wherever

FAULTS: list[Fault] = []
of_edits = functools.partial(listed, FAULTS, on="grouped_queries")
of_contrast = functools.partial(listed, FAULTS, on="grouped_queries", first="contrast")
of_answers = functools.partial(listed, FAULTS, on="grouped_queries", first="answer")


@of_edits("decoder.ERASE_SITE", first="edit.erase", cause="layer")
def erased_one_layer_late(patch):
    patch.setattr(decoder, "ERASE_SITE", "resid_post")


@of_edits("decoder.BLIND_SITES", first="edit.blind", cause="mlp_in")
def blinding_forgets_the_feed_forward_block(patch):
    patch.setattr(decoder, "BLIND_SITES", ("attn_in",))


@of_edits("decoder.BLIND_SITES", first="edit.blind", cause="norm")
def blinding_of_the_residual_stream(patch):
    patch.setattr(decoder, "BLIND_SITES", ("resid_pre", "resid_mid"))


@of_edits("Knockout.factors", first="edit.knockout", cause="keys")
def knockout_blocks_text_as_well(patch):
    def factors(original, self, num_layers, layout):
        gate, queries, keys = original(self, num_layers, layout)
        return gate, queries, jnp.maximum(keys, layout.role("text").astype(keys.dtype))

    around(patch, Knockout, "factors", factors)


@of_edits("edits.knockout_bias", first="edit.knockout_in_part", cause="strength")
def strength_of_knockouts_ignored(patch):
    def whole(original, gates, queries_and_keys):
        sharp = tuple((jnp.ceil(queries), jnp.ceil(keys)) for queries, keys in queries_and_keys)
        return original(tuple(jnp.ceil(gate) for gate in gates), sharp)

    around(patch, decoder, "knockout_bias", whole)


@of_edits("Positions.resolve", first="edit.erase_in_part", cause="off by one")
def weights_of_image_tokens_off_by_one(patch):
    def resolve(original, self, layout):
        if self.role != "image" or self.weights is None:
            return original(self, layout)
        return original(Positions(jnp.roll(self.weights, 1, axis=-1), self.role), layout)

    around(patch, Positions, "resolve", resolve)


@of_edits("Layout.role", first="edit.erase", cause="image tokens")
def image_role_one_token_too_long(patch):
    def role(original, self, name):
        found = original(self, name)
        if name != "image":
            return found
        return found | (jnp.pad(found[:, :-1], ((0, 0), (1, 0))) & self.valid)

    around(patch, Layout, "role", role)


@of_edits("Tap.finish", first="edit.scale_heads", cause="heads")
def heads_scaled_behind_the_projection(patch):
    def call(original, self, hidden, rope, tap, past):
        attended, own = original(self, hidden, rope, tap, past)
        scale = tap.edits.head_scale
        if scale is None:
            return attended, own
        split = attended.reshape(*attended.shape[:2], len(scale), -1) * scale[:, None]
        return split.reshape(attended.shape), own

    patch.setattr(Tap, "finish", lambda self, mixed: self.run_hooks("z", mixed))
    around(patch, SelfAttention, "__call__", call)


@of_edits("edits._product", first="edit.twice", cause="composed")
def last_of_several_masks_alone(patch):
    patch.setattr(edits, "_product", lambda factors: factors[-1] if factors else None)


@of_contrast("analysis.attention.hellinger", cause="without any roots")
def hellinger_without_roots(patch):
    patch.setattr(contrast, "_root", lambda x: x)


@of_contrast("analysis.attention.attention_evolution", cause="first layer")
def evolution_towards_the_first_layer(patch):
    around(patch, contrast, "hellinger", lambda original, p, _: original(p, p[:1]))


@of_contrast("analysis.attention.pre_fusion_layer", cause="pre-fusion layer: the port says")
def pre_fusion_layer_nearest_instead_of_farthest(patch):
    around(patch, contrast, "attention_evolution", lambda original, attention: -original(attention))


@of_contrast("analysis.attention.image_distribution", cause="not normalised")
def attention_not_renormalised(patch):
    patch.setattr(contrast, "image_distribution", lambda attention: jnp.asarray(attention, jnp.float32))


@of_contrast("Tap.keep_attention", cause="largest head")
def largest_head_instead_of_the_mean(patch):
    def keep(original, self, wanted, weights):
        original(self, wanted, weights if wanted.heads == "each" else weights.max(axis=1, keepdims=True))

    around(patch, Tap, "keep_attention", keep)


@of_contrast("Tap.rows", cause="row before")
def attention_read_one_position_early(patch):
    around(
        patch,
        Tap,
        "rows",
        lambda original, self, wanted: original(self, wanted) - 1 if wanted.rows == "last" else original(self, wanted),
    )


@of_contrast("Layout.image_index", cause="reverse order")
def image_tokens_in_reverse(patch):
    def index(original, self):
        order, filled = original(self)
        back = jnp.maximum(filled.sum(axis=1, keepdims=True) - 1 - jnp.arange(order.shape[1]), 0)
        return jnp.take_along_axis(order, back, axis=1), filled

    around(patch, Layout, "image_index", index)


@of_answers("inputs._answer_positions", cause="one position late")
def answer_read_one_position_late(patch):
    def late(original, given, batch, length):
        positions = original(given, batch, length)
        return None if positions is None else jnp.minimum(jnp.asarray(positions) + 1, length - 1)

    around(patch, inputs, "_answer_positions", late)


def change_score(patch: Patch, change) -> None:
    """``change(score, logits, answer_ids)`` wherever answers are scored."""
    wherever(patch, scores.score, change)


@of_answers("scores.score", cause="padding of answers")
def padding_of_answers_counted(patch):
    change_score(patch, lambda original, logits, answer: original(logits, jnp.maximum(answer, 0)))


@of_answers("scores.score", cause="half precision")
def probabilities_of_answers_in_bfloat16(patch):
    def half(original, logits, answer):
        rounded = jax.nn.log_softmax(logits.astype(jnp.bfloat16), axis=-1).astype(jnp.float32)
        return original(rounded, answer)

    change_score(patch, half)


@of_answers("scores.score", cause="temperature")
def temperature_in_the_probabilities_of_answers(patch):
    change_score(patch, lambda original, logits, answer: original(logits / 0.9, answer))


@of_answers("scores.score", cause="rank")
def rank_counted_from_one(patch):
    def change(original, logits, answer):
        found = original(logits, answer)
        return dataclasses.replace(found, rank=found.rank + 1)

    change_score(patch, change)
