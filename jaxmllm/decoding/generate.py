"""Generation: one compiled pass over the prompts, one compiled loop over the tokens that follow."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.decoding.cache import Cache, join, prefill, with_room
from jaxmllm.decoding.rules import Decoded, Decoding, Ending, OneByOne, Rule
from jaxmllm.decoding.sampling import Sampling
from jaxmllm.errors import InputError, ProcessorError
from jaxmllm.models import forward as pure
from jaxmllm.models.capture import Capture
from jaxmllm.models.edits import Edits, resolve
from jaxmllm.models.images import bucket_of
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layers import Leaf
from jaxmllm.models.layout import Layout
from jaxmllm.models.sharding import context, put_rows, to_host

MAX_NEW_TOKENS = 64
# Slots for generated tokens are a multiple of one of these, so that unlike limits share programs.
ROOM_BUCKETS = (16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated for a batch; N is the length of the longest answer.

    Attributes:
      tokens ``[B, N]``: token ids, the stop token included; padding behind it.
      lengths ``[B]``: tokens of each answer, the stop token included.
      log_probabilities ``[B, N]``: of each token under the model (before temperature and what else sampling does to the
        distribution), natural logarithm; 0 at padding.
      stopped ``[B]``: whether a stop token ended the answer, rather than the limit.
      texts: the answers without special tokens and white space around them; ``None`` where the checkpoint's folder
        holds no processor.
      captured: what was captured of the pass over the prompts.
      recorded: what was captured of every position that predicted a token, by site, with a leading axis of N.
    """

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    log_probabilities: Float[np.ndarray, "B N"]
    stopped: Bool[np.ndarray, " B"]
    texts: tuple[str, ...] | None
    captured: dict[str, Array]
    recorded: dict[str, Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a pass over prompts leaves, beside the cache.

    Attributes:
      logits ``[R, V]``: of the first generated token; R rows, which may be several an example.
      layout: of the prompts and of the slots for generated tokens.
      ids ``[R, S]``: token ids of all slots before those.
      captured: the sites that were captured.
      findings: what the reader made of them.
    """

    logits: Leaf
    layout: Layout
    ids: Leaf
    captured: dict[str, Leaf]
    findings: Leaf

    def bare(self) -> Prompts:
        """Without what was captured: all that other passes read, so that they do not depend on what was."""
        return dataclasses.replace(self, captured={}, findings=None)


# Makes something of what a pass over prompts captured, within the compiled program. A pytree: its numbers are data.
Reader = Callable[[dict[str, Array], Layout], Leaf]


@functools.partial(jax.jit, static_argnames=("graphdef", "capture", "room"))
def run_prompts(
    graphdef: nnx.GraphDef,
    params: pure.Params,
    inputs: Inputs,
    edits: Edits | None,
    capture: Capture,
    room: int,
    reader: Reader | None = None,
) -> tuple[Prompts, Cache]:
    """Compiled pass over prompts; its cache has room behind them."""
    module = pure.merge(graphdef, params)
    prompts = pure.layout_of(inputs, module.config.image_token_id)
    decoder = module.decoder.config
    resolve(edits, decoder.num_layers, decoder.num_heads, prompts)  # raises where position weights do not fit
    layout = with_room(prompts, room)
    logits, cache, captured = prefill(module, pure.embed(module, inputs), layout, edits, capture)
    findings = None if reader is None else reader(captured, layout)
    return Prompts(logits, layout, inputs.input_ids, captured, findings), cache


@functools.partial(jax.jit, static_argnames=("graphdef", "capture", "room"))
def run_tail(
    graphdef: nnx.GraphDef,
    params: pure.Params,
    first: Prompts,
    cache: Cache,
    keep: Bool[Array, "B H"],
    tail: Inputs,
    edits: Edits | None,
    capture: Capture,
    room: int,
) -> tuple[Prompts, Cache]:
    """Compiled pass over other prompts that begin as earlier ones did: only what follows is computed.

    Args:
      graphdef, params: of the model.
      first, cache: of the earlier prompts.
      keep: which of their first H slots these prompts begin with.
      tail: what follows them, images included.
      edits: as there; they must not have changed what is kept in another way.
      capture: what is kept of the tail's pass.
      room: slots for generated tokens.
    """
    module = pure.merge(graphdef, params)
    slots = keep.shape[1]
    head = dataclasses.replace(
        first.layout,
        image=first.layout.image[:, :slots],
        valid=first.layout.valid[:, :slots],
        positions=first.layout.positions[:, :slots],
    )
    layout = with_room(join(head, keep, pure.layout_of(tail, module.config.image_token_id)), room)
    logits, grown, captured = prefill(module, pure.embed(module, tail), layout, edits, capture, cache.head(slots))
    ids = jnp.concatenate([first.ids[:, :slots], tail.input_ids], axis=1)
    return Prompts(logits, layout, ids, captured, None), grown


@functools.partial(jax.jit, static_argnames=("graphdef", "room"), donate_argnames=("cache",))
def run_tokens(
    graphdef: nnx.GraphDef,
    params: pure.Params,
    prompts: Prompts,
    cache: Cache,
    edits: Edits | None,
    rule: Rule,
    keys: Leaf | None,
    endings: tuple[Int[Array, " n"], Int[Array, ""]],
    limit: Int[Array, ""],
    room: int,
) -> Decoded:
    """Compiled loop over the tokens that follow the prompts.

    Args:
      graphdef, params: of the model.
      prompts, cache: of the pass over the prompts.
      edits: as there.
      rule: how tokens follow from what the model says.
      keys ``[B]``: a random key an example; ``None`` where nothing is drawn.
      endings: stop tokens, and the token behind an answer's end.
      limit: tokens an answer, at most ``room``.
      room: slots for generated tokens.
    """
    module = pure.merge(graphdef, params)
    return rule.decode(Decoding(module, prompts, cache, edits, keys, Ending(*endings, limit, room)))


def generate(
    model: Any,
    inputs: Mapping[str, Any] | Inputs,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling | None = None,
    key: Array | None = None,
    row_numbers: Sequence[int] | None = None,
    edits: Edits | None = None,
    capture: Capture | None = None,
    stop_tokens: Sequence[int] | None = None,
    params: pure.Params | None = None,
) -> Generated:
    """Answers a batch of prompts, of unlike lengths and padded on either side.

    Greedy unless ``sampling`` is given. Keys and values of all positions lie in a cache of fixed size, so that there
    are two programs: one over the prompts, one over all tokens that follow. Their shapes are rounded up (``as_inputs``
    with ``bucketed``, and 16, 32, 64, ... new tokens), so few are compiled.

    Random numbers: example b draws its token number t with ``fold_in(fold_in(key, row_numbers[b]), t)``. So what is
    drawn depends on the key and on the number of the row, and neither on the batch around it nor on its size.

    Edits hold for prompts and generated tokens: an image that is hidden from a layer stays hidden, and a knockout from
    ``question`` includes the answer as it is generated. ``last`` stays the last token of the prompt. Position weights
    for ``all`` are 0 behind the prompt. Hooks (``at_site``) see the prompts ``[B, S, D]``, then one token at a time.

    Args:
      model: a loaded model.
      inputs: prompts, from ``model.prepare`` or a Hugging Face processor.
      max_new_tokens: tokens an answer, at most.
      sampling: how tokens are drawn.
      key: of ``jax.random.key``; needed where tokens are drawn.
      row_numbers: what each example is counted as; by default its place in the batch.
      edits: interventions, from ``jaxmllm.analysis``.
      capture: what to keep of the pass over the prompts.
      stop_tokens: ids that end an answer; by default those of the checkpoint (``model.endings``).
      params: weights to use instead of ``model.params``.

    Raises:
      InputError: inputs or edits that do not fit the model, sampling without a key, a limit below 1.

    Source: transformers' ``generate``, whose greedy tokens these are.
    """
    checked = model.as_inputs(inputs, bucketed=True)
    check_prompts(checked, max_new_tokens)
    batch = len(checked.input_ids)
    if edits is not None:
        edits.check(model.num_layers)
    params = model.params if params is None else params
    room = room_for(max_new_tokens)
    keys = row_keys(batch, sampling, key, row_numbers)
    with context(model.mesh):
        asked = put_rows(checked, model.mesh)
        prompts, cache = run_prompts(model.graphdef, params, asked, edits, capture or Capture(), room)
        done = run_tokens(
            model.graphdef,
            params,
            prompts,
            cache,
            edits,
            OneByOne(sampling),
            keys,
            ending_of(model, stop_tokens),
            np.int32(max_new_tokens),
            room,
        )
    return generated(model, done, prompts.captured)


def check_prompts(inputs: Inputs, max_new_tokens: int) -> None:
    """Raises InputError where inputs are not prompts alone, or nothing is to be generated."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if inputs.answer_positions is not None:
        raise InputError("inputs hold answer_positions: answers follow the prompts; generate takes prompts alone")
    if inputs.attention_mask.ndim != 2:
        raise InputError("attention_mask is over pairs of positions; generate takes one of shape (batch, sequence)")


def generated(model: Any, done: Decoded, captured: dict[str, Array]) -> Generated:
    """What was decoded, on the host and as text."""
    width = int(to_host(done.steps))
    tokens, lengths = to_host(done.tokens)[:, :width], to_host(done.lengths)
    return Generated(
        tokens=tokens,
        lengths=lengths,
        log_probabilities=to_host(done.log_probabilities)[:, :width],
        stopped=to_host(done.stopped),
        texts=read_texts(model, [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]),
        captured=captured,
        recorded={name: values[:width] for name, values in done.recorded.items()},
    )


def ending_of(model: Any, stop_tokens: Sequence[int] | None = None) -> tuple[np.ndarray, np.int32]:
    """The tokens that end an answer, by default the checkpoint's, and the one behind its end."""
    stop = model.endings.stop_tokens if stop_tokens is None else tuple(stop_tokens)
    return np.array(stop, np.int32), np.int32(model.endings.pad_token)


def room_for(max_new_tokens: int) -> int:
    """Slots that are kept for so many generated tokens."""
    return bucket_of(max_new_tokens, ROOM_BUCKETS)


def row_keys(
    batch: int, sampling: Sampling | None, key: Array | None, row_numbers: Sequence[int] | None
) -> Leaf | None:
    """One random key an example; ``None`` where nothing is drawn.

    Raises:
      InputError: no key, sampling out of range, or not one number an example.
    """
    if sampling is None:
        return None
    sampling.check()
    if key is None:
        raise InputError("sampling needs a key: give key=jax.random.key(seed)")
    numbers = np.arange(batch) if row_numbers is None else np.asarray(row_numbers)
    if numbers.shape != (batch,):
        raise InputError(f"row_numbers have shape {numbers.shape}; there are {batch} prompts")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers.astype(np.uint32))


def read_texts(model: Any, answers: Sequence[Sequence[int]]) -> tuple[str, ...] | None:
    """Answers as text; ``None`` where the model's folder holds no processor."""
    try:
        tokenizer = model.processor.tokenizer
    except ProcessorError:
        return None
    return tuple(tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers)
