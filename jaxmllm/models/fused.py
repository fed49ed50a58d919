"""Causal attention by a fused kernel, where the platform has one that takes the shapes.

TPU: JAX's Pallas splash attention. GPU: cuDNN's flash attention. Elsewhere, and for what a kernel refuses: the chunks
of ``attention``, to which the kernels are held. Which it is, is settled when a program is lowered, so a program for a
TPU can be compiled on any machine.

A kernel is told of causality and padding alone. Where more than that decides who sees whom (knockouts, a caller's mask,
sliding windows), ``attention`` stays the way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxmllm.models.attention import BLOCKED, KeyValue, attention
from jaxmllm.models.sharding import DATA, MODEL

# Runs of fewer queries are not worth padding to a kernel's tiles.
SHORTEST = 128

# Lanes of a TPU's registers: lengths are padded to them, and the width of a head must be a multiple.
LANES = 128

# The largest tile of queries or of keys; larger ones no longer save passes over keys, and take a TPU's fast memory.
LARGEST_TILE = 512

# Names of the precision of products in which a TPU rounds factors to bfloat16.
ONE_PASS = (None, "default", "fastest", "bfloat16")

Kernel = Callable[[Array, tuple[KeyValue, ...], Array], Array]


def causal_attention(
    query: Float[Array, "B S H E"], own: KeyValue, past: Sequence[KeyValue], valid: Bool[Array, "B T"]
) -> Float[Array, "B S H E"]:
    """Grouped-query attention of a run of positions to itself and to all that stands before it.

    Outputs of padding are finite, and otherwise left open: they differ between platforms, and nothing may read them.
    Derivatives of any order and kind are those of the plain path, on every platform.

    Args:
      query: rotated queries of the run.
      own: keys and values of the run.
      past: parts that stand before it, in order; T positions with the run.
      valid: which positions are no padding.
    """
    parts = (*past, own)
    kernels: dict[str, Kernel] = {}
    if query.shape[1] >= SHORTEST:
        if query.shape[-1] % LANES == 0 and query.dtype in (jnp.float32, jnp.bfloat16):
            kernels["tpu"] = with_plain_derivatives(splash)
        # cuDNN's checks need its library, so it is not even traced where there is none
        if jax.default_backend() == "gpu" and accepts(cudnn, query, parts, valid):
            kernels["cuda"] = with_plain_derivatives(cudnn)
    return jax.lax.platform_dependent(query, parts, valid, default=plain, **kernels)


def plain(
    query: Float[Array, "B S H E"], parts: tuple[KeyValue, ...], valid: Bool[Array, "B T"]
) -> Float[Array, "B S H E"]:
    """``attention`` under causality and padding."""
    *past, own = parts
    before = valid.shape[1] - query.shape[1]

    def bias_of(start: int, stop: int, seen: int) -> Float[Array, "B r seen"]:
        allowed = (jnp.arange(seen) <= before + jnp.arange(start, stop)[:, None]) & valid[:, None, :seen]
        return jnp.where(allowed, 0.0, 2 * BLOCKED)

    return attention(query, own, past, bias_of, causal=True)


def with_plain_derivatives(kernel: Kernel) -> Kernel:
    """The kernel, with the derivatives of ``plain``: forward, backward and higher ones alike.

    Under ``grad`` the weights are computed again by the plain path, so a gradient takes the memory it takes there.
    """

    @jax.custom_jvp
    def fused(query: Array, parts: tuple[KeyValue, ...], valid: Array) -> Array:
        return kernel(query, parts, valid)

    @fused.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        _, tangent = jax.jvp(plain, primals, tangents)
        return fused(*primals), tangent

    return fused


def accepts(kernel: Kernel, *operands: Any) -> bool:
    """Whether a kernel takes operands of these shapes and types on this machine."""
    try:
        jax.eval_shape(kernel, *operands)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def splash(
    query: Float[Array, "B S H E"],
    parts: tuple[KeyValue, ...],
    valid: Bool[Array, "B T"],
    interpret: bool = False,
) -> Float[Array, "B S H E"]:
    """Pallas splash attention, each device of the context's mesh for its own examples and heads.

    XLA cannot cut a Pallas call, so it is mapped over the mesh here. Along an axis that does not divide the examples or
    the heads, every device computes all of them. Key-value heads that do not divide are repeated until they do.

    Args:
      query: rotated queries of the run.
      parts: keys and values of all that stands before it, and of the run.
      valid: which positions are no padding.
      interpret: run the kernel step by step on any platform, for tests.
    """
    batch, _, heads, _ = query.shape
    whole = together(parts, batch)
    run = functools.partial(splash_on_one_device, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if not free:
        return run(query, whole.key, whole.value, valid)
    examples = DATA if DATA in free and batch % mesh.shape[DATA] == 0 else None
    split = MODEL if MODEL in free and heads % mesh.shape[MODEL] == 0 else None
    if split is not None:
        times = mesh.shape[MODEL] // math.gcd(whole.key.shape[2], mesh.shape[MODEL])
        whole = jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=2), whole)
    of_heads, of_positions = PartitionSpec(examples, None, split, None), PartitionSpec(examples, None)
    mapped = jax.shard_map(
        run,
        in_specs=(of_heads, of_heads, of_heads, of_positions),
        out_specs=of_heads,
        axis_names=free,
        check_vma=False,  # a Pallas call does not say along which axes its results vary
    )
    return mapped(query, whole.key, whole.value, valid)


def splash_on_one_device(
    query: Float[Array, "B S H E"],
    key: Float[Array, "B T K E"],
    value: Float[Array, "B T K E"],
    valid: Bool[Array, "B T"],
    interpret: bool = False,
) -> Float[Array, "B S H E"]:
    """Pallas splash attention of examples and heads that one device holds whole.

    The kernel skips the tiles that causality empties. Padding is a segment of its own, which no query belongs to: a
    query that so sees nothing mixes evenly what its tiles hold.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, seen = query.shape[1], key.shape[1]
    (query_tile, rows), (key_tile, columns) = tiles(length), tiles(seen)
    mask = masks.CausalMask((rows, columns), offset=seen - length)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * query.shape[2]),
        block_sizes=kernels.BlockSizes(block_q=query_tile, block_kv=key_tile),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def heads_first(values: Float[Array, "B L heads E"], to: int) -> Float[Array, "B heads padded E"]:
        # padded first: XLA then makes one pass of padding and transposing, not two
        return jnp.moveaxis(jnp.pad(values, ((0, 0), (0, to - values.shape[1]), (0, 0), (0, 0))), 2, 1)

    def one_example(query: Array, key: Array, value: Array, tokens: Array) -> Array:
        return kernel(query, key, value, kernels.SegmentIds(jnp.ones(rows, jnp.int32), tokens))

    # the kernel's compiler knows two precisions; products of bfloat16 are exact in either, and it takes one for them
    asked = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  made at run time
    precision = "default" if query.dtype == jnp.bfloat16 or asked in ONE_PASS else "highest"
    with jax.default_matmul_precision(precision):
        mixed = jax.vmap(one_example)(
            heads_first(query * query.shape[-1] ** -0.5, rows),
            heads_first(key, columns),
            heads_first(value, columns),
            jnp.pad(valid.astype(jnp.int32), ((0, 0), (0, columns - seen))),
        )
    return jnp.moveaxis(mixed[:, :, :length], 1, 2)


