"""How leaves are cut and read in parts: against plain indexing of the whole."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.convert import pieces
from jaxmllm.convert.checkpoint import open_safetensors
from jaxmllm.convert.pieces import Layout, lay_out, region_of, shape_of, slices
from jaxmllm.convert.plan import flatten
from jaxmllm.convert.tables import NAME_TABLES
from jaxmllm.convert.transposing import transposed

TYPES = (np.uint8, np.uint16, np.float16, np.float32, np.float64)


@settings(deadline=None)
@given(st.integers(0, 150), st.integers(0, 70), st.sampled_from(TYPES), st.booleans())
def test_transposing_is_transposing(rows, columns, dtype, strided):
    matrix = np.random.default_rng(0).integers(0, 100, (rows, 2 * columns)).astype(dtype)
    matrix = matrix[:, ::2] if strided else matrix[:, columns:]
    matrix = np.ascontiguousarray(matrix) if strided else matrix
    result = transposed(matrix)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, matrix.T)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=3))
def test_pieces_cover_an_array_once(axes):
    shape = tuple(size for size, _ in axes)
    chunk = tuple(min(size, part) for size, part in axes)
    layout = Layout("a/b", shape, np.dtype(np.float32), chunk)
    counts = np.zeros(shape, int)
    made = list(layout.pieces())
    for piece in made:
        counts[slices(piece.region)] += 1
        assert all(length <= part for length, part in zip(shape_of(piece.region), chunk, strict=True))
        assert piece.nbytes == 4 * np.prod(chunk, dtype=int)
    assert (counts == 1).all()
    assert len({piece.file for piece in made}) == len(made)
    assert all(piece.file.startswith("a.b/") for piece in made)


def test_an_index_becomes_a_region():
    assert region_of((slice(None), slice(2, None), slice(None, -1)), (3, 5, 7)) == ((0, 3), (2, 5), (0, 6))
    assert region_of((), ()) == ()


def skeleton_of(pair):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pair.jax.params)


def test_any_part_of_any_leaf_is_what_indexing_the_leaf_gives(pair):
    table, skeleton = NAME_TABLES[pair.jax.config.model_type](pair.jax.config), skeleton_of(pair)
    weights = open_safetensors(pair.folder, table, skeleton)
    rng = np.random.default_rng(0)
    for leaf, value in flatten(pair.jax.params).items():
        whole = np.asarray(value)
        cuts = [np.sort(rng.choice(size + 1, 2, replace=False)) for size in whole.shape]
        for region in (
            tuple((0, size) for size in whole.shape),
            tuple((int(start), int(stop)) for start, stop in cuts),
        ):
            read = []
            part = weights.read(leaf, region, np.dtype(np.float16), read.append)
            assert part.flags.c_contiguous
            np.testing.assert_array_equal(part, whole[slices(region)].astype(np.float16), err_msg=leaf)
            patches = "patch_embed/kernel" in leaf  # read whole
            assert sum(array.size for array in read) == (whole.size if patches else part.size)


@pytest.mark.parametrize("whole", [0, 2000, 10**9])
def test_large_leaves_are_cut_along_the_axis_that_devices_share(pair, monkeypatch, whole):
    monkeypatch.setattr(pieces, "WHOLE", whole)
    table, skeleton = NAME_TABLES[pair.jax.config.model_type](pair.jax.config), skeleton_of(pair)
    layouts = {layout.leaf: layout for layout in lay_out(table, skeleton)}
    assert set(layouts) == set(flatten(skeleton))
    for leaf, layout in layouts.items():
        size = layout.dtype.itemsize * int(np.prod(layout.shape))
        assert size > whole or layout.chunk == layout.shape, leaf
    if whole == 0:
        layers, width, heads = layouts["decoder/layers/attention/query/kernel"].shape
        eighth = -(-heads // 8)
        assert layouts["decoder/layers/attention/query/kernel"].chunk == (1, width, eighth)
        assert layouts["decoder/layers/attention/out/kernel"].chunk == (1, eighth, width)
        feed = layouts["decoder/layers/mlp/down/kernel"].shape[1]
        assert layouts["decoder/layers/mlp/down/kernel"].chunk == (1, -(-feed // 8), width)
        vocabulary = layouts["decoder/embed/embedding"].shape[0]
        assert layouts["decoder/embed/embedding"].chunk == (-(-vocabulary // 8), width)
        assert layouts["decoder/layers/mlp_norm/scale"].chunk == (1, width)
        assert layers > 1
