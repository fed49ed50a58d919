"""Every published size, as names and shapes: each tensor is taken or known not to be needed; no weight is allocated."""

import functools
import json
import math
import re

import jax
import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from jaxmllm.convert.pieces import LARGEST, conversion_plan, lay_out
from jaxmllm.convert.plan import make_plan
from jaxmllm.convert.tables import NAME_TABLES
from jaxmllm.errors import CheckpointError, ConfigError
from jaxmllm.model import make_skeleton
from jaxmllm.models.registry import FAMILIES, family_of
from tests.support.checkpoints import FIXTURES, published_config
from tests.support.spellings import RENAMES, hub_name

HUB_NAMES = json.loads((FIXTURES / "configs" / "hub-names.json").read_text())

# Tensors in transformers' state dict (a tied head counts) and parameters (a tied head does not).
SIZES = {
    "llava-1.5-7b-hf": (686, 7_063_427_072),
    "llava-1.5-13b-hf": (758, 13_351_494_656),
    "llava-v1.6-vicuna-7b-hf": (687, 7_063_431_168),
    "llava-v1.6-vicuna-13b-hf": (759, 13_351_499_776),
    "llava-v1.6-mistral-7b-hf": (687, 7_566_747_648),
    "llava-v1.6-34b-hf": (939, 34_752_083_968),
    "llama3-llava-next-8b-hf": (687, 8_355_276_800),
    "vip-llava-7b-hf": (688, 7_080_214_528),
    "vip-llava-13b-hf": (760, 13_372_476_416),
    "instructblip-vicuna-7b": (1096, 7_913_210_624),
    "instructblip-vicuna-13b": (1168, 14_191_448_832),
    "qwen2-vl-2b-instruct": (730, 2_208_985_600),
    "qwen2-vl-7b-instruct": (730, 8_291_375_616),
    "qwen2-vl-72b-instruct": (1354, 73_405_560_320),
    "qwen2.5-vl-3b-instruct": (825, 3_754_622_976),
    "qwen2.5-vl-7b-instruct": (729, 8_292_166_656),
    "qwen2.5-vl-32b-instruct": (1161, 33_452_718_336),
    "qwen2.5-vl-72b-instruct": (1353, 73_410_777_344),
}

SPELLINGS = ("in_memory", "saved", "hub")

# CLIP's last layer (16 tensors) and final norm come after the hidden state that the LLaVA families read.
BEYOND = r"vision_tower\.(vision_model\.)?(encoder\.layers\.23|post_layernorm)\."
UNREAD = dict.fromkeys(("llava", "llava_next", "vipllava"), (BEYOND, 18))


