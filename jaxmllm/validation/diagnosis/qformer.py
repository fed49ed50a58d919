"""Hypotheses of the Q-Former's layers: attention and feed-forward blocks with a norm after the residual sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmllm.validation.diagnosis.attention import study_out
from jaxmllm.validation.diagnosis.attention_parts import Attention, Output, linear_of
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.feed_forward import feed_forward_changes, feed_forward_of
from jaxmllm.validation.diagnosis.hypotheses import Change, Study, Variation, setting, study, vary
from jaxmllm.validation.diagnosis.norms import norm_changes, norm_of
from jaxmllm.validation.diagnosis.parts import Mask, Norm, Projection
from jaxmllm.validation.diagnosis.sample import Sample, draw

_POST = "jaxmllm.models.qformer.FeedForward (norm after the residual sum)"
_EPSILON = "config: qformer.layer_norm_eps"
_LOOK = "jaxmllm.models.qformer.QFormer.look; config: qformer.cross_attention_frequency"


def qformer_study(case: Case) -> Study | None:
    """The hypotheses of a site of a layer; ``None`` where what they start from is not at hand."""
    build = _SITES.get(case.site)
    return None if build is None else build(case)


def _attended(case: Case, x: np.ndarray, source: np.ndarray, mask: Mask, path: str, sample: Sample) -> Study | None:
    """Attention of ``x`` to a source, the residual sum and the norm after it."""
    maps = [linear_of(case, f"{path}/{side}") for side in ("query", "key", "value", "out")]
    if any(each is None for each in maps):
        return None
    query, key, value, out = (each for each in maps if each is not None)
    count = case.config.qformer.num_heads
    width, heads, rows = out.kernel.shape[0] // count, np.arange(count), x[:, sample.positions]
    attention = Attention(
        Projection(rows, query, heads, count, width),
        Projection(source, key, heads, count, width),
        Projection(source, value, heads, count, width),
        mask,
        sample.positions,
        heads,
        width**-0.5,
    )
    inner = study_out(Output(attention, out), sample)
    return _after(case, rows, inner, f"{path}/norm", sample)


def _after(case: Case, x: np.ndarray, inner: Study, path: str, sample: Sample) -> Study | None:
    """A block's study with the residual sum and the norm behind it."""
    norm = norm_of(case, x, path, case.config.qformer.layer_norm_eps, True)
    if norm is None:
        return None

    def finish(added: np.ndarray | None) -> np.ndarray | None:
        return None if added is None else dataclasses.replace(norm, x=x + added)()

    inside = tuple(
        Variation(each.change, lambda each=each: finish(each.compute()))  # type: ignore[misc]
        for each in inner.variations
    )
    plain = dataclasses.replace(norm, x=x + inner.correct())
    without = Change("residual missing", lambda part: dataclasses.replace(part, x=part.x - x), "the residual sum")
    before = Change("norm before the residual sum", lambda part: _before(part, x), "the layer's post-norm")
    outside = vary(plain, (without, before, *norm_changes(plain, sample, _EPSILON)), lambda part: part())
    return Study(sample, plain, (*outside, *inside))


def _before(part: Norm, x: np.ndarray) -> Norm:
    """The norm of what is added alone, and the residual outside of it, which only the bias can hold."""
    return dataclasses.replace(part, x=part.x - x, bias=x + (0.0 if part.bias is None else part.bias))


def _attn_out(case: Case) -> Study | None:
    sample, x = draw(case), case.read(case.sibling("resid_pre"))
    if x is None:
        return None
    words = np.asarray(case.inputs["qformer_attention_mask"]).astype(bool)
    queries = np.ones((len(words), x.shape[1] - words.shape[1]), bool)
    mask = Mask(np.concatenate([queries, words], axis=1))
    wide = x.astype(np.float64)
    return _attended(case, wide, wide, mask, "qformer/layers/attention", sample)


def _cross_out(case: Case) -> Study | None:
    sample, x, source = draw(case), case.read(case.sibling("attn_out")), case.read("vision.features")
    if x is None or source is None:
        return None
    mask = Mask(np.ones(source.shape[:2], bool))
    asking, source = x[:, : case.got.shape[1]].astype(np.float64), source.astype(np.float64)
    found = _attended(case, asking, source, mask, "qformer/cross", sample)
    if found is None:
        return None
    skipped = Change("cross-attention missing in this layer", lambda part: part, _LOOK)
    return dataclasses.replace(
        found, variations=(Variation(skipped, lambda: asking[:, sample.positions]), *found.variations)
    )


