"""Bugs in how tensors fill leaves. The tensors say so themselves; what they lead to departs as well."""

import dataclasses
import functools

import ml_dtypes
import numpy as np

from jaxmllm.convert import checkpoint, names, tables
from tests.validation.faults.fault import Fault, Patch, around, listed

FAULTS: list[Fault] = []
fault = functools.partial(listed, FAULTS, also="tensors")


def change_entries(patch: Patch, builder: str, change) -> None:
    """``change(entry)`` in the place of each entry of a part of the tables."""
    around(patch, tables, builder, lambda original, *given: tuple(change(entry) for entry in original(*given)))


def exchange(patch: Patch, builder: str, one: str, other: str) -> None:
    """The leaves of two parts are filled from each other's tensors."""

    def change(entry):
        for ours, theirs in ((one, other), (other, one)):
            if f"/{ours}/" in entry.leaf:
                return dataclasses.replace(entry, leaf=entry.leaf.replace(f"/{ours}/", f"/{theirs}/"))
        return entry

    change_entries(patch, builder, change)


def change_fills(patch: Patch, change) -> None:
    """``change(fill)`` in the place of what fills each leaf, once all names and shapes have been checked."""

    def plan(original, *given):
        fills, ignored = original(*given)
        return [change(fill) for fill in fills], ignored

    around(patch, checkpoint, "make_plan", plan)


def change_transform(patch: Patch, name: str, forward) -> None:
    patch.setitem(names.TRANSFORMS, name, dataclasses.replace(names.TRANSFORMS[name], forward=forward))


@fault("tables.text_entries", "grouped_queries", "decoder.0.attn_out", "transposed")
def square_kernel_not_transposed(patch):
    change_entries(
        patch,
        "text_entries",
        lambda entry: (
            dataclasses.replace(entry, transform="keep")
            if entry.leaf == "decoder/layers/attention/out/kernel"
            else entry
        ),
    )


@fault("tables.text_entries", "yarn_rope", "decoder.0.keys", "query")
def query_and_key_exchanged_at_load(patch):
    exchange(patch, "text_entries", "query", "key")


@fault("tables.text_entries", "grouped_queries", "decoder.0.mlp_out", "gate and up")
def gate_and_up_exchanged_at_load(patch):
    exchange(patch, "text_entries", "gate", "up")


@fault("tables.text_entries", "grouped_queries", "decoder.0.attn_in", "norm")
def norms_exchanged_at_load(patch):
    exchange(patch, "text_entries", "attention_norm", "mlp_norm")


@fault("plan.make_plan", "eleven_layers", "decoder.2.attn_in", "layer")
def layers_sorted_as_text(patch):
    change_fills(patch, lambda fill: dataclasses.replace(fill, sources=tuple(sorted(fill.sources))))


@fault("plan.make_plan", "grouped_queries", "decoder.2.mlp_out", "layer")
def tensor_of_another_layer(patch):
    def change(fill):
        if fill.leaf != "decoder/layers/mlp/up/kernel":
            return fill
        first, second, _, *rest = fill.sources
        return dataclasses.replace(fill, sources=(first, second, second, *rest))

    change_fills(patch, change)


@fault("SafetensorsWeights.read", "grouped_queries", "vision.embed", "bfloat16")
def weights_rounded_to_bfloat16(patch):
    def read(original, self, leaf, region, dtype, seen=None):
        return original(self, leaf, region, dtype, seen).astype(ml_dtypes.bfloat16).astype(dtype)

    around(patch, checkpoint.SafetensorsWeights, "read", read)


@fault("names._flat_kernel", "qwen2_vl", "vision.embed", "order")
def patch_kernel_frames_before_channels(patch):
    change_transform(patch, "flat_patches", lambda array: array.swapaxes(1, 2).reshape(len(array), -1).T)


def rolled(patch: Patch, leaf: str) -> None:
    """The rows of a leaf are one place late."""

    def read(original, self, name, *given, **named):
        array = original(self, name, *given, **named)
        return np.roll(array, 1, axis=-2) if name == leaf else array

    around(patch, checkpoint.SafetensorsWeights, "read", read)


@fault("SafetensorsWeights.read", "grouped_queries", "embedding", "row")
def token_embedding_one_row_late(patch):
    rolled(patch, "decoder/embed/embedding")


@fault("SafetensorsWeights.read", "class_token_biases", "decoder.0.attn_probs", "bias")
def query_bias_left_zero(patch):
    def read(original, self, leaf, *given, **named):
        array = original(self, leaf, *given, **named)
        return np.zeros_like(array) if leaf == "decoder/layers/attention/query/bias" else array

    around(patch, checkpoint.SafetensorsWeights, "read", read)
