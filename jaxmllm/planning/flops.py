"""Floating-point operations of a traced program, counted before any compiler sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend

Count = Callable[[Any, int], float]


def count_flops(jaxpr: Any, steps: int = 1) -> float:
    """Operations of all products of matrices, over all devices; loops are multiplied out.

    Of a branch the most expensive side counts. A kernel's body counts once for each cell of its grid, also where a mask
    lets it skip the cell.

    Args:
      jaxpr: of the program.
      steps: trips of loops whose length is data.
    """
    counted = (_of_products(equation) + _inside(equation, steps, count_flops) for equation in jaxpr.eqns)
    return sum(counted, 0.0)


def kernel_flops(jaxpr: Any, steps: int = 1) -> float:
    """The part of ``count_flops`` that lies in Pallas kernels, which XLA does not look into."""
    counted = (
        _inside(equation, steps, count_flops if equation.primitive.name == "pallas_call" else kernel_flops)
        for equation in jaxpr.eqns
    )
    return sum(counted, 0.0)


def _of_products(equation: Any) -> float:
    """2 for each multiplication of a ``dot_general`` or convolution."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out = params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]
    return 0.0


def _inside(equation: Any, steps: int, count: Count) -> float:
    """What ``count`` finds in the programs that an equation runs."""
    params = equation.params
    match equation.primitive.name:
        case "cond":
            return max(count(branch.jaxpr, steps) for branch in params["branches"])
        case "scan":
            return params["length"] * count(params["jaxpr"].jaxpr, steps)
        case "while":
            return steps * count(params["body_jaxpr"].jaxpr, steps)
        case "shard_map":
            return params["mesh"].size * count(params["jaxpr"], steps)
        case "pallas_call":
            return math.prod(params["grid_mapping"].grid) * count(params["jaxpr"], steps)
    return sum((count(inner, steps) for inner in _programs(params)), 0.0)


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, jax.extend.core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, jax.extend.core.Jaxpr):
                yield part
