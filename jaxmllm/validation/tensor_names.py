"""What a tensor's name says that it is, in words of its own: which leaf a name belongs to is decided here once more.

Independent of ``jaxmllm.convert``, whose tables are under test: a leaf is filled from the right tensor only if both say
so. All spellings are here: of the hub's files, of transformers 5 in memory and of its ``save_pretrained``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_DECODER = r"(?:language_model\.model\.|model\.language_model\.|model\.)"
_LAYER = _DECODER + r"layers\.(?P<layer>\d+)\."
_VISION = r"(?:model\.)?(?:vision_tower\.vision_model\.|vision_tower\.|vision_model\.|visual\.)"
_BLOCK = _VISION + r"(?:encoder\.layers|blocks)\.(?P<layer>\d+)\."
_MERGER = r"(?:model\.)?visual\.merger\."
_PROJECTOR = r"(?:model\.)?multi_modal_projector\."
_QFORMER = r"qformer\."
_QLAYER = r"qformer\.encoder\.layer\.(?P<layer>\d+)\."

# Leaf without its last word (kernel, bias, scale, embedding) -> what the tensor's name is before .weight or .bias.
MEANINGS = {
    "decoder/embed": _DECODER + r"embed_tokens",
    "decoder/norm": _DECODER + r"norm",
    "decoder/head": r"(?:language_model\.)?lm_head",
    "decoder/layers/attention_norm": _LAYER + r"input_layernorm",
    "decoder/layers/attention/query": _LAYER + r"self_attn\.q_proj",
    "decoder/layers/attention/key": _LAYER + r"self_attn\.k_proj",
    "decoder/layers/attention/value": _LAYER + r"self_attn\.v_proj",
    "decoder/layers/attention/out": _LAYER + r"self_attn\.o_proj",
    "decoder/layers/mlp_norm": _LAYER + r"post_attention_layernorm",
    "decoder/layers/mlp/gate": _LAYER + r"mlp\.gate_proj",
    "decoder/layers/mlp/up": _LAYER + r"mlp\.up_proj",
    "decoder/layers/mlp/down": _LAYER + r"mlp\.down_proj",
    "vision/patch_embed": _VISION + r"(?:embeddings\.patch_embedding|patch_embed\.proj)",
    "vision/pre_norm": _VISION + r"pre_layrnorm",
    "vision/post_norm": _VISION + r"post_layernorm",
    "vision/layers/attention_norm": _BLOCK + r"(?:layer_norm1|norm1)",
    "vision/layers/attention/query": _BLOCK + r"self_attn\.q_proj",
    "vision/layers/attention/key": _BLOCK + r"self_attn\.k_proj",
    "vision/layers/attention/value": _BLOCK + r"self_attn\.v_proj",
    "vision/layers/attention/qkv": _BLOCK + r"(?:self_attn|attn)\.qkv",
    "vision/layers/attention/out": _BLOCK + r"(?:self_attn\.out_proj|self_attn\.projection|attn\.proj)",
    "vision/layers/mlp_norm": _BLOCK + r"(?:layer_norm2|norm2)",
    "vision/layers/mlp/gate": _BLOCK + r"mlp\.gate_proj",
    "vision/layers/mlp/up": _BLOCK + r"mlp\.(?:fc1|up_proj)",
    "vision/layers/mlp/down": _BLOCK + r"mlp\.(?:fc2|down_proj)",
    "vision/merger/norm": _MERGER + r"ln_q",
    "vision/merger/mlp/up": _MERGER + r"mlp\.0",
    "vision/merger/mlp/down": _MERGER + r"mlp\.2",
    "projector/up": _PROJECTOR + r"linear_1",
    "projector/down": _PROJECTOR + r"linear_2",
    "projector_norm": _PROJECTOR + r"projector_layernorm",
    "projection": r"language_projection",
    "qformer/word_embed": _QFORMER + r"embeddings\.word_embeddings",
    "qformer/position_embed": _QFORMER + r"embeddings\.position_embeddings",
    "qformer/norm": _QFORMER + r"embeddings\.layernorm",
    **{
        f"qformer/{ours}/{part}": f"{_QLAYER}{theirs}\\.{name}"
        for ours, theirs in (("layers/attention", "attention"), ("cross", "crossattention"))
        for part, name in (
            ("query", r"attention\.query"),
            ("key", r"attention\.key"),
            ("value", r"attention\.value"),
            ("out", r"output\.dense"),
            ("norm", r"output\.LayerNorm"),
        )
    },
    **{
        f"qformer/layers/{ours}/{part}": f"{_QLAYER}{name}"
        for ours, theirs in (("query_mlp", "_query"), ("text_mlp", ""))
        for part, name in (
            ("mlp/up", rf"intermediate{theirs}\.dense"),
            ("mlp/down", rf"output{theirs}\.dense"),
            ("norm", rf"output{theirs}\.LayerNorm"),
        )
    },
}
# Leaves that are a parameter themselves.
PARAMETERS = {
    "vision/class_embed": _VISION + r"embeddings\.class_embedding",
    "vision/position_embed": _VISION + r"embeddings\.position_embedding(?:\.weight)?",
    "newline": r"(?:model\.)?image_newline",
    "qformer/query_tokens": r"query_tokens",
}
_ENDINGS = {"kernel": r"\.weight", "scale": r"\.weight", "embedding": r"\.weight", "bias": r"\.bias"}


def known(leaf: str) -> bool:
    """Whether it is written here what a leaf is called."""
    stem, _, kind = leaf.rpartition("/")
    return leaf in PARAMETERS or (stem in MEANINGS and kind in _ENDINGS)


def means(leaf: str, tensor: str) -> bool:
    """Whether a tensor's name says that it is this leaf, of any layer; ``leaf`` is known."""
    if leaf in PARAMETERS:
        return re.fullmatch(PARAMETERS[leaf], tensor) is not None
    stem, _, kind = leaf.rpartition("/")
    return re.fullmatch(MEANINGS[stem] + _ENDINGS[kind], tensor) is not None


def layer_of(tensor: str) -> int | None:
    """The number of the layer that a tensor's name says."""
    found = re.search(r"\.(?:layers|layer|blocks)\.(\d+)\.", tensor)
    return int(found[1]) if found else None


def pattern_of(tensor: str) -> str:
    """A tensor's name without the number of its layer."""
    return re.sub(r"\.(layers|layer|blocks)\.\d+\.", r".\1.*.", tensor)


def unused_for_a_reason(tensor: str, leaves: Collection[str], blocks: int) -> bool:
    """Whether a model rightly does without a tensor.

    Args:
      tensor: its name.
      leaves: of the model.
      blocks: of its vision tower, those that are filled.
    """
    if tensor.endswith(("rotary_emb.inv_freq", "position_ids")):
        return True
    if tensor.endswith("lm_head.weight"):
        return "decoder/head/kernel" not in leaves
    if re.fullmatch(MEANINGS["vision/post_norm"] + r"\.(?:weight|bias)", tensor):
        return "vision/post_norm/scale" not in leaves
    block = re.match(_BLOCK, tensor)
    return block is not None and int(block["layer"]) >= blocks
