"""What is compared: the components of a multimodal LLM, by name and in the order in which they are computed.

======================  =================================================  =============================================
name                    array                                              what it is
======================  =================================================  =============================================
``vision.embed``        ``[I, S, D]`` (Qwen-VL: ``[M, D]``)                 what enters the vision tower's block 0
``vision.K.SITE``       the same                                           sites of block K, see ``BLOCK_SITES``
``vision.features``     ``[I, N, F]``                                      what the connector reads
``qformer.embed``       ``[I, S, D]``                                      query tokens, then the instruction
``qformer.K.SITE``      the same (``cross_out``: query tokens alone)       sites of layer K, see ``QFORMER_SITES``
``connector``           ``[I, N, D]`` (Qwen-VL: ``[N, D]``)                 projector, merger or projection
``image_tokens``        ``[N, D]`` of all images, one after another        what is put into the prompts
``positions``           ``[B, S]`` or ``[B, S, 3]``                        rotary positions
``rotary``              ``[B, S, 2 E]``                                    cosines, then sines
``embedding``           ``[B, S, D]``                                      tokens with the images in place
``decoder.K.SITE``      see ``DECODER_SITES``                              sites of decoder layer K
``final_norm``          ``[B, S, D]``                                      what the head reads
``logits``              ``[B, S, V]``
======================  =================================================  =============================================

Axis letters as in ``jaxmllm.models.layers``. Arrays are in torch's order of tokens and patches, padding left in place
and left out of every comparison. Of large arrays some rows are kept (``rows``, along the axis of tokens).

A norm's site with ``~faint`` behind it is the norm of the same input times ``FAINT``, where its epsilon shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmllm.errors import InputError

# Sites of a decoder layer, in the order in which they are computed. ``keys`` (rotated) and ``values`` are
# ``[B, S, K, E]``, ``attn_probs`` ``[B, H, S, S]``, all others ``[B, S, D]``.
DECODER_SITES = (
    "resid_pre",
    "attn_in",
    "attn_in~faint",
    "keys",
    "values",
    "attn_probs",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_in~faint",
    "mlp_out",
    "resid_post",
)
# Sites of a block of a vision tower: norms, what attention and feed-forward block add, the output.
BLOCK_SITES = ("resid_pre", "attn_in", "attn_in~faint", "attn_out", "mlp_in", "mlp_in~faint", "mlp_out", "resid_post")
# Sites of a Q-Former layer: after self-attention, after cross-attention (where the layer has it), the output.
QFORMER_SITES = ("resid_pre", "attn_out", "cross_out", "resid_post")

FAINT = 2.0**-12  # a power of two, so that nothing is rounded

ALL_ROWS = 160  # sequences up to this length are kept whole
SOME_ROWS = 48  # of longer ones, so many positions are kept
MOST_VALUES = 2**21  # of other arrays, about so many numbers are kept

_LAYER = re.compile(r"(?P<part>decoder|vision|qformer)\.(?P<layer>\d+)\.(?P<site>.+)\Z")
_PHASE_OF = {
    "image_tokens": "connector",
    "positions": "embedding",
    "rotary": "embedding",
    "final_norm": "logits",
    "edit": "edits",
}


def split(name: str) -> tuple[str, int | None, str]:
    """A component's part, layer and site: ``decoder.3.mlp_out`` is ``("decoder", 3, "mlp_out")``.

    A component that belongs to no layer is its own part: ``logits`` is ``("logits", None, "logits")``; ``vision.embed``
    is ``("vision", None, "embed")``.
    """
    found = _LAYER.match(name)
    if found:
        return found["part"], int(found["layer"]), found["site"]
    part, _, site = name.partition(".")
    return part, None, site or part


def phase_of(name: str) -> str:
    """The phase that compares a component."""
    part = split(name)[0]
    if part == "qformer":
        return "connector"
    return _PHASE_OF.get(part, part)


def sequence_rows(valid: np.ndarray, also: Sequence[int] = ()) -> tuple[int, ...] | None:
    """The positions that are kept of sequences: all of them (``None``) where they are short.

    Args:
      valid: ``[B, S]``, false at padding.
      also: positions that must be among them.
    """
    length = valid.shape[1]
    if length <= ALL_ROWS:
        return None
    even = np.linspace(0, length - 1, SOME_ROWS).astype(int).tolist()
    last = [int(np.flatnonzero(row)[-1]) for row in valid if row.any()]
    return tuple(sorted({*even, *last, *map(int, also)}))


def other_rows(shape: Sequence[int]) -> tuple[int, ...] | None:
    """The rows (last axis but one) that are kept of an array that does not lie along the sequence."""
    size = int(np.prod(shape))
    if size <= MOST_VALUES or len(shape) < 2:
        return None
    keep = max(8, shape[-2] * MOST_VALUES // size)
    return None if keep >= shape[-2] else tuple(sorted(set(np.linspace(0, shape[-2] - 1, keep).astype(int).tolist())))


def along_sequence(name: str) -> bool:
    """Whether the second axis of a component is the sequence."""
    return split(name)[0] in ("decoder", "embedding", "positions", "rotary", "final_norm", "logits", "edit")


def keep(name: str, array: np.ndarray, rows: Sequence[int] | None) -> np.ndarray:
    """The rows of a whole array that are kept."""
    if rows is None:
        return array
    axis = -2 if name.endswith("attn_probs") or not along_sequence(name) else 1
    return np.take(array, rows, axis=axis)


def meaningful(
    name: str, shape: Sequence[int], rows: Sequence[int] | None, inputs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Which numbers of a kept array are compared ``[*shape]`` or with fewer axes: those that no padding has made.

    Args:
      name: of the component.
      shape: of the kept array.
      rows: that are kept.
      inputs: the arrays that the models were given.

    Raises:
      InputError: the array does not fit the inputs.
    """
    part, _, site = split(name)
    if along_sequence(name):
        valid = np.asarray(inputs["attention_mask"]).astype(bool)
        queries = valid if rows is None else valid[:, list(rows)]
        if site == "attn_probs":
            heads = np.ones((1, shape[1], 1, 1), bool)
            mask = (queries[:, :, None] & valid[:, None, :])[:, None] & heads
        else:
            mask = queries
    elif part == "qformer" and site != "cross_out":
        words = np.asarray(inputs["qformer_attention_mask"]).astype(bool)
        length = shape[1] if rows is None else rows[-1] + 1  # the last row is always kept
        queries = np.ones((len(words), max(0, length - words.shape[1])), bool)
        whole = np.concatenate([queries, words], axis=1)
        mask = whole if rows is None else whole[:, list(rows)]
    else:
        mask = np.ones(tuple(shape[:1]), bool)
    if mask.shape != tuple(shape[: mask.ndim]):
        raise InputError(f"{name}: an array of shape {tuple(shape)} does not fit inputs of shape {mask.shape}")
    return mask
