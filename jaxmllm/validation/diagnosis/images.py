"""Hypotheses of the connector, and of the places of image tokens in the prompts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from jaxmllm.validation.diagnosis.attention_parts import linear_of
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.feed_forward import feed_forward_changes
from jaxmllm.validation.diagnosis.hypotheses import Change, Study, Variation, setting, study, vary
from jaxmllm.validation.diagnosis.norms import norm_changes, norm_of
from jaxmllm.validation.diagnosis.parts import FeedForward, Linear, Norm, Product, rounding
from jaxmllm.validation.diagnosis.sample import Sample, draw
from jaxmllm.validation.diagnosis.token_order import exchanged, image_counts
from jaxmllm.validation.diagnosis.vision import epsilon_of, few_pictures, is_qwen

_PLACE = "jaxmllm.models.images.place_images"


def connector_study(case: Case) -> Study | None:
    """Hypotheses of ``connector``; ``None`` where what it starts from is not at hand."""
    if is_qwen(case.config):
        return _merger(case)
    return _projection(case) if hasattr(case.config, "qformer") else _projector(few_pictures(case))


def _rounded(kind: str) -> Callable[[Product], Product | None]:
    return lambda part: part.by(rounding(kind)(part.linear))


def _projection(case: Case) -> Study | None:
    """InstructBLIP's one linear map of the query tokens."""
    states = case.read(f"qformer.{case.config.qformer.num_layers - 1}.resid_post")
    linear, sample = linear_of(case, "projection"), draw(case)
    if states is None or linear is None:
        return None
    part = Product(sample.rows_of(states[:, : case.config.num_query_tokens]), linear)
    changes = (
        Change("projection bias dropped", lambda part: part.by(part.linear.without_bias), "projection/bias"),
        Change("projection kernel transposed", lambda part: part.by(part.linear.transposed), "projection/kernel", True),
        *(
            Change(
                f"projection: product of operands rounded to {kind}",
                _rounded(kind),
                "matmul precision",
            )
            for kind in ("bfloat16", "float16", "tf32")
        ),
    )
    return study(sample, part, changes, lambda part: part.array)


def _projector(case: Case) -> Study | None:
    """LLaVA's two linear maps, ViP-LLaVA's norm before them."""
    features, sample = case.read("vision.features"), draw(case, columns=True)
    up, down = linear_of(case, "projector/up"), linear_of(case, "projector/down")
    if features is None or up is None or down is None:
        return None
    x = sample.rows_of(features)
    epsilon = getattr(case.config, "projector_norm_eps", 1e-5)
    norm = norm_of(case, x, "projector_norm", epsilon, True)
    return _mlp_study(case, sample, norm, x, (up, down), case.config.projector_act, "config: projector_norm_eps")


def _mlp_study(
    case: Case, sample: Sample, norm: Norm | None, x: np.ndarray, maps: tuple[Linear, Linear], act: str, where: str
) -> Study:
    """Two linear maps with an activation between them, after a norm where there is one."""
    up, down = maps

    def block(x: np.ndarray) -> FeedForward:
        return FeedForward(Product(x.reshape(*x.shape[:2], -1), up), down, act, columns=sample.columns)

    plain = block(x if norm is None else norm())
    variations = vary(plain, feed_forward_changes(act), lambda part: part())
    if norm is not None:
        # the norm's epsilon cannot be solved for here: what it gives is not seen by itself
        changes = norm_changes(norm, dataclasses.replace(sample, got=sample.got[..., :0]), where)
        variations = (*vary(norm, changes, lambda part: block(part())()), *variations)
    if not is_qwen(case.config):
        return Study(sample, plain, variations)
    return Study(sample, plain, (*variations, *_group_orders(plain, case.config.vision.merge, block)))


def _group_orders(plain: FeedForward, merge: int, block: Callable[[np.ndarray], FeedForward]) -> list[Variation]:
    """Other orders of the patches that make an image token."""
    wide = plain.up.x.reshape(*plain.up.x.shape[:2], merge**2, -1)
    squares = np.arange(merge**2).reshape(merge, merge)
    orders = {
        "column by column (transposed)": squares.T.ravel(),
        "in reverse": squares.ravel()[::-1],
        "with rows swapped": squares[::-1].ravel(),
        "with columns swapped": squares[:, ::-1].ravel(),
    }
    where = "jaxmllm.models.qwen_vision.Merger"
    found = [
        Variation(
            Change(f"patches of a merged group {name}", lambda part: part, where),
            lambda order=order: block(wide[:, :, order])(),  # type: ignore[misc]
        )
        for name, order in orders.items()
    ]
    inside = Change("patches of a merged group interleaved by feature", lambda part: part, where)
    return [*found, Variation(inside, lambda: block(wide.swapaxes(2, 3))())]


