"""Bugs in decoding with a cache."""

import dataclasses
import functools
import importlib

import jax.numpy as jnp
import numpy as np

from jaxmllm.decoding import cache
from jaxmllm.decoding.cache import Cache, StepTap
from jaxmllm.models.layout import Layout
from tests.validation.faults.fault import Fault, Patch, around, listed

# by name: in its package, a function of the same name stands before the module
GENERATE = importlib.import_module("jaxmllm.decoding.generate")

FAULTS: list[Fault] = []
fault = functools.partial(listed, FAULTS, first="generation")


def change_room(patch: Patch, change) -> None:
    """``change(prompts, layout, room)`` in the place of the layout of prompts and of what is generated."""
    around(
        patch,
        GENERATE,
        "with_room",
        lambda original, prompts, room: change(prompts, original(prompts, room), room),
    )


@fault("cache.with_room", "grouped_queries", cause="positions")
def generated_tokens_one_position_early(patch):
    def change(prompts, layout, room):
        positions = layout.positions - (jnp.arange(layout.length) >= prompts.length)
        return dataclasses.replace(layout, positions=positions)

    change_room(patch, change)


@fault("cache.with_room", "grouped_queries", cause="positions")
def generated_tokens_positioned_by_slot(patch):
    def change(prompts, layout, room):
        slots = jnp.broadcast_to(jnp.arange(layout.length), layout.positions.shape)
        generated = jnp.arange(layout.length) >= prompts.length
        return dataclasses.replace(layout, positions=jnp.where(generated, slots, layout.positions))

    change_room(patch, change)


@fault("cache.with_room", "qwen2_vl", cause="positions")
def generated_tokens_positioned_by_count(patch):
    def change(prompts, layout, room):
        counted = (jnp.cumsum(layout.valid, axis=1) - 1)[..., None]
        generated = (jnp.arange(layout.length) >= prompts.length)[:, None]
        return dataclasses.replace(layout, positions=jnp.where(generated, counted, layout.positions))

    change_room(patch, change)


@fault("cache.with_room", "next_mistral_window", cause="masks of generated")
def window_counts_padding_of_generated_tokens(patch):
    change_room(patch, lambda prompts, layout, room: dataclasses.replace(layout, place=None))


@fault("Cache.put", "grouped_queries", cause="cache")
def keys_written_one_slot_late(patch):
    around(patch, Cache, "put", lambda original, self, own, slot: original(self, own, slot + 1))


@fault("StepTap.seen", "grouped_queries", cause="masks of generated")
def generated_token_does_not_see_itself(patch):
    def seen(original, self, slot):
        parts, bias = original(self, slot)
        return parts, bias.at[..., -1].set(2 * cache.BLOCKED)

    around(patch, StepTap, "seen", seen)


@fault("Layout.last", "grouped_queries", cause="row that is read")
def first_token_read_at_the_last_slot(patch):
    patch.setattr(Layout, "last", property(lambda self: jnp.full(len(self.valid), self.length - 1)))


@fault("generate.ending_of", "grouped_queries", cause="stopping")
def stop_tokens_ignored(patch):
    around(patch, GENERATE, "ending_of", lambda original, *given: (np.array([], np.int32), original(*given)[1]))