@functools.cache
def torch_shapes(name: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of PyTorch's tensors in each spelling, and under ``parameters`` those of the parameters."""
    fields = published_config(name)
    kind = getattr(transformers, fields["architectures"][0])
    family = fields.pop("model_type")
    with torch.device("meta"):
        model = kind(AutoConfig.for_model(family, **fields))
    tensors = model.state_dict()
    written = {key: value for key, value in tensors.items() if key != "lm_head.weight" or not tied(name)}
    spelled = {
        "in_memory": tensors,
        "saved": revert_weight_conversion(model, dict(written)),
        "hub": {hub_name(key, family): value for key, value in written.items()},
        "parameters": dict(model.named_parameters()),
    }
    return {spelling: {key: tuple(value.shape) for key, value in named.items()} for spelling, named in spelled.items()}


def tied(name: str) -> bool:
    return bool(published_config(name).get("tie_word_embeddings"))


@functools.cache
def ours(name: str):
    """Table of names and skeleton; its leaves are shapes."""
    fields = published_config(name)
    family = family_of(fields)
    config = family.read_config(fields)
    _, skeleton = make_skeleton(family.module, config, "bfloat16", "bfloat16")
    return NAME_TABLES[fields["model_type"]](config), skeleton


def elements(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


# --- what is in the files ---------------------------------------------------------------------------------------------


def test_every_family_is_here():
    assert {published_config(name)["model_type"] for name in SIZES} == set(FAMILIES) == set(RENAMES)


@pytest.mark.parametrize("name", SIZES)
def test_transformers_finds_the_published_number_of_parameters(name):
    spelled = torch_shapes(name)
    assert (len(spelled["in_memory"]), elements(spelled["parameters"].values())) == SIZES[name]


@pytest.mark.parametrize("name", HUB_NAMES)
def test_hub_names_are_those_of_the_real_index_and_so_are_the_bytes(name):
    index = [
        pattern.format(layer=layer) for pattern, count in HUB_NAMES[name]["names"].items() for layer in range(count)
    ]
    shapes = torch_shapes(name)["hub"]
    assert sorted(shapes) == sorted(index)
    assert 2 * elements(shapes.values()) == HUB_NAMES[name]["total_size"]  # bfloat16


# --- what is taken of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_fills_a_leaf_or_is_known_to_be_unread(name, spelling):
    shapes = torch_shapes(name)[spelling]
    table, skeleton = ours(name)
    leaves = jax.tree.leaves(skeleton)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    fills, ignored = make_plan(table, skeleton, shapes, name)

    taken = [source for fill in fills for source in fill.sources]
    assert len(fills) == len(leaves)
    assert len(taken) == len(set(taken))
    assert set(taken) | set(ignored) == set(shapes)
    assert not set(taken) & set(ignored)
    assert elements(leaf.shape for leaf in leaves) == elements(shapes[source] for source in taken)
    unread = [tensor for tensor in ignored if tensor != "lm_head.weight"]
    assert ("lm_head.weight" in ignored) == (tied(name) and spelling == "in_memory")
    pattern, count = UNREAD.get(published_config(name)["model_type"], ("", 0))
    assert len(unread) == count
    assert all(re.search(pattern, tensor) for tensor in unread)


@pytest.mark.parametrize("name", SIZES)
def test_spellings_lead_to_the_same_leaves(name):
    table, skeleton = ours(name)
    shapes = torch_shapes(name)
    family = published_config(name)["model_type"]
    in_memory, _ = make_plan(table, skeleton, shapes["in_memory"], name)
    hub, _ = make_plan(table, skeleton, shapes["hub"], name)
    as_hub = {fill.leaf: tuple(hub_name(source, family) for source in fill.sources) for fill in in_memory}
    assert {fill.leaf: fill.sources for fill in hub} == as_hub


@pytest.mark.parametrize("name", ["llava-v1.6-34b-hf", "vip-llava-7b-hf", "instructblip-vicuna-7b", *HUB_NAMES])
def test_buffers_that_old_files_hold_are_not_needed(name):
    shapes = dict(torch_shapes(name)["hub"])
    buffers = {re.sub(r"q_proj\.weight$", "rotary_emb.inv_freq", key): (64,) for key in shapes if "q_proj.w" in key}
    embeddings = next((key for key in shapes if re.search(r"embeddings\.position_embeddings?(\.weight)?$", key)), None)
    if embeddings is not None:
        buffers[re.sub(r"position_embeddings?(\.weight)?$", "position_ids", embeddings)] = (1, 577)
    _, ignored = make_plan(*ours(name), shapes | buffers, name)
    assert set(buffers) <= set(ignored)


# --- what a conversion takes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_conversions_are_planned_from_shapes_alone(name):
    table, skeleton = ours(name)
    plan = conversion_plan(table, skeleton, source_itemsize=2)
    weights = 2 * elements(leaf.shape for leaf in jax.tree.leaves(skeleton))
    assert weights <= plan.bytes <= 1.001 * weights  # files of the last pieces may be padded
    layouts = lay_out(table, skeleton)
    made = [piece for layout in layouts for piece in layout.pieces()]
    assert plan.leaves == len(jax.tree.leaves(skeleton))
    assert plan.pieces == len(made) == len({piece.file for piece in made})
    assert plan.largest_piece == max(piece.nbytes for piece in made) <= LARGEST
    assert plan.peak_memory < 2.5e9


def test_a_conversion_of_the_largest_model_is_planned_within_four_gigabytes_from_float32_too():
    for name in ("llava-1.5-13b-hf", "llava-v1.6-34b-hf", "qwen2-vl-72b-instruct"):
        assert conversion_plan(*ours(name), source_itemsize=4).peak_memory < 4e9


# --- what is refused --------------------------------------------------------------------------------------------------


def test_text_models_that_are_no_decoders_are_refused():
    fields = published_config("instructblip-flan-t5-xl")
    with pytest.raises(ConfigError, match=r"text_config.*model_type.*t5"):
        family_of(fields).read_config(fields)


WRONG = {
    "qwen2.5-vl-7b-instruct": ("visual.merger.ln_q.weight", "visual.blocks.7.attn.qkv.bias"),
    "qwen2-vl-7b-instruct": ("model.layers.27.self_attn.v_proj.bias", "visual.patch_embed.proj.weight"),
    "instructblip-vicuna-7b": ("query_tokens", "qformer.encoder.layer.2.crossattention.attention.key.weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_missing_extra_and_misshaped_tensors_are_named_in_one_error(name):
    missing, misshaped = WRONG[name]
    shapes = dict(torch_shapes(name)["hub"])
    expected = list(shapes[misshaped])
    del shapes[missing]
    shapes[misshaped] = (3, 5)
    shapes["model.adapter.weight"] = (4,)
    with pytest.raises(CheckpointError) as error:
        make_plan(*ours(name), shapes, "the folder")
    text = str(error.value)
    assert text.startswith("the folder: 3 tensor(s) do not fit config.json")
    assert f"missing: {missing}" in text
    assert f"misshaped: {misshaped} has shape [3, 5]; the config asks for {expected}" in text
    assert re.search(r"left over: .*adapter\.weight is not a tensor of this model", text)


def test_layers_of_another_layer_kind_are_left_over():
    """Cross-attention stands in every second layer of the Q-Former, and in no other."""
    shapes = dict(torch_shapes("instructblip-vicuna-7b")["hub"])
    extra = "qformer.encoder.layer.3.crossattention.attention.key.weight"
    assert extra not in shapes
    shapes[extra] = shapes[extra.replace("layer.3", "layer.2")]
    with pytest.raises(CheckpointError, match=f"left over: {re.escape(extra)} is of layer 3"):
        make_plan(*ours("instructblip-vicuna-7b"), shapes, "the folder")
