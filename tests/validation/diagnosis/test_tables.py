"""Frequencies read off rotary tables, newlines and padding of tiles, windows that weights show."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxmllm.models.anyres import Tiling
from jaxmllm.validation.diagnosis.attention import reach
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.frequencies import Frequencies
from jaxmllm.validation.diagnosis.tiles import tile_causes

PAIRS = np.arange(8)
PLAIN = 1e4 ** (-PAIRS / 8)


@pytest.mark.parametrize(
    ("port", "said"),
    [
        (2.5 * PLAIN, "all frequencies of the port are 2.5 times"),
        (1e6 ** (-PAIRS / 8), "rotary base 1e+06 in the port, 10000 in the reference"),
        (np.where(PAIRS < 5, PLAIN, 8 * PLAIN), "from pair 5 on the port's are other ones, the last 8 times"),
        (PLAIN * (1 + PAIRS % 2), "not by one factor nor by another base"),
    ],
)
def test_how_frequencies_differ(port, said):
    assert said in Frequencies(port, PLAIN).named()


TILING = Tiling((2, 1), 4, (6, 4))  # one row of patches is cut off above, one below
PATCHES = np.random.default_rng(0).normal(size=(1 + 3 * 16, 5))  # 0 is the newline


def case(order=TILING.order, patches=PATCHES):
    config = SimpleNamespace(model_type="llava_next", tiling=lambda size: TILING)
    inputs = {"image_sizes": np.array([[6, 4]])}
    got, expected = patches[order], PATCHES[TILING.order]
    nothing = {}.get
    return Case(
        "image_tokens", "own", got, expected, np.ones(len(got), bool), None, nothing, nothing, nothing, inputs, config
    )


def zero(row):
    patches = PATCHES.copy()
    patches[row] = 0
    return patches


def other_padding(by):
    order = TILING.order.copy()
    order[16:] = np.where(order[16:] > 0, order[16:] + 4 * by, 0)
    return order


def test_newlines_and_padding_of_tiles():
    assert tile_causes(case(patches=zero(0)))[0].name == "newlines are zero"
    assert "cut from the end" in tile_causes(case(other_padding(-1)))[0].name
    assert "cut from the start" in tile_causes(case(other_padding(1)))[0].name
    assert tile_causes(case(np.roll(TILING.order, 3))) == ()


def test_windows_are_read_off_weights():
    valid = np.arange(9) < np.array([[9], [7]])
    keys, queries = np.arange(9), np.arange(9)[:, None]
    causal = np.broadcast_to(keys <= queries, (2, 3, 9, 9)) & valid[:, None, None]
    assert reach(causal.astype(float), keys, valid) is None
    assert reach((causal & (keys > queries - 4)).astype(float), keys, valid) == 4