def _merger(case: Case) -> Study | None:
    """Qwen's norm and two linear maps over squares of patches."""
    vision = case.config.vision
    states = case.read(f"vision.{vision.num_layers - 1}.resid_post")
    up, down = linear_of(case, "vision/merger/mlp/up"), linear_of(case, "vision/merger/mlp/down")
    sample = draw(case, columns=True)
    square = vision.merge**2
    if states is None or up is None or down is None or len(states) < square * (int(sample.positions.max()) + 1):
        return None
    groups = states.reshape(1, -1, square, states.shape[-1])[:, sample.positions].astype(np.float64)
    epsilon, centred, where = epsilon_of(case.config)
    norm = norm_of(case, groups, "vision/merger/norm", epsilon, centred)
    if norm is None:
        return None
    study = _mlp_study(case, sample, norm, groups, (up, down), "gelu", where)
    joined = Change("merger's norm over whole groups", lambda part: part, "jaxmllm.models.qwen_vision.Merger")
    wide = groups.reshape(*groups.shape[:2], -1)
    bias = None if norm.bias is None else np.tile(norm.bias, square)
    late = dataclasses.replace(norm, x=wide, scale=np.tile(norm.scale, square), bias=bias)

    def after() -> np.ndarray:
        return FeedForward(Product(late(), up), down, "gelu", columns=sample.columns)()

    return dataclasses.replace(study, variations=(*study.variations, Variation(joined, after)))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token embeddings with image tokens in their places.

    Attributes:
      text: ``[B, S, D]``; ``tokens`` of all images ``[N, D]``.
      image: ``[B, S]``, the placeholders.
      shift: places by which image tokens are moved.
      text_gain: of token embeddings; ``image_gain`` of image tokens.
    """

    text: np.ndarray
    tokens: np.ndarray
    image: np.ndarray
    shift: int = 0
    text_gain: float = 1.0
    image_gain: float = 1.0

    def __call__(self) -> np.ndarray:
        out = self.text_gain * self.text
        if not len(self.tokens):
            return out
        number = (np.cumsum(self.image.ravel()) - 1).reshape(self.image.shape)
        placed = self.tokens[np.clip(number - self.shift, 0, len(self.tokens) - 1)]
        return np.where(self.image[..., None], self.image_gain * placed, out)


def _reordered(order: np.ndarray) -> Callable[[Prompt], Prompt]:
    return lambda part: dataclasses.replace(part, tokens=part.tokens[order])


def embedding_study(case: Case) -> Study | None:
    """Hypotheses of ``embedding``; ``None`` where what it starts from is not at hand."""
    table = case.leaf("decoder/embed/embedding")
    if table is None:
        return None
    ids = np.asarray(case.inputs["input_ids"])
    tokens, sample, width = case.read("image_tokens"), draw(case), table.shape[-1]
    part = Prompt(
        table[ids].astype(np.float64),
        np.zeros((0, width)) if tokens is None else tokens.astype(np.float64),
        ids == case.config.image_token_id,
    )
    if part.image.any() and len(part.tokens) != part.image.sum():
        return None
    changes = [
        *(setting(f"image tokens placed {by} place(s) late", _PLACE, shift=by) for by in (1, 2)),
        *(setting(f"image tokens placed {by} place(s) early", _PLACE, shift=-by) for by in (1, 2)),
        Change(
            "image tokens in reverse order", lambda part: dataclasses.replace(part, tokens=part.tokens[::-1]), _PLACE
        ),
        Change(
            "image tokens not placed (placeholders' own embedding)",
            lambda part: dataclasses.replace(part, tokens=part.tokens[:0]),
            _PLACE,
        ),
        setting("token embedding scaled by the root of D", "jaxmllm.models.forward.embed", text_gain=width**0.5),
        setting(
            "embedding of text and images scaled by the root of D",
            "jaxmllm.models.forward.embed",
            text_gain=width**0.5,
            image_gain=width**0.5,
        ),
        setting("image tokens missing (zeros)", _PLACE, image_gain=0.0),
    ]
    counts = image_counts(case, len(part.tokens)) if len(part.tokens) else np.zeros(0, int)
    starts = np.cumsum(counts) - counts
    pieces = [start + np.arange(count) for start, count in zip(starts, counts, strict=True)]
    for by, word in ((1, "late"), (-1, "early")):
        order = np.concatenate([np.roll(piece, by) for piece in pieces]) if pieces else np.zeros(0, int)
        changes.append(Change(f"tokens of every image one place {word} within it", _reordered(order), _PLACE))
    for one, other in itertools.combinations(range(min(len(pieces), 6)), 2):
        order = np.concatenate(exchanged(pieces, one, other))
        changes.append(
            Change(
                f"images {one} and {other} exchanged",
                _reordered(order),
                _PLACE,
            )
        )
    return study(sample, part, changes, lambda part: sample.rows_of(part()))
