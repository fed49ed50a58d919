"""Ways to compute the same otherwise: nearly the same numbers, and not the very same."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxmllm.validation.torch_side.ways import OtherOrder, Promoted, RoundedProducts, computing, type_of, ways_for


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matmul(a, b):
    return a @ b


OPERATIONS = {
    "matmul": lambda x, w: torch.matmul(x, w),
    "operator": matmul,
    "method": lambda x, w: x.matmul(w),
    "linear": lambda x, w: functional.linear(x, w.T.contiguous(), w[0]),
    "bmm": lambda x, w: torch.bmm(x, w.expand(len(x), *w.shape)),
    "softmax": lambda x, w: functional.softmax(10 * x, dim=-1, dtype=torch.float32),
    "mean": lambda x, w: x.mean(-1, keepdim=True),
    "mean without axis": lambda x, w: x.pow(2).mean(dim=-1),
    "layer_norm": lambda x, w: functional.layer_norm(x, x.shape[-1:], w[:, 0], w[:, 1], 1e-3),
    "conv2d": lambda x, w: functional.conv2d(x.reshape(1, 3, 75, 31), w.reshape(2, 3, 25, 31), stride=(25, 31)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_order_differs_by_rounding(name):
    x, w = normal(3, 25, 93), normal(93, 50, seed=1)
    operation = OPERATIONS[name]
    exact = operation(x.double(), w.double())
    expected = operation(x, w)
    with OtherOrder():
        got = operation(x, w)
        exactly = operation(x.double(), w.double())
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert not torch.equal(got, expected)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    if exact.dtype == torch.float64:
        assert torch.allclose(exactly, exact, rtol=1e-12, atol=1e-12)


def test_other_order_of_halves_rounds_once():
    x, w = normal(40, 512, dtype=torch.bfloat16), normal(512, 60, dtype=torch.bfloat16, seed=1)
    with OtherOrder():
        got = x @ w
    exact = (x.double() @ w.double()).to(torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert (got == exact).float().mean() > 0.99


def test_a_kernel_that_overlaps_is_left_alone():
    x, w = normal(1, 3, 9, 9), normal(2, 3, 3, 3, seed=1)
    with OtherOrder():
        got = functional.conv2d(x, w, stride=1)
    assert torch.equal(got, functional.conv2d(x, w, stride=1))


@pytest.mark.parametrize("kernel", [(4, 6), (2, 4, 6)])
def test_patches_that_leave_a_rest(kernel):
    """Sides that patches do not divide: the rest is left out, as a convolution leaves it out."""
    x, w = normal(2, 3, *(3 * side + 1 for side in kernel)), normal(5, 3, *kernel, seed=1)
    convolve = functional.conv2d if len(kernel) == 2 else functional.conv3d
    with OtherOrder():
        got = convolve(x, w, normal(5, seed=2), stride=kernel)
    assert torch.allclose(got, convolve(x, w, normal(5, seed=2), stride=kernel), rtol=1e-5, atol=1e-4)


REQUESTS = {
    "to": lambda x: x.to(torch.float32),
    "to dtype": lambda x: x.to(dtype=torch.float32),
    "float": lambda x: x.float(),
    "type": lambda x: x.type(torch.float32),
    "softmax": lambda x: functional.softmax(x, dim=-1, dtype=torch.float32),
    "arange": lambda x: torch.arange(3, dtype=torch.float),
    "zeros": lambda x: torch.zeros(3, dtype=torch.float32),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_for_float32_give_float64(name):
    x = normal(3, 5, dtype=torch.float64)
    assert REQUESTS[name](x).dtype == torch.float32
    with Promoted():
        assert REQUESTS[name](x).dtype == torch.float64
    assert REQUESTS[name](x).dtype == torch.float32


def test_bf16_products_are_of_rounded_operands():
    a, b = normal(5, 33), normal(33, 7, seed=1)
    rounded = [torch.from_numpy(each.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)) for each in (a, b)]
    with RoundedProducts("bf16"):
        got = a @ b
    assert torch.equal(got, rounded[0] @ rounded[1])


def test_tf32_operands_have_ten_bits_to_nearest_even():
    step = 2.0**-10  # of a number between 1 and 2
    cases = {
        1.0: 1.0,
        1.0 + step: 1.0 + step,
        1.0 + step / 2: 1.0,  # a tie, to even
        1.0 + 3 * step / 2: 1.0 + 2 * step,
        1.0 + step / 2 + 2.0**-23: 1.0 + step,
        -(1.0 + 3 * step / 2): -(1.0 + 2 * step),
        2.0 - 2.0**-23: 2.0,
        float("inf"): float("inf"),
    }
    with RoundedProducts("tf32"):
        got = torch.matmul(torch.tensor(list(cases))[:, None], torch.ones(1, 1))
    assert got[:, 0].tolist() == list(cases.values())


def test_accelerators_ways_are_ordered_by_how_much_they_round():
    a, b = normal(50, 200), normal(200, 50, seed=1)
    exact = a.double() @ b.double()
    errors = []
    for kind in ("bf16", "tf32", "bf16x3"):
        with RoundedProducts(kind):
            errors.append(float((a @ b - exact).abs().mean()))
    bf16, tf32, three = errors
    assert 4 < bf16 / tf32 < 16
    assert tf32 / three > 20
    assert three > float((a @ b - exact).abs().mean())


def test_names_of_ways():
    assert ways_for("float32", False) == ("float64", "other order")
    assert ways_for("float32", True)[2:] == ("tf32 products", "bf16 products", "bf16x3 products")
    assert ways_for("bfloat16", True) == ("float32", "other order")
    for dtype in ("float32", "bfloat16", "float16"):
        wide, *others = ways_for(dtype, True)
        assert type_of(wide, dtype) == wide
        for way in others:
            assert type_of(way, dtype) == dtype
            with computing(way):
                assert (torch.ones(2) @ torch.ones(2, 2)).tolist() == [2, 2]