def _resid_post(case: Case) -> Study | None:
    """Query tokens and words each have a feed-forward block; the side that differs more is looked at."""
    attended, asked = case.read(case.sibling("attn_out")), case.read(case.sibling("cross_out"))
    if attended is None:
        return None
    entering = attended.astype(np.float64)
    queries = case.config.num_query_tokens
    if asked is not None:
        entering[:, :queries] = asked
    gap = np.abs(case.got.astype(np.float64) - case.expected)
    words = gap[:, queries:].sum() > gap[:, :queries].sum()
    side = slice(queries, None) if words else slice(0, queries)
    own, other = ("text_mlp", "query_mlp") if words else ("query_mlp", "text_mlp")
    mask = np.broadcast_to(case.mask if case.mask.ndim > 1 else case.mask[:, None], case.got.shape[:2])
    part = dataclasses.replace(case, got=case.got[:, side], expected=case.expected[:, side], mask=mask[:, side])
    sample = draw(part)
    x, act = entering[:, side][:, sample.positions], case.config.qformer.hidden_act

    def block(name: str) -> Study | None:
        feed = feed_forward_of(case, x, f"qformer/layers/{name}/mlp", act)
        if feed is None:
            return None
        path = f"qformer/layers/{name}"
        inner = Study(sample, feed, vary(feed, feed_forward_changes(act), lambda part: part()))
        found = _after(case, x, inner, f"{path}/norm", sample)
        norm = norm_of(case, x, f"{path}/norm", case.config.qformer.layer_norm_eps, True)
        if found is None or norm is None:
            return None

        def ahead() -> np.ndarray:
            normed = feed_forward_of(case, norm(), f"{path}/mlp", act)
            assert normed is not None  # its weights are those of ``feed``
            return x + normed()

        change = Change("norm before the feed-forward block instead of behind it", lambda part: part, _POST)
        return dataclasses.replace(found, variations=(Variation(change, ahead), *found.variations))

    found, swapped = block(own), block(other)
    if found is None or swapped is None:
        return found
    change = Change(
        "feed-forward blocks of query tokens and words swapped",
        lambda part: part,
        "qformer/layers/query_mlp, text_mlp",
        both_ways=True,
    )
    return dataclasses.replace(found, variations=(Variation(change, swapped.correct), *found.variations))


@dataclasses.dataclass(frozen=True)
class Words:
    """Query tokens and the instruction's words, normed.

    Attributes:
      queries: ``[I, N, D]``; ``words`` ``[I, Q, D]`` of the instruction.
      places: what is added to the words ``[Q, D]``.
      query_places: whether query tokens get positions too, from the first on.
    """

    queries: np.ndarray
    words: np.ndarray
    places: np.ndarray
    norm: Norm
    query_places: bool = False

    def __call__(self) -> np.ndarray:
        queries = self.queries + (self.places[: self.queries.shape[1]] if self.query_places else 0.0)
        both = np.concatenate([queries, self.words + self.places[: self.words.shape[1]]], axis=1)
        return dataclasses.replace(self.norm, x=both)()


def words_study(case: Case) -> Study | None:
    """Hypotheses of ``qformer.embed``; ``None`` where the weights are not at hand."""
    names = ("query_tokens", "word_embed/embedding", "position_embed/embedding")
    queries, table, places = (case.leaf(f"qformer/{name}") for name in names)
    sample = draw(case)
    if queries is None or table is None or places is None:
        return None
    ids = np.asarray(case.inputs["qformer_input_ids"])
    width = table.shape[-1]
    norm = norm_of(case, np.zeros((1, width)), "qformer/norm", case.config.qformer.layer_norm_eps, True)
    if norm is None:
        return None
    tokens = np.broadcast_to(queries.astype(np.float64), (len(ids), *queries.shape[-2:]))
    part = Words(tokens, table[ids].astype(np.float64), places.astype(np.float64), norm)
    where = "qformer/position_embed; jaxmllm.models.qformer.QFormer.embed"
    normed = tuple(
        setting(each.name, each.where, norm=changed)
        for each in norm_changes(norm, sample, _EPSILON)
        if (changed := each.apply(norm)) is not None
    )
    changes = (
        Change("positions of words missing", lambda part: dataclasses.replace(part, places=0 * part.places), where),
        Change(
            "positions of words off by one (one too high)",
            lambda part: dataclasses.replace(part, places=np.roll(part.places, -1, axis=0)),
            where,
        ),
        Change(
            "positions of words counted on from the query tokens",
            lambda part: dataclasses.replace(part, places=np.roll(part.places, -part.queries.shape[1], axis=0)),
            where,
        ),
        setting("query tokens have positions", where, query_places=True),
        *normed,
    )
    return study(sample, part, changes, lambda part: sample.rows_of(part()))


_SITES: dict[str, Callable[[Case], Study | None]] = {
    "attn_out": _attn_out,
    "cross_out": _cross_out,
    "resid_post": _resid_post,
}
