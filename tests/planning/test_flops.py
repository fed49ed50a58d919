"""Operations of traced programs, against what can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxmllm.planning.flops import count_flops, kernel_flops

A, B = np.zeros((8, 16), np.float32), np.zeros((16, 32), np.float32)
PRODUCT = 2.0 * 8 * 16 * 32


def counted(function, *args, steps=1):
    return count_flops(jax.make_jaxpr(function)(*args).jaxpr, steps)


def test_products():
    assert counted(jnp.matmul, A, B) == PRODUCT
    batched = counted(lambda a, b: jnp.einsum("zij,zjk->zik", a, b), np.zeros((3, 8, 16)), np.zeros((3, 16, 32)))
    assert batched == 3 * PRODUCT


def test_convolutions():
    """A patch embedding is a product of patches and kernel."""
    image, kernel = np.zeros((1, 3, 28, 28), np.float32), np.zeros((5, 3, 7, 7), np.float32)
    assert counted(lambda x, k: jax.lax.conv(x, k, (7, 7), "VALID"), image, kernel) == 2.0 * 16 * 5 * 3 * 49


def test_loops_branches_and_calls():
    def scanned(a, b):
        return jax.lax.scan(lambda total, _: (total + jax.jit(jnp.matmul)(a, b).sum(), None), 0.0, length=6)[0]

    def looped(a, b):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: (x @ b) @ b.T, a)

    def branched(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: (a @ b).sum(), lambda: (a @ b @ b.T).sum())

    assert counted(scanned, A, B) == 6 * PRODUCT
    assert counted(looped, A, B, steps=5) == 5 * 2 * PRODUCT
    assert counted(branched, A, B) == 2 * PRODUCT


def test_kernels_are_told_apart():
    def kernel(a, b, out):
        out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    def run(a, b):
        blocks = {"grid": (2,), "in_specs": [pl.BlockSpec((4, 16), lambda i: (i, 0)), pl.BlockSpec()]}
        shape = jax.ShapeDtypeStruct((8, 32), jnp.float32)
        return pl.pallas_call(kernel, shape, out_specs=pl.BlockSpec((4, 32), lambda i: (i, 0)), **blocks)(a, b) + a @ b

    jaxpr = jax.make_jaxpr(run)(A, B).jaxpr
    assert kernel_flops(jaxpr) == PRODUCT
    assert count_flops(jaxpr) == 2 * PRODUCT


@pytest.mark.parametrize("length", [1, 4])
def test_a_model_takes_two_operations_a_weight_and_position(length):
    """Not quite: embeddings are looked up, and attention comes on top."""
    from jaxmllm.model import make_skeleton
    from jaxmllm.models.capture import Capture
    from jaxmllm.models.forward import forward_named
    from jaxmllm.models.inputs import as_inputs
    from jaxmllm.models.registry import family_of
    from tests.support.families import VARIANTS

    family = family_of(VARIANTS["grouped_queries"])
    config = family.read_config(VARIANTS["grouped_queries"])
    graphdef, params = make_skeleton(family.module, config, "float32", "float32")
    inputs = as_inputs({"input_ids": np.ones((1, length), np.int32)}, config)
    traced = forward_named.trace(graphdef, params, inputs, None, Capture(), "last")
    layers = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]["layers"]) if leaf.ndim == 3)
    head = params["decoder"]["head"]["kernel"].size
    text = config.text
    scores = 2 * 2 * text.num_layers * text.num_heads * text.head_dim * length**2
    assert count_flops(traced.jaxpr.jaxpr) == 2 * layers * length + 2 * head + scores
