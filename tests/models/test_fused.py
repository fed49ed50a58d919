"""Fused kernels against the plain path: step by step on a CPU, and compiled for a TPU that is not there."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmllm.analysis import compose, erase_image, knockout, scale_heads
from jaxmllm.models import forward as pure
from jaxmllm.models import fused
from jaxmllm.models.attention import BLOCKED, KeyValue, attention
from jaxmllm.models.capture import ATTENTION, Capture
from jaxmllm.models.decoder import Decoder
from jaxmllm.models.fused import causal_attention, plain, splash, tiles, with_plain_derivatives
from jaxmllm.models.layers import Builder
from jaxmllm.models.layout import make_layout
from jaxmllm.models.text_config import DecoderConfig
from tests.support.families.llava import LLAVA
from tests.support.families.parts import TEXT, VISION

WIDTH, BATCH = 128, 2
interpreted = functools.partial(splash, interpret=True)


def draw(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def case(length, heads, kv_heads, past=(), side="both", dtype=jnp.float32, batch=BATCH, seed=0):
    """Queries, parts of keys and values, and which positions are no padding."""
    rng = np.random.default_rng(seed)
    shapes = [*past, (batch, length)]
    parts = tuple(
        KeyValue(*(draw(rng, groups, many, kv_heads, WIDTH, dtype=dtype) for _ in range(2))) for groups, many in shapes
    )
    valid = np.ones((batch, sum(many for _, many in shapes)), bool)
    if side in ("left", "both"):
        valid[0, :9] = False
    if side in ("right", "both"):
        valid[-1, -11:] = False
    return draw(rng, batch, length, heads, WIDTH, dtype=dtype), parts, jnp.asarray(valid)


def real(mixed, valid):
    """The outputs of queries that are no padding."""
    return np.asarray(mixed, np.float32)[np.asarray(valid)[:, -mixed.shape[1] :]]


def as_on_tpu(*operands, default=None, **branches):
    """``platform_dependent`` where the platform is a TPU, as far as a CPU can be one."""
    return branches.get("tpu", branches.get("cpu", default))(*operands)


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_tpu)
    monkeypatch.setattr(fused, "splash", interpreted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "past", "side"),
    [
        (128, 4, 4, (), "neither"),
        (200, 4, 2, (), "left"),
        (300, 4, 1, (), "right"),
        (130, 2, 1, ((1, 35),), "both"),
        (257, 2, 2, ((1, 20), (BATCH, 140)), "both"),
        (600, 2, 1, ((1, 5),), "both"),
    ],
)
def test_the_kernel_gives_what_the_plain_path_gives(length, heads, kv_heads, past, side, dtype):
    operands = case(length, heads, kv_heads, past, side, dtype)
    got, expected = interpreted(*operands), plain(*operands)
    assert got.dtype == expected.dtype == dtype
    exact = plain(*jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(jnp.float32), operands))
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7 * np.abs(real(exact, operands[2])).max()
    np.testing.assert_allclose(real(got, operands[2]), real(expected, operands[2]), atol=tolerance)
    np.testing.assert_allclose(real(got, operands[2]), real(exact, operands[2]), atol=tolerance)
    assert np.isfinite(np.asarray(got, np.float32)).all()


def test_queries_that_see_nothing_stay_finite_and_change_nobody_else():
    query, parts, valid = case(150, 2, 1)
    nothing = valid.at[0].set(False)
    got = interpreted(query, parts, nothing)
    assert np.isfinite(np.asarray(got)).all()
    np.testing.assert_array_equal(np.asarray(got)[1], np.asarray(interpreted(query, parts, valid))[1])


@pytest.mark.parametrize("length", [1, 128, 129, 512, 513, 704, 1100, 3000, 9001])
def test_tiles_fill_the_length_with_little_over(length):
    tile, filled = tiles(length)
    assert tile % fused.LANES == 0 and tile <= fused.LARGEST_TILE
    assert filled % tile == 0 and filled >= length
    assert filled - length < fused.LANES * (filled // tile)


def test_on_a_cpu_nothing_differs_from_attention_by_a_bias_of_the_layout():
    query, parts, valid = case(200, 4, 2, ((1, 35),))
    ids, before = jnp.zeros(valid.shape, jnp.int32), 35
    layout = make_layout(ids, valid, 90, None, None, 0)

    def bias_of(start, stop, seen):
        return jnp.where(layout.may_attend(before + jnp.arange(start, stop)[None], seen), 0.0, 2 * BLOCKED)

    got = jax.jit(lambda *all_: causal_attention(all_[0], all_[1][-1], all_[1][:-1], all_[2]))(query, parts, valid)
    expected = jax.jit(lambda query, parts: attention(query, parts[-1], parts[:-1], bias_of, True))(query, parts)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_derivatives_are_those_of_the_plain_path():
    query, parts, valid = case(140, 2, 1, ((1, 20),))
    counted = valid[:, -140:, None, None]

    def loss(way, query, parts):
        return jnp.sum(jnp.where(counted, way(query, parts, valid), 0.0) ** 2)

    ways = (with_plain_derivatives(interpreted), plain)
    got, expected = (jax.grad(functools.partial(loss, way), argnums=(0, 1))(query, parts) for way in ways)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), got, expected)
    along = jax.tree.map(jnp.ones_like, (query, parts))
    got, expected = (jax.jvp(functools.partial(loss, way), (query, parts), along)[1] for way in ways)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


# A decoder whose heads are as wide as those of real models.
CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=WIDTH
)
IMAGE, LENGTH = 30, 150


@functools.cache
def decoder_parts():
    module = Decoder(CONFIG, Builder(jnp.dtype("float32"), jnp.dtype("float32"), nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 29, (BATCH, LENGTH))
    ids[:, 12:28] = IMAGE
    mask = np.ones((BATCH, LENGTH), np.int32)
    mask[0, :7] = 0
    mask[1, -5:] = 0
    return (*pure.split(module), draw(rng, BATCH, LENGTH, CONFIG.hidden_size), ids, mask)


def run_decoder(params, hidden, edits=None, capture=Capture(), mask=None, config=CONFIG):
    graphdef, _, _, ids, valid = decoder_parts()
    module = pure.merge(graphdef, params)
    module.config = config
    layout = make_layout(jnp.asarray(ids), jnp.asarray(valid if mask is None else mask), IMAGE, None, None, 16)
    return module(hidden, layout, edits, capture)


def on_valid(hidden):
    return jnp.where(jnp.asarray(decoder_parts()[-1])[..., None] > 0, hidden, 0.0)


@pytest.mark.parametrize("edits", [None, compose(erase_image(1), scale_heads(0, [1.0, 0.5]))])
def test_a_decoder_with_the_kernel_and_captured_rows(edits, on_tpu, monkeypatch):
    _, params, hidden, *_ = decoder_parts()
    capture = Capture.attention(rows="last", keys="image")
    got, captured = run_decoder(params, hidden, edits, capture)
    monkeypatch.undo()
    expected, oracle = run_decoder(params, hidden, edits, capture)
    np.testing.assert_allclose(on_valid(got), on_valid(expected), atol=2e-5)
    assert captured[ATTENTION].dtype == jnp.float32
    np.testing.assert_allclose(captured[ATTENTION], oracle[ATTENTION], atol=2e-6)


@pytest.mark.slow
def test_gradients_through_checkpoint_and_scan(on_tpu, monkeypatch):
    _, params, hidden, *_ = decoder_parts()

    def loss(params, strength):
        return jnp.sum(on_valid(run_decoder(params, hidden, erase_image(1, strength=strength))[0]) ** 2)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, 0.5)
    monkeypatch.undo()
    expected = jax.jit(jax.grad(lambda *args: loss(*args), argnums=(0, 1)))(params, 0.5)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, float(jnp.abs(other).max())))


def test_vmap_over_edits(on_tpu, monkeypatch):
    _, params, hidden, *_ = decoder_parts()

    def by_layer(layers):
        return jax.vmap(lambda layer: on_valid(run_decoder(params, hidden, erase_image(layer))[0]))(layers)

    got = by_layer(jnp.arange(2))
    monkeypatch.undo()
    np.testing.assert_allclose(got, by_layer(jnp.arange(2)), atol=2e-5)


def kernels_in(**changes):
    _, params, hidden, *_ = decoder_parts()
    changes.setdefault("edits", None)
    return str(jax.make_jaxpr(lambda params: run_decoder(params, hidden, **changes)[0])(params)).count("pallas_call")


def test_the_kernel_is_asked_for_where_causality_and_padding_are_all():
    assert kernels_in() > 0
    assert kernels_in(edits=erase_image(0)) > 0
    pairs = np.tril(np.ones((BATCH, 1, LENGTH, LENGTH), bool))
    assert kernels_in(mask=pairs) == 0
    assert kernels_in(edits=knockout(0, queries="question", keys="image")) == 0
    assert kernels_in(config=dataclasses.replace(CONFIG, windows=(None, 40))) == 0


@pytest.mark.parametrize(
    ("length", "width", "dtype"), [(127, 128, "float32"), (140, 64, "float32"), (140, 128, "float16")]
)
def test_shapes_and_types_that_no_kernel_takes_go_the_plain_way(length, width, dtype):
    query, own = (jnp.zeros((1, length, 2, width), dtype) for _ in range(2))
    shapes = query, KeyValue(own, own), (), jnp.ones((1, length), bool)
    assert "pallas_call" not in str(jax.make_jaxpr(causal_attention)(*shapes))


def test_a_gpu_without_cudnn_goes_the_plain_way(monkeypatch):
    query, parts, valid = case(140, 2, 1, dtype=jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not fused.accepts(fused.cudnn, query, parts, valid)
    got = causal_attention(query, parts[-1], parts[:-1], valid)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(plain(query, parts, valid), np.float32))


def test_what_cudnn_is_asked_for(monkeypatch):
    """The same call answered by XLA: mask, scale and shared heads are those of the plain path; also under vmap."""
    query, parts, valid = case(140, 4, 2, ((1, 20),))
    ask = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **rest: ask(*args, implementation="xla", **rest)
    )
    np.testing.assert_allclose(
        real(fused.cudnn(query, parts, valid), valid), real(plain(query, parts, valid), valid), atol=1e-5
    )
    several = jnp.stack([query, 2 * query, -query])
    got = jax.vmap(fused.cudnn, in_axes=(0, None, None))(several, parts, valid)
    for one, alone in zip(got, several, strict=True):
        np.testing.assert_allclose(real(one, valid), real(plain(alone, parts, valid), valid), atol=1e-5)


ON_A_MESH = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType
from tests.models.test_fused import case, interpreted, plain, real
jax.config.update("jax_default_matmul_precision", "highest")
for shape, batch, heads, kv_heads in [((2, 2), 2, 4, 2), ((2, 4), 4, 4, 2), ((2, 4), 3, 4, 1), ((4, 2), 4, 3, 3)]:
    count = shape[0] * shape[1]
    devices = jax.devices()[:count]
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    query, parts, valid = case(140, heads, kv_heads, ((1, 20),), batch=batch)
    with jax.set_mesh(mesh):
        got = jax.jit(interpreted)(query, parts, valid)
    gap = np.abs(real(got, valid) - real(plain(query, parts, valid), valid)).max()
    print(json.dumps([list(got.sharding.spec), float(gap)]))
"""


