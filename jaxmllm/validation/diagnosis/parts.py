"""A transformer's parts written once more, in NumPy and float64, apart from the code that is under test.

Every part is a small dataclass whose fields say how it computes, so that a mistake is one changed field. Axis letters
as in ``jaxmllm.models.layers``; R sampled rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property

import ml_dtypes
import numpy as np
from scipy.special import erf, expit

_CHUNK = 2048  # columns of a kernel that are held in float64 at a time
_TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def rounded(x: np.ndarray, kind: str | None) -> np.ndarray:
    """Numbers rounded to ``bfloat16``, ``float16``, ``float32`` or ``tf32`` (10 bits of mantissa), as float64."""
    if kind is None:
        return x
    if kind == "tf32":
        bits = np.asarray(x, np.float32).view(np.uint32)
        bits = (bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
        return bits.view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(_TYPES[kind]).astype(np.float64)


def quick_gelu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(1.702 x)``."""
    return x * expit(1.702 * x)


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    """GELU by its tanh approximation."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "relu": lambda x: np.maximum(x, 0.0),
    "sigmoid": expit,
    "none": lambda x: x,
}
# another name of the same
ACTIVATIONS["gelu_new"] = tanh_gelu


@dataclasses.dataclass(frozen=True)
class Linear:
    """``x @ kernel + bias``.

    Attributes:
      kernel: ``[in, out]``.
      bias: ``[out]``, if there is one.
      rounding: what operands are rounded to, as accelerators do; see ``rounded``.
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None
    rounding: str | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = rounded(x, self.rounding)
        size = self.kernel.shape[1]
        blocks = [
            x @ rounded(np.asarray(self.kernel[:, start : start + _CHUNK], np.float64), self.rounding)
            for start in range(0, size, _CHUNK)
        ]
        product = np.concatenate(blocks, axis=-1)
        return product if self.bias is None else product + self.bias

    def columns(self, chosen: np.ndarray | None) -> Linear:
        """The map to some of the outputs; ``None`` for all."""
        if chosen is None:
            return self
        bias = None if self.bias is None else self.bias[chosen]
        return dataclasses.replace(self, kernel=self.kernel[:, chosen], bias=bias)

    @property
    def transposed(self) -> Linear | None:
        """With a transposed kernel, where it is square."""
        rows, columns = self.kernel.shape
        return dataclasses.replace(self, kernel=self.kernel.T) if rows == columns else None

    @property
    def without_bias(self) -> Linear | None:
        """Without its bias, where it has one."""
        return None if self.bias is None else dataclasses.replace(self, bias=None)


def rounding(kind: str) -> Callable[[Linear], Linear]:
    """A map whose operands are rounded."""
    return lambda linear: dataclasses.replace(linear, rounding=kind)


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where the mean is taken off.

    Attributes:
      x: what is normed ``[..., D]``.
      scale, bias: ``[D]``; ``other`` the scale and bias of the layer's other norm.
      centred: the mean is taken off.
      passes: how often the norm is applied.
      rounding: what sums are rounded to; ``round_input`` and ``round_normed`` the same of input and normed numbers.
    """

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None
    epsilon: float
    centred: bool
    other: tuple[np.ndarray, np.ndarray | None] | None = None
    passes: int = 1
    rounding: str | None = None
    round_input: str | None = None
    round_normed: str | None = None

    def __call__(self) -> np.ndarray:
        x = rounded(self.x, self.round_input)
        for _ in range(self.passes):
            if self.centred:
                x = x - rounded(x.mean(axis=-1, keepdims=True), self.rounding)
            square = rounded(np.mean(x**2, axis=-1, keepdims=True), self.rounding)
            with np.errstate(divide="ignore", invalid="ignore"):
                x = rounded(x / np.sqrt(square + self.epsilon), self.round_normed) * self.scale
            x = x if self.bias is None else x + self.bias
        return x


@dataclasses.dataclass(frozen=True)
class Projection:
    """Queries, keys or values of some heads, before rotation.

    Attributes:
      x: ``[B, n, D]``.
      linear: to all heads.
      heads: the heads that are computed; ``count`` how many there are.
      width: E.
      width_first: whether the map's outputs are ordered by place in the head, then by head.
      shift: positions by which the result is moved along the sequence.
    """

    x: np.ndarray
    linear: Linear
    heads: np.ndarray
    count: int
    width: int
    width_first: bool = False
    shift: int = 0

    @cached_property
    def array(self) -> np.ndarray:
        """``[B, n, h, E]``."""
        inside = np.arange(self.width)
        if self.width_first:
            columns = inside * self.count + self.heads[:, None]
        else:
            columns = self.heads[:, None] * self.width + inside
        if len(self.heads) == self.count and not self.width_first:
            projected = self.linear(self.x)
        else:
            projected = self.linear.columns(columns.ravel())(self.x)
        split = projected.reshape(*self.x.shape[:2], len(self.heads), self.width)
        return np.roll(split, self.shift, axis=1) if self.shift else split


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see.

    Attributes:
      valid: ``[B, S]``, false at padding.
      causal: how many positions ahead a query may look; ``None`` where it may look at all.
      window: how many positions back it may look, itself included.
      segments: ``[B, S]``: queries see keys of their own segment alone.
    """

    valid: np.ndarray
    causal: int | None = None
    window: int | None = None
    segments: np.ndarray | None = None

    def of(self, rows: np.ndarray) -> np.ndarray:
        """``[B, R, S]`` for some queries."""
        keys = np.arange(self.valid.shape[1])
        seen = np.broadcast_to(self.valid[:, None], (len(self.valid), len(rows), len(keys)))
        if self.causal is not None:
            seen = seen & (keys <= rows[:, None] + self.causal)
        if self.window is not None:
            seen = seen & (keys > rows[:, None] - self.window)
        if self.segments is not None:
            seen = seen & (self.segments[:, rows, None] == self.segments[:, None])
        return seen


@dataclasses.dataclass(frozen=True)
class Residual:
    """What a block adds to the stream it reads.

    Attributes:
      x: the stream; ``added`` what is added to it.
      normed: what the block reads, if it is at hand.
      gain: of the stream; ``added_gain`` of what is added.
    """

    x: np.ndarray
    added: np.ndarray
    normed: np.ndarray | None = None
    gain: float = 1.0
    added_gain: float = 1.0

    def __call__(self) -> np.ndarray:
        return self.gain * self.x + self.added_gain * self.added


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear map of something, computed once."""

    x: np.ndarray
    linear: Linear

    @cached_property
    def array(self) -> np.ndarray:
        return self.linear(self.x)

    def by(self, linear: Linear | None) -> Product | None:
        """Another map of the same; ``None`` where there is none."""
        return None if linear is None else Product(self.x, linear)


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` where there is a gate.

    Attributes:
      act_on: ``gate``, ``up`` or ``product``: which of them is bent.
      gated: whether both are multiplied.
      columns: outputs that are computed; ``None`` for all.
      round_hidden: what the hidden numbers are rounded to.
    """

    up: Product
    down: Linear
    activation: str
    gate: Product | None = None
    act_on: str = "gate"
    gated: bool = True
    columns: np.ndarray | None = None
    round_hidden: str | None = None

    def __call__(self) -> np.ndarray:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = act(self.up.array)
        else:
            gate, up = self.gate.array, self.up.array
            first = act(gate) if self.act_on == "gate" else gate
            second = act(up) if self.act_on == "up" else up
            hidden = first * second if self.gated else first
            hidden = act(hidden) if self.act_on == "product" else hidden
        return self.down.columns(self.columns)(rounded(hidden, self.round_hidden))
