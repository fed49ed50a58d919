"""The ways in which feed-forward blocks and residual sums go wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxmllm.validation.diagnosis.attention_parts import linear_of
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.hypotheses import Change, setting
from jaxmllm.validation.diagnosis.parts import ACTIVATIONS, FeedForward, Linear, Product, rounding

_MLP = "jaxmllm.models.layers.GatedMlp, Mlp"
_ACT = "config: hidden_act; jaxmllm.models.layers.ACTIVATIONS"
_SUM = "the residual sum of the layer"


def _gated(change: Any) -> Any:
    return lambda part: None if part.gate is None else change(part)


def _mapped(side: str, change: Any) -> Any:
    """A change of the map ``gate``, ``up`` or ``down``."""

    def apply(part: FeedForward) -> FeedForward | None:
        now = getattr(part, side)
        if now is None:
            return None
        changed = change(now) if isinstance(now, Linear) else now.by(change(now.linear))
        return None if changed is None else dataclasses.replace(part, **{side: changed})

    return apply


def _all_rounded(kind: str) -> Any:
    """All products with operands rounded."""

    def apply(part: FeedForward) -> FeedForward:
        narrow = rounding(kind)
        gate = None if part.gate is None else Product(part.gate.x, narrow(part.gate.linear))
        up = Product(part.up.x, narrow(part.up.linear))
        return dataclasses.replace(part, up=up, gate=gate, down=narrow(part.down))

    return apply


def feed_forward_changes(activation: str) -> tuple[Change, ...]:
    """Changes of a feed-forward block with that activation."""
    others = [name for name in ACTIVATIONS if ACTIVATIONS[name] is not ACTIVATIONS[activation] and name != "gelu_new"]
    return (
        Change(
            "gate and up swapped",
            _gated(lambda part: dataclasses.replace(part, gate=part.up, up=part.gate)),
            f"mlp/gate, mlp/up; {_MLP}",
            both_ways=True,
        ),
        *(setting(f"activation {name} instead of {activation}", _ACT, activation=name) for name in others),
        Change("activation on up instead of gate", _gated(lambda part: dataclasses.replace(part, act_on="up")), _MLP),
        Change(
            "activation on the product of gate and up",
            _gated(lambda part: dataclasses.replace(part, act_on="product")),
            _MLP,
        ),
        Change(
            "gate not multiplied with up (product missing)",
            _gated(lambda part: dataclasses.replace(part, gated=False)),
            _MLP,
        ),
        *(
            Change(f"{side} bias dropped", _mapped(side, lambda linear: linear.without_bias), f"mlp/{side}/bias")
            for side in ("gate", "up", "down")
        ),
        *(
            Change(
                f"{side} kernel transposed",
                _mapped(side, lambda linear: linear.transposed),
                f"mlp/{side}/kernel",
                both_ways=True,
            )
            for side in ("down", "up", "gate")
        ),
        *(
            Change(f"feed-forward products of operands rounded to {kind}", _all_rounded(kind), "matmul precision")
            for kind in ("bfloat16", "float16", "tf32")
        ),
        *(
            setting(f"hidden numbers of the feed-forward block rounded to {kind}", _MLP, round_hidden=kind)
            for kind in ("bfloat16", "float16")
        ),
    )


RESIDUAL_CHANGES = (
    setting("residual missing", _SUM, gain=0.0),
    setting("residual added twice", _SUM, gain=2.0),
    Change(
        "residual of the normed input",
        lambda part: None if part.normed is None else dataclasses.replace(part, x=part.normed),
        _SUM,
    ),
    setting("block's output not added", _SUM, added_gain=0.0),
    setting("block's output added twice", _SUM, added_gain=2.0),
    setting("block's output subtracted", _SUM, added_gain=-1.0),
    setting("residual sum halved", _SUM, gain=0.5, added_gain=0.5),
    setting("residual sum over the square root of two", _SUM, gain=0.5**0.5, added_gain=0.5**0.5),
    setting("block's output halved", _SUM, added_gain=0.5),
)


def feed_forward_of(
    case: Case, x: np.ndarray, path: str, activation: str, columns: np.ndarray | None = None
) -> FeedForward | None:
    """A feed-forward block with the port's weights; ``None`` where they are not at hand."""
    gate, up, down = (linear_of(case, f"{path}/{side}") for side in ("gate", "up", "down"))
    if up is None or down is None:
        return None
    return FeedForward(Product(x, up), down, activation, None if gate is None else Product(x, gate), columns=columns)