def tiles(length: int) -> tuple[int, int]:
    """The tile for so many positions, and the length that tiles then fill: as few positions over as can be."""
    count = math.ceil(length / LARGEST_TILE)
    tile = math.ceil(length / count / LANES) * LANES
    return tile, count * tile


def cudnn(
    query: Float[Array, "B S H E"], parts: tuple[KeyValue, ...], valid: Bool[Array, "B T"]
) -> Float[Array, "B S H E"]:
    """cuDNN's flash attention; it lays itself over a mesh.

    Raises:
      NotImplementedError, RuntimeError, ValueError: cuDNN is not there, or does not take these shapes or types.
    """
    length, seen = query.shape[1], valid.shape[1]
    whole = together(parts, query.shape[0])
    # its own causal mask counts queries from the first key, which is not where a run stands
    causal = jnp.arange(seen) <= seen - length + jnp.arange(length)[:, None]
    return _cudnn_of_examples(query, whole.key, whole.value, (causal & valid[:, None])[:, None])


@jax.custom_batching.custom_vmap
def _cudnn_of_examples(query: Array, key: Array, value: Array, mask: Bool[Array, "B 1 S T"]) -> Array:
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


@_cudnn_of_examples.def_vmap
def _more_examples(count: int, mapped: Sequence[bool], *operands: Array) -> tuple[Array, bool]:
    """``vmap`` as a longer batch: JAX's own rule for cuDNN does not take a mask that all heads share."""
    every = [
        operand if of_operand else jnp.broadcast_to(operand, (count, *operand.shape))
        for operand, of_operand in zip(operands, mapped, strict=True)
    ]
    mixed = _cudnn_of_examples(*[operand.reshape(-1, *operand.shape[2:]) for operand in every])
    return mixed.reshape(count, -1, *mixed.shape[1:]), True


def together(parts: Sequence[KeyValue], batch: int) -> KeyValue:
    """All parts as one, with a row for every example."""

    def join(*leaves: Array) -> Array:
        rows = [leaf if len(leaf) == batch else jnp.repeat(leaf, batch // len(leaf), axis=0) for leaf in leaves]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)

    return jax.tree.map(join, *parts)