def run_python(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{"))]


@pytest.mark.slow
def test_devices_of_a_mesh_compute_their_own_examples_and_heads():
    lines = run_python(ON_A_MESH, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    assert [spec for spec, _ in lines] == [
        ["data", None, "model"],
        ["data", None, "model"],  # two key-value heads for four devices
        [None, None, "model"],  # three examples for two devices
        ["data"],  # three heads for two devices
    ]
    assert max(gap for _, gap in lines) < 1e-5


FOR_A_TPU = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxmllm.analysis import erase_image, knockout
from jaxmllm.analysis.sharing.programs import RunEdits, run_layer
from jaxmllm.decoding.generate import run_prompts
from jaxmllm.model import make_skeleton
from jaxmllm.models import forward as pure, sharding
from jaxmllm.models.attention import KeyValue
from jaxmllm.models.capture import Capture
from jaxmllm.models.images import Images
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layout import Layout
from jaxmllm.models.registry import family_of

fields, topology, shape, dtype, *programs = json.loads(sys.argv[1])
topology = topologies.get_topology_desc(platform="tpu", topology_name=topology)
devices = np.array(topology.devices)[: shape[0] * shape[1]].reshape(shape)
mesh = Mesh(devices, ("data", "model"))
family = family_of(fields)
config = family.read_config(fields)
graphdef, skeleton = make_skeleton(family.module, config, dtype, dtype)
params = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    skeleton,
    sharding.param_shardings(skeleton, config, mesh),
)


def rows(*sizes, dtype=jnp.int32, spec=("data",)):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


batch, length = 4, 300
images = Images({"pixel_values": rows(batch, 3, 28, 28, dtype=jnp.float32)}, rows(batch), 16)
inputs = Inputs(rows(batch, length), rows(batch, length), images, None, None, 16)
rows_kept = Capture.attention(rows="last", keys="image")


def logits(params, inputs, edits=None):
    return pure.run(pure.merge(graphdef, params), inputs, edits, Capture(), "last").logits


def lower(program):
    if program == "forward":
        return pure.forward_named.lower(graphdef, params, inputs, erase_image(1), rows_kept, "last")
    if program == "knockout":
        return pure.forward_named.lower(graphdef, params, inputs, knockout(1), rows_kept, "last")
    if program == "prompts":
        return run_prompts.lower(graphdef, params, inputs, None, Capture(), 16)
    if program == "vmap":
        every = jax.vmap(lambda layer, *rest: logits(*rest, erase_image(layer)), in_axes=(0, None, None))
        return jax.jit(every).lower(rows(3, spec=()), params, inputs)
    if program == "grad":
        return jax.jit(jax.grad(lambda *args: logits(*args).sum())).lower(params, inputs)
    kind = jnp.dtype(dtype)
    layer = jax.tree.map(lambda leaf: rows(*leaf.shape[1:], dtype=kind, spec=()), params["decoder"]["layers"])
    keys = rows(1, 35, config.text.num_kv_heads, config.text.head_dim, dtype=kind, spec=())
    flags = rows(batch, 700, dtype=jnp.bool_)
    settings = {"start": 35, "stop": 635, "capture": Capture(), "keys_alone": False, "at_once": batch}
    return run_layer.lower(
        nnx.split(pure.merge(graphdef, params).decoder.layers)[0],
        layer,
        jnp.int32(0),
        rows(batch, 600, config.text.hidden_size, dtype=kind),
        (KeyValue(keys, keys),),
        Layout(flags, flags, rows(batch, 700), None, None, 600),
        RunEdits(),
        config=config.text,
        **settings,
    )


for program in programs:
    with sharding.context(mesh):
        text = lower(program).compile().as_text()
    print(json.dumps([program, text.count('custom_call_target="tpu_custom_call"')]))
"""

REAL_WIDTH = {
    **LLAVA,
    "text_config": {**TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": WIDTH},
    "vision_config": VISION,
}


def kernels_by_program(topology, shape, dtype, *programs, precision="default"):
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": precision,
    }
    return dict(run_python(FOR_A_TPU, json.dumps([REAL_WIDTH, topology, shape, dtype, *programs]), **settings))


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="TPU's compiler is not installed")


@needs_libtpu
def test_whole_programs_compile_for_a_tpu_with_the_kernel_in_them():
    found = kernels_by_program("v5e:2x2", (2, 2), "bfloat16", "forward", "prompts", "layer")
    assert found == {"forward": 1, "prompts": 1, "layer": 1}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "shape", "dtype", "precision"),
    [
        ("v4:2x2x1", (2, 2), "bfloat16", "default"),
        ("v5e:2x2", (1, 1), "bfloat16", "highest"),
        ("v5e:2x2", (1, 1), "float32", "high"),
        ("v5p:2x2x1", (1, 4), "bfloat16", "default"),
        ("v6e:2x2", (4, 1), "float32", "highest"),
    ],
)
def test_every_program_compiles_for_meshes_of_tpus(topology, shape, dtype, precision):
    programs = ("forward", "prompts", "layer", "vmap", "grad", "knockout")
    found = kernels_by_program(topology, shape, dtype, *programs, precision=precision)
    # forwards once, and once again where the backward pass recomputes the layer
    assert found == {"forward": 1, "prompts": 1, "layer": 1, "vmap": 1, "grad": 2, "knockout": 0}
