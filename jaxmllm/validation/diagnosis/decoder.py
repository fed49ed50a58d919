"""Hypotheses of a decoder layer's sites, of the final norm and of the logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from jaxmllm.validation.components import FAINT
from jaxmllm.validation.diagnosis.attention import study_out, study_projected, study_weights
from jaxmllm.validation.diagnosis.attention_parts import Attention, Output, few_heads, linear_of
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.feed_forward import RESIDUAL_CHANGES, feed_forward_changes, feed_forward_of
from jaxmllm.validation.diagnosis.hypotheses import Change, Study, Variation, setting, study
from jaxmllm.validation.diagnosis.norms import norm_of, study_norm
from jaxmllm.validation.diagnosis.parts import Linear, Mask, Norm, Product, Projection, Residual, rounded, rounding
from jaxmllm.validation.diagnosis.rotary import rotary_of
from jaxmllm.validation.diagnosis.sample import Sample, draw

_LAYER = "decoder/layers"
_CALL = "jaxmllm.models.decoder.DecoderLayer.__call__"
_EPSILON = "config: text.rms_norm_eps"
_HEAD = "jaxmllm.models.decoder.Decoder.read, logits"
_TIED = f"config: text.tie_word_embeddings; {_HEAD}"


def decoder_study(case: Case) -> Study | None:
    """The hypotheses of a component of the decoder; ``None`` where what they start from is not at hand."""
    build = _SITES.get(case.site.removesuffix("~faint"))
    return None if build is None else build(case)


def _norm(case: Case, x: np.ndarray, path: str, other: str | None = None) -> Norm | None:
    scale = FAINT if case.site.endswith("~faint") else 1.0
    return norm_of(case, x * scale, path, case.config.text.rms_norm_eps, False, other)


def _attention_norm(case: Case, rows: Callable[[np.ndarray], np.ndarray]) -> Norm | None:
    """The first norm of the layer, of some rows of what enters it."""
    entering = case.read(case.sibling("resid_pre"))
    if entering is None:
        return None
    return _norm(case, rows(entering), f"{_LAYER}/attention_norm", f"{_LAYER}/mlp_norm")


def _attn_in(case: Case) -> Study | None:
    sample = draw(case)
    norm = _attention_norm(case, sample.rows_of)
    return None if norm is None else study_norm(norm, sample, _EPSILON)


def _mlp_in(case: Case) -> Study | None:
    sample = draw(case)
    middle = case.read(case.sibling("resid_mid"))
    if middle is None:
        return None
    norm = _norm(case, sample.rows_of(middle), f"{_LAYER}/mlp_norm", f"{_LAYER}/attention_norm")
    if norm is None:
        return None
    found = study_norm(norm, sample, _EPSILON)
    others = tuple(
        Variation(Change(name, lambda part: part, _CALL), functools.partial(_of, case, sample, norm, site))
        for name, site in (
            ("norm of the stream before attention (attention and feed-forward block in parallel)", "resid_pre"),
            ("norm of what attention adds, without the residual", "attn_out"),
        )
    )
    return dataclasses.replace(found, variations=(*found.variations, *others))


def _of(case: Case, sample: Sample, norm: Norm, site: str) -> np.ndarray | None:
    """A norm of another site of the layer."""
    array = case.read(case.sibling(site))
    if array is None:
        return None
    scale = FAINT if case.site.endswith("~faint") else 1.0
    return dataclasses.replace(norm, x=sample.rows_of(array) * scale)()


def _attention(
    case: Case, sample: Sample, heads: np.ndarray, kv_heads: np.ndarray, every_key: bool
) -> Attention | None:
    """The layer's attention; keys at the sampled rows alone where nothing else needs them."""
    norm = _attention_norm(case, lambda entering: np.asarray(entering, np.float64))
    apart = (linear_of(case, f"{_LAYER}/attention/{side}") for side in ("query", "key", "value"))
    maps = [each for each in apart if each is not None]
    if norm is None or len(maps) < 3:
        return None
    text, normed = case.config.text, norm()
    rows = normed[:, sample.positions]
    query, key, value = (
        Projection(x, linear, chosen, count, text.head_dim)
        for x, linear, chosen, count in zip(
            (rows, *[normed if every_key else rows] * 2),
            maps,
            (heads, kv_heads, kv_heads),
            (text.num_heads, text.num_kv_heads, text.num_kv_heads),
            strict=True,
        )
    )
    group = text.num_heads // text.num_kv_heads
    source = np.searchsorted(kv_heads, heads // group)
    valid = np.asarray(case.inputs["attention_mask"]).astype(bool)
    window = None if text.windows is None or case.layer is None else text.windows[case.layer]
    mask = Mask(valid, causal=0, window=window)
    rotary = rotary_of(case)
    return Attention(
        query, key, value, mask, sample.positions, source, text.head_dim**-0.5, turn_query=rotary, turn_key=rotary
    )


def _projected(case: Case) -> Study | None:
    sample, text = draw(case), case.config.text
    attention = _attention(case, sample, np.arange(text.num_heads), np.arange(text.num_kv_heads), False)
    return None if attention is None else study_projected(attention, sample, case.site.removesuffix("s"))


def _attn_probs(case: Case) -> Study | None:
    sample, text = draw(case, axis=2), case.config.text
    heads, kv_heads = few_heads(case, sample, text.num_heads, text.num_kv_heads)
    sample = dataclasses.replace(
        sample, got=sample.got[:, heads], expected=sample.expected[:, heads], mask=sample.mask[:, heads]
    )
    attention = _attention(case, sample, heads, kv_heads, True)
    return None if attention is None else study_weights(attention, sample)


def _attn_out(case: Case) -> Study | None:
    sample, text = draw(case, columns=True), case.config.text
    attention = _attention(case, sample, np.arange(text.num_heads), np.arange(text.num_kv_heads), True)
    out = linear_of(case, f"{_LAYER}/attention/out")
    return None if attention is None or out is None else study_out(Output(attention, out, sample.columns), sample)


def _residual(stream: str, added: str, normed: str) -> Callable[[Case], Study | None]:
    def build(case: Case) -> Study | None:
        sample = draw(case)
        parts = [case.read(case.sibling(site)) for site in (stream, added, normed)]
        if parts[0] is None or parts[1] is None:
            return None
        x, more, inner = (None if part is None else sample.rows_of(part) for part in parts)
        assert x is not None and more is not None
        return study(sample, Residual(x, more, inner), RESIDUAL_CHANGES)

    return build


def _mlp_out(case: Case) -> Study | None:
    sample = draw(case, columns=True)
    entering = case.read(case.sibling("mlp_in"))
    if entering is None:
        return None
    act = case.config.text.hidden_act
    block = feed_forward_of(case, sample.rows_of(entering), f"{_LAYER}/mlp", act, sample.columns)
    return None if block is None else study(sample, block, feed_forward_changes(act))


def _final_norm(case: Case) -> Study | None:
    sample = draw(case)
    last = case.read(f"decoder.{case.config.text.num_layers - 1}.resid_post")
    if last is None:
        return None
    norm = _norm(case, sample.rows_of(last), "decoder/norm")
    return None if norm is None else study_norm(norm, sample, _EPSILON)


@dataclasses.dataclass(frozen=True)
class Head:
    """Logits of what the head reads.

    Attributes:
      read: normed states at the sampled rows, through the head.
      embedding, kernel: the token embedding as a head, and the head's own kernel, if they are at hand.
      gain: of the logits.
      round_out: what logits are rounded to.
    """

    read: Product
    embedding: Linear | None
    kernel: Linear | None
    gain: float = 1.0
    round_out: str | None = None

    def __call__(self) -> np.ndarray:
        return rounded(self.gain * self.read.array, self.round_out)


def _mapping(linear: Callable[[Head], Linear | None]) -> Callable[[Head], Head | None]:
    """Another head."""

    def apply(part: Head) -> Head | None:
        other = part.read.by(linear(part))
        return None if other is None else dataclasses.replace(part, read=other)

    return apply


def _rounding(kind: str) -> Callable[[Head], Linear]:
    return lambda part: rounding(kind)(part.read.linear)


HEAD_CHANGES = (
    Change("head is not the token embedding (not tied)", _mapping(lambda part: part.kernel), _TIED),
    Change(
        "head is the token embedding (tied)",
        _mapping(lambda part: part.embedding),
        _TIED,
    ),
    Change(
        "head kernel transposed",
        _mapping(lambda part: part.read.linear.transposed),
        "decoder/head/kernel",
        both_ways=True,
    ),
    Change(
        "logits scaled by D ** -0.5", lambda part: dataclasses.replace(part, gain=part.read.x.shape[-1] ** -0.5), _HEAD
    ),
    Change(
        "logits scaled by D ** 0.5", lambda part: dataclasses.replace(part, gain=part.read.x.shape[-1] ** 0.5), _HEAD
    ),
    *(
        change
        for kind in ("bfloat16", "float16", "tf32")
        for change in (
            setting(f"logits in {kind} (rounded)", _HEAD, round_out=kind),
            Change(
                f"head: product of operands rounded to {kind}",
                _mapping(_rounding(kind)),
                "matmul precision",
            ),
        )
    ),
)


def _logits(case: Case) -> Study | None:
    sample, text = draw(case, columns=True), case.config.text
    normed = case.read("final_norm")
    table, kernel = case.leaf("decoder/embed/embedding"), case.leaf("decoder/head/kernel")
    embedding = None if table is None else Linear(table.T).columns(sample.columns)
    head = None if kernel is None else Linear(kernel).columns(sample.columns)
    plain = embedding if text.tie_word_embeddings or head is None else head
    if normed is None or plain is None:
        return None
    part = Head(Product(sample.rows_of(normed), plain), embedding, head)
    return study(sample, part, (*_other_states(case, sample, normed), *HEAD_CHANGES))


def _other_states(case: Case, sample: Sample, normed: np.ndarray) -> tuple[Change, ...]:
    """The head reads other states than it should."""
    count = case.config.text.num_layers

    def norm(states: np.ndarray | None) -> np.ndarray | None:
        part = None if states is None else _norm(case, sample.rows_of(states), "decoder/norm")
        return None if part is None else part()

    def moved(by: int) -> np.ndarray | None:
        return None if case.rows is not None else sample.rows_of(np.roll(normed, by, axis=1))

    def unnormed() -> np.ndarray | None:
        last = case.read(f"decoder.{count - 1}.resid_post")
        return None if last is None else sample.rows_of(last)

    def reading(states: Callable[[], np.ndarray | None]) -> Callable[[Head], Head | None]:
        def apply(part: Head) -> Head | None:
            other = states()
            return None if other is None else dataclasses.replace(part, read=Product(other, part.read.linear))

        return apply

    at = "logits_at: jaxmllm.models.forward.run"
    return (
        Change("final norm missing", reading(unnormed), _HEAD),
        Change("final norm applied twice", reading(lambda: norm(normed)), _HEAD),
        Change("the head reads the position before (rows shifted by one)", reading(lambda: moved(1)), at),
        Change("the head reads the position after (rows shifted by one)", reading(lambda: moved(-1)), at),
        *(
            Change(
                f"the head reads layer {layer} (as the logit lens does)",
                reading(lambda layer=layer: norm(case.read(f"decoder.{layer}.resid_post"))),  # type: ignore[misc]
                _HEAD,
            )
            for layer in range(count - 1)
        ),
    )


_SITES: dict[str, Callable[[Case], Study | None]] = {
    "attn_in": _attn_in,
    "keys": _projected,
    "values": _projected,
    "attn_probs": _attn_probs,
    "attn_out": _attn_out,
    "resid_mid": _residual("resid_pre", "attn_out", "attn_in"),
    "mlp_in": _mlp_in,
    "mlp_out": _mlp_out,
    "resid_post": _residual("resid_mid", "mlp_out", "mlp_in"),
    "final_norm": _final_norm,
    "logits": _logits,
}
