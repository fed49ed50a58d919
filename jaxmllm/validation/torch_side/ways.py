"""Other ways to compute the same: what a reference differs from itself by shows how much its numbers can mean.

Each way is a mode of torch, inside which transformers' code runs as it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PARTS = 4  # a sum is cut into so many


class Promoted(TorchFunctionMode):
    """Whatever asks for float32 gets float64: norms, softmax and rotary tables that compute in at least float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*(_promoted(each) for each in args), **{k: _promoted(v) for k, v in (kwargs or {}).items()})


def _promoted(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Products(TorchFunctionMode):
    """Products of matrices, convolutions with them, are computed by ``product`` instead."""

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b``, of ``[..., M, K]`` and ``[..., K, N]``."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MATMULS:
            return self.product(*args, **kwargs)
        if func in _RIGHT_MATMULS:
            return self.product(args[1], args[0])
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        if func in _CONVOLUTIONS:
            return self._patches(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        product = self.product(input, weight.transpose(0, 1))
        return product if bias is None else product + bias

    def _patches(
        self,
        func: Callable[..., torch.Tensor],
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        """A convolution whose kernels do not overlap, as all that turn patches into tokens: a product of matrices."""
        sides = weight.shape[2:]
        steps = (stride,) * len(sides) if isinstance(stride, int) else tuple(stride)
        if steps != tuple(sides) or padding not in (0, (0,) * len(sides), "valid") or groups != 1:
            return func(input, weight, bias, stride, padding, dilation, groups)
        counts = [size // side for size, side in zip(input.shape[2:], sides, strict=True)]
        for axis, (count, side) in enumerate(zip(counts, sides, strict=True), start=2):
            input = input.narrow(axis, 0, count * side)
        split = [each for pair in zip(counts, sides, strict=True) for each in pair]
        cut = input.reshape(*input.shape[:2], *split)
        places = [2 + 2 * axis for axis in range(len(sides))]
        rows = cut.permute(0, *places, 1, *(place + 1 for place in places)).flatten(1 + len(sides))
        product = self._linear(rows, weight.flatten(1), bias)
        return product.movedim(-1, 1)


_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.mm}
_RIGHT_MATMULS = {torch.Tensor.__rmatmul__}
_CONVOLUTIONS = {functional.conv2d, functional.conv3d}


class OtherOrder(Products):
    """Sums over the last axis are cut into parts, which are summed apart.

    Halves are summed in float32 and rounded once, as libraries do; only the order is another.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAXES:
            return _softmax(*args, **kwargs)
        if func in _MEANS and _is_last(*args, **kwargs):
            return _mean(args[0], keepdim=kwargs.get("keepdim", False))
        if func is functional.layer_norm:
            return _layer_norm(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        wide = _at_least_float32(a.dtype)
        parts = (
            torch.matmul(a[..., start:stop].to(wide), b[..., start:stop, :].to(wide))
            for start, stop in _cuts(a.shape[-1])
        )
        total = next(parts)
        for part in parts:
            total = total + part
        return total.to(a.dtype)


_SOFTMAXES = {functional.softmax, torch.softmax, torch.Tensor.softmax}
_MEANS = {torch.mean, torch.Tensor.mean}


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cuts(length: int) -> list[tuple[int, int]]:
    """Where a sum is cut, from its end to its start."""
    step = math.ceil(length / PARTS)
    return [(start, min(start + step, length)) for start in range(0, length, step)][::-1]


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Over the last axis, which stays; in the other order."""
    parts = [values[..., start:stop].sum(-1, keepdim=True) for start, stop in _cuts(values.shape[-1])]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _is_last(input: torch.Tensor, dim: Any = None, **_: Any) -> bool:
    return dim in (-1, input.ndim - 1, [-1], (-1,))


def _mean(input: torch.Tensor, keepdim: bool) -> torch.Tensor:
    mean = (_sum(input.to(_at_least_float32(input.dtype))) / input.shape[-1]).to(input.dtype)
    return mean if keepdim else mean.squeeze(-1)


def _softmax(input: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    wide = input.to(_at_least_float32(dtype or input.dtype)).movedim(dim, -1)
    powers = torch.exp(wide - wide.amax(-1, keepdim=True))
    return (powers / _sum(powers)).movedim(-1, dim).to(dtype or input.dtype)


def _layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    wide = _at_least_float32(input.dtype)
    values = input.to(wide)
    centred = values - _mean(values, keepdim=True)
    normed = centred * torch.rsqrt(_mean(centred.square(), keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.to(wide)
    if bias is not None:
        normed = normed + bias.to(wide)
    return normed.to(input.dtype)


class RoundedProducts(Products):
    """Operands of products are rounded, as accelerators do; sums stay float32."""

    def __init__(self, kind: str):
        """``tf32``, ``bf16``, or ``bf16x3``: of two roundings to bfloat16, one of the rest, three products."""
        super().__init__()
        self._product = {"tf32": _tf32_product, "bf16": _bf16_product, "bf16x3": _bf16x3_product}[kind]

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self._product(a, b)


def _tf32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(_to_tf32(a), _to_tf32(b))


def _bf16_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(_to_bf16(a), _to_bf16(b))


def _bf16x3_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    high_a, high_b = _to_bf16(a), _to_bf16(b)
    low_a, low_b = _to_bf16(a - high_a), _to_bf16(b - high_b)
    return torch.matmul(high_a, high_b) + (torch.matmul(high_a, low_b) + torch.matmul(low_a, high_b))


def _to_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(torch.float32)


def _to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Float32 with 10 bits of mantissa, to nearest, ties to even; what is not finite stays."""
    bits = values.contiguous().view(torch.int32)
    rounded = (bits + (0xFFF + ((bits >> 13) & 1))) & ~0x1FFF
    return torch.where(torch.isfinite(values), rounded.view(torch.float32), values)


_MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64": Promoted,
    "float32": contextlib.nullcontext,
    "other order": OtherOrder,
    "tf32 products": lambda: RoundedProducts("tf32"),
    "bf16 products": lambda: RoundedProducts("bf16"),
    "bf16x3 products": lambda: RoundedProducts("bf16x3"),
}


def ways_for(dtype: str, accelerators: bool) -> tuple[str, ...]:
    """Names of the ways in which a reference is computed again; the first is in a wider type.

    Args:
      dtype: of the reference: ``float32``, ``bfloat16`` or ``float16``.
      accelerators: also as accelerators multiply float32.
    """
    if dtype != "float32":
        return ("float32", "other order")
    return ("float64", "other order", *(("tf32 products", "bf16 products", "bf16x3 products") if accelerators else ()))


def computing(way: str) -> contextlib.AbstractContextManager[Any]:
    """What to run a model in for a way; its weights and inputs have to be of the way's type (``type_of``)."""
    return _MODES[way]()


def type_of(way: str, dtype: str) -> str:
    """The type that a way computes in.

    Args:
      way: see ``ways_for``.
      dtype: of the reference.
    """
    return way if way in ("float64", "float32") else dtype
