"""What to look at where nothing that was tried explains a departure, and in phases that compare no arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.report import Cause

# A hint: what may be wrong, where to look.
Hint = tuple[str, str]

_NORM: tuple[Hint, ...] = (
    ("norm epsilon", "config: rms_norm_eps, layer_norm_eps"),
    ("norm scale or bias", "the norm's leaves; jaxmllm.models.layers.Builder"),
    ("statistics of the norm in half precision", "jaxmllm.models.layers.Builder.rms_norm, layer_norm"),
)
_ROTARY: tuple[Hint, ...] = (
    ("rotary base or scaling", "config: rope_theta, rope_parameters; jaxmllm.models.layers.rope_frequencies"),
    ("rotary layout (halves or neighbouring pairs)", "jaxmllm.models.layers.rotate"),
    ("position ids (padding, images)", "jaxmllm.models.layout.make_layout; jaxmllm.models.qwen2_vl.positions"),
)
_MASK: tuple[Hint, ...] = (
    (
        "causal mask, padding or sliding window",
        "jaxmllm.models.decoder.Tap.bias; jaxmllm.models.layout.Layout.may_attend",
    ),
    ("padding side", "attention_mask; jaxmllm.models.layout.make_layout"),
    ("grouping of key-value heads, scale of the scores", "jaxmllm.models.attention"),
)
_KERNELS: tuple[Hint, ...] = (("kernel or bias", "jaxmllm.convert.tables, jaxmllm.convert.names.TRANSFORMS"),)
_CROSS: tuple[Hint, ...] = (
    ("layers with cross-attention", "config: qformer_config.cross_attention_frequency; jaxmllm.models.qformer"),
)
_SUM: tuple[Hint, ...] = (("residual sum", "the layer's __call__"),)
_ACT: tuple[Hint, ...] = (("activation", "config: hidden_act; jaxmllm.models.layers.ACTIVATIONS"),)

_HINTS: Mapping[str, tuple[Hint, ...]] = {
    "attn_in": _NORM,
    "mlp_in": _NORM,
    "keys": (*_ROTARY, *_KERNELS),
    "values": _KERNELS,
    "attn_probs": (*_MASK, *_ROTARY[:1], *_KERNELS),
    "attn_out": (*_MASK, *_KERNELS),
    "cross_out": (*_CROSS, *_KERNELS, *_NORM[:1]),
    # of a layer without cross-attention nothing else shows that the port has one
    "qformer.resid_post": (*_CROSS, *_SUM, *_NORM[:1]),
    "mlp_out": (*_ACT, ("gate and up", "jaxmllm.models.layers.GatedMlp"), *_KERNELS),
    "resid_mid": _SUM,
    "resid_post": (*_SUM, *_NORM[:1]),
    "embed": (
        ("order of pixels and patches", "jaxmllm.models.vision.patchify"),
        ("position embedding, class token", "vision/position_embed, vision/class_embed"),
        *_KERNELS,
    ),
    "features": (
        ("feature layer", "config: vision_feature_layer"),
        ("class token", "config: vision_feature_select_strategy"),
        ("norm after the last block", "vision/post_norm"),
    ),
    "connector": (*_ACT, *_KERNELS, ("order of merged patches", "jaxmllm.models.qwen_vision.Merger")),
    "image_tokens": (
        ("order of tiles, newlines, unpadding", "jaxmllm.models.anyres.Tiling.order"),
        ("order of images", "jaxmllm.models.inputs"),
    ),
    "positions": _ROTARY[2:],
    "rotary": _ROTARY,
    "embedding": (
        ("places of image tokens", "config: image_token_index; jaxmllm.models.images.place_images"),
        ("token embedding", "decoder/embed/embedding"),
    ),
    "final_norm": _NORM,
    "logits": (
        ("tied head", "config: tie_word_embeddings"),
        ("final norm missing or applied twice", "jaxmllm.models.decoder.Decoder.logits"),
        *_KERNELS,
    ),
}

_PHASES: Mapping[str, tuple[tuple[str, Hint], ...]] = {
    "tensors": (
        (r"transpos", ("a kernel is not transposed at load, or twice", "jaxmllm.convert.names.TRANSFORMS")),
        (
            r"another layer|layer \d",
            ("layers are stacked in another order (sorted as text: 10 before 2)", "jaxmllm.convert.plan"),
        ),
        (r"holds|swapp|another tensor|name", ("a name leads to the wrong leaf", "jaxmllm.convert.tables")),
        (r"round|narrower|bfloat16|float16", ("weights are rounded at load", "dtype of load; jaxmllm.convert.weights")),
        (r"zero|missing|unfilled", ("a tensor is not read", "jaxmllm.convert.tables: entries, ignored")),
        (r"tied|head", ("tied head", "config: tie_word_embeddings")),
    ),
    "preprocessing": (
        (
            r"ids|token|bos|length",
            ("special tokens or expansion of the placeholder", "jaxmllm.processing.prepare; tokenizer_config.json"),
        ),
        (r"mask|pad", ("padding side", "tokenizer: padding_side; jaxmllm.processing.prepare")),
        (
            r"grid|size|shape|tile|count",
            (
                "size that images are resized to, or tiles",
                "preprocessor_config.json: size, min_pixels, max_pixels, image_grid_pinpoints",
            ),
        ),
        (r"channel|rgb|bgr", ("order of colours", "conversion to RGB: jaxmllm.processing.images")),
        (
            r"mean|std|rescale|scale",
            (
                "mean, standard deviation or rescale factor",
                "preprocessor_config.json: image_mean, image_std, rescale_factor",
            ),
        ),
        (r"pixel", ("filter of resizing, crop", "preprocessor_config.json: resample, do_center_crop")),
    ),
    "answer": (
        (
            r"",
            (
                "answer positions are off by one: a position predicts the next token",
                "jaxmllm.processing.answers; Inputs.answer_positions",
            ),
        ),
        (r"", ("log-probabilities of other tokens, or softmax in half precision", "jaxmllm.analysis.likelihood")),
        (r"length|pad|zero", ("padding of answers of unlike lengths", "jaxmllm.processing.answers")),
    ),
    "generation": (
        (
            r"first|step 0|token 0",
            (
                "the prompt's own pass: padding on the left, positions",
                "jaxmllm.models.layout.make_layout; jaxmllm.decoding.generate",
            ),
        ),
        (r"", ("places in the cache, or rotary positions of new tokens, off by one", "jaxmllm.decoding.cache")),
        (r"stop", ("stopping", "generation_config.json: eos_token_id; jaxmllm.decoding.stopping")),
    ),
    "edits": (
        (
            r"erase",
            ("the layer from which image tokens are erased, or which positions", "jaxmllm.analysis.edits; resid_pre"),
        ),
        (
            r"blind",
            (
                "a norm whose input is not hidden: both attn_in and mlp_in are blinded",
                "jaxmllm.models.decoder.BLIND_SITES",
            ),
        ),
        (
            r"knockout",
            ("which queries and keys are knocked out, and renormalisation", "jaxmllm.models.edits.knockout_bias"),
        ),
        (r"review|mask", ("layers or positions of the review mask, off by one", "jaxmllm.analysis.edits")),
        (r"scale_heads|head", ("heads are scaled before the output map", "jaxmllm.models.decoder.Tap.finish")),
        (r"at_site|hook", ("the site that a hook stands at", "jaxmllm.models.decoder.Tap.run_hooks")),
        (r"compos", ("order in which edits are composed", "jaxmllm.models.edits.resolve")),
    ),
    "contrast": (
        (
            r"hellinger|distance",
            ("root in the Hellinger distance, normalisation over image tokens", "jaxmllm.analysis.attention"),
        ),
        (r"layer|i\*", ("the layers among which the last fusion layer is looked for", "jaxmllm.analysis.attention")),
        (
            r"attention",
            ("rows, heads or image tokens of the attention that is read", "jaxmllm.models.capture; Layout.image_index"),
        ),
        (r"", ("difference of the maps: last layer minus i*", "jaxmllm.analysis.attention")),
    ),
}


def hints_for_phase(name: str, findings: Sequence[str]) -> tuple[Cause, ...]:
    """What to look at when a phase differs that is not explained by computing.

    Args:
      name: of the phase: ``tensors``, ``preprocessing``, ``answer``, ``generation``, ``edits`` or ``contrast``; others
        have no hints.
      findings: of the phase, a line each.

    Returns:
      Causes that were not tried: those whose words the findings hold, at most four; where there are none, two others.
    """
    text = "\n".join(findings).lower()
    if name == "edits" and (sure := _edit_causes(set(re.findall(r"edit\.(\w+)\.", text)))):
        return sure
    named: list[tuple[Hint, re.Match[str] | None]] = []
    other: list[tuple[Hint, re.Match[str] | None]] = []
    for words, hint in _PHASES.get(name, ()):
        found = re.search(words, text) if words else None
        (named if found else other).append((hint, found))
    causes = [
        Cause(what, f"not tried; the findings say {found[0]!r}" if found else "", None, where)
        for (what, where), found in (*named, *other)
    ]
    return tuple(causes[: len(named) or 2][:4])


# Edits that act in whole, each with a case that acts in part.
_WHOLE = ("erase", "blind", "knockout", "scale_heads")


def _edit_causes(departing: set[str]) -> tuple[Cause, ...]:
    """What follows from which cases of edits depart and which do not."""
    kinds = [kind for kind in _WHOLE if {kind, f"{kind}_in_part"} & departing]
    evidence = f"not tried; of the cases of edits, {', '.join(sorted(departing))} depart"
    in_part = [kind for kind in kinds if kind not in departing]
    if {"erase", "blind", "knockout"} <= departing:
        name, where = "which positions count as image tokens (all edits of images depart)", "Layout.role, Positions"
    elif kinds and kinds == in_part:
        name, where = (
            f"strength, or weights of positions off by one: {', '.join(kinds)} in whole pass",
            "Positions, edits",
        )
    elif not kinds and departing & {"twice", "together"}:
        name, where = "how several edits are composed (each by itself passes)", "compose; _product"
    else:
        return ()
    return (Cause(name, evidence, None, f"jaxmllm.models.edits, jaxmllm.models.layout: {where}"),)


def hints_for(case: Case) -> tuple[Cause, ...]:
    """What to look at for a component, where nothing that was tried explains it."""
    site = case.site.removesuffix("~faint")
    hints = _HINTS.get(f"{case.part}.{site}") or _HINTS.get(site, ())
    return tuple(Cause(what, "", None, where) for what, where in hints)
