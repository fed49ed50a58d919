"""Interventions that both sides are asked for, as data: torch makes hooks of it, the port makes ``Edits`` of it.

Layers are chosen from the depth of the decoder. Weights and scales hold zeros, ones and what lies between.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxmllm.analysis import edits as constructors
from jaxmllm.models.edits import Edits, Hook
from jaxmllm.models.layout import Role

Kind = Literal["erase", "blind", "knockout", "review", "scale_heads", "at_site"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One intervention.

    Attributes:
      kind: ``erase``: the residual stream at image tokens is multiplied by ``1 - strength * weight`` at the input of
        each layer; ``blind``: the inputs of attention and feed-forward block are; ``knockout``: attention from queries
        to keys is multiplied by ``1 - strength`` before it is normalised; ``review``: attention from the question to
        each image token is multiplied by ``1 - strength * (1 - weight)``; ``scale_heads``: each head's output is
        multiplied by ``1 + strength * (scale - 1)``; ``at_site``: what attention or the feed-forward block adds is
        multiplied by ``strength``.
      layers: where.
      strength: how far.
      weighted: of ``erase`` and ``blind``: whether image tokens have weights (``image_weights``) or all weigh 1; the
        weights of ``review`` are always those.
      queries, keys: of a knockout.
      site: of ``at_site``: ``attn_out`` or ``mlp_out``.
    """

    kind: Kind
    layers: tuple[int, ...]
    strength: float = 1.0
    weighted: bool = False
    queries: Role = "question"
    keys: Role = "image"
    site: Literal["attn_out", "mlp_out"] = "mlp_out"


@dataclasses.dataclass(frozen=True)
class EditCase:
    """Interventions of one forward pass.

    Attributes:
      name: part of the names of what is recorded: ``edit.NAME.logits``.
      steps: what is done.
    """

    name: str
    steps: tuple[Step, ...]


def edit_cases(num_layers: int) -> tuple[EditCase, ...]:
    """The interventions on a decoder of so many layers; the last one is several at once."""
    early, middle, late = num_layers // 4, num_layers // 2, num_layers * 3 // 4
    few = tuple(range(early, middle + 1))
    deep = tuple(range(middle, num_layers))
    return (
        EditCase("erase", (Step("erase", (middle,)),)),
        EditCase("erase_in_part", (Step("erase", few, 0.6, weighted=True),)),
        EditCase("blind", (Step("blind", few),)),
        EditCase("blind_in_part", (Step("blind", deep, 0.4, weighted=True),)),
        EditCase("knockout", (Step("knockout", few),)),
        EditCase("knockout_in_part", (Step("knockout", deep, 0.7, queries="last", keys="text"),)),
        EditCase("review", (Step("review", (late,)),)),
        EditCase("review_in_part", (Step("review", (early,), 0.5),)),
        EditCase("scale_heads", (Step("scale_heads", (middle,)),)),
        EditCase("scale_heads_in_part", (Step("scale_heads", deep, 0.5),)),
        EditCase("at_site", (Step("at_site", (middle,), 0.5), Step("at_site", (late,), 0.25, site="attn_out"))),
        # the same kind twice: masks of one kind multiply
        EditCase(
            "twice",
            (
                Step("erase", (early,), 0.5),
                Step("erase", (middle,), 0.6, weighted=True),
                Step("blind", (early,), 0.4),
                Step("blind", (late,), 0.5, weighted=True),
            ),
        ),
        EditCase(
            "together",
            (
                Step("erase", (early,), 0.5),
                Step("blind", (middle,), weighted=True),
                Step("knockout", (early,), 0.5, queries="last", keys="image"),
                Step("review", deep),
                Step("scale_heads", (late,), 0.75),
                Step("at_site", (middle,), 0.5),
            ),
        ),
    )


def image_weights(num_image_tokens: int) -> np.ndarray:
    """Weights ``[N]`` of image tokens: 0, 1/4, ... 1, again and again."""
    return (np.arange(num_image_tokens) % 5 / 4).astype(np.float32)


def head_scales(num_heads: int) -> np.ndarray:
    """Factors ``[H]`` of heads: 0, 1/2, 1, 3/2, again and again."""
    return (np.arange(num_heads) % 4 / 2).astype(np.float32)


def port_edits(case: EditCase, num_heads: int, num_image_tokens: int) -> Edits:
    """A case as the port takes it.

    Args:
      case: what is done.
      num_heads: H, query heads of a layer.
      num_image_tokens: N, image tokens of the sequence that has most.
    """
    return constructors.compose(*(_port_step(step, num_heads, num_image_tokens) for step in case.steps))


def _port_step(step: Step, num_heads: int, num_image_tokens: int) -> Edits:
    layers, strength = list(step.layers), step.strength
    weights = image_weights(num_image_tokens)
    match step.kind:
        case "erase":
            return constructors.erase_image(layers, weights if step.weighted else None, strength)
        case "blind":
            return constructors.blind_image(layers, weights if step.weighted else None, strength)
        case "knockout":
            return constructors.knockout(layers, step.queries, step.keys, strength)
        case "review":
            return constructors.review_mask(layers, weights, strength)
        case "scale_heads":
            return constructors.scale_heads(layers, head_scales(num_heads), strength)
        case "at_site":
            return constructors.at_site(step.site, _scaling(step.layers, strength))


@functools.cache  # a new function would be compiled anew
def _scaling(layers: tuple[int, ...], factor: float) -> Hook:
    def scale(value: Any, layer: Any) -> Any:
        return jnp.where(jnp.isin(layer, jnp.asarray(layers)), value * factor, value)

    return scale
