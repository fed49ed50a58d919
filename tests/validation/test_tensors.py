"""Checksums of tensors: sound ports agree in every type, and every way to fill a leaf wrongly is told by its name."""

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmllm.convert.plan import flatten
from jaxmllm.convert.tables import NAME_TABLES
from jaxmllm.convert.weights import open_weights
from jaxmllm.errors import InputError
from jaxmllm.model import make_skeleton
from jaxmllm.models.registry import family_of
from jaxmllm.validation import tensors
from jaxmllm.validation.distributions import DTYPES
from jaxmllm.validation.port.model import from_model
from jaxmllm.validation.tensor_names import known, layer_of, means, pattern_of
from jaxmllm.validation.tensors import checksums, compare_tensors, digest_of, read_tensor, torch_layout
from tests.support import spellings, tiny
from tests.support.families import VARIANTS
from tests.support.weights import random_model


def port_of(pair):
    return from_model(pair.jax)


def compared(pair, read, table=None, tensor=None):
    port = port_of(pair)
    return compare_tensors(checksums(pair.folder), table or port.table, read, "float32", tensor)


def changed(pair, leaf, change, layer=None):
    """The port's weights, one part of a leaf changed."""
    read = port_of(pair).read
    return lambda name, place: change(read(name, place)) if (name, place) == (leaf, layer) else read(name, place)


def test_every_variant_agrees_with_its_checkpoint(pair):
    phase = compared(pair, port_of(pair).read)
    assert (phase.verdict, phase.findings) == ("passes", ())
    assert phase.summary.startswith(f"{len(load_file(pair.folder / 'model.safetensors'))} tensors")


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_names_mean_the_leaf_that_the_table_gives_them_and_no_other(variant):
    fields = tiny.config_fields(variant)
    family = family_of(fields)
    config = family.read_config(fields)
    table = NAME_TABLES[fields["model_type"]](config)
    leaves = set(flatten(make_skeleton(family.module, config, "float32", "float32")[1]))
    assert leaves == {entry.leaf for entry in table.entries}
    assert all(map(known, leaves))
    for entry in table.entries:
        name = entry.name.format(layer=1)
        assert {leaf for leaf in leaves if means(leaf, name)} == {entry.leaf}


def test_names_of_transformers_mean_the_same_as_those_of_files(pair):
    family = pair.jax.config.model_type
    leaves = [entry.leaf for entry in NAME_TABLES[family](pair.jax.config).entries]
    for name in pair.torch.state_dict():
        hub = spellings.hub_name(name, family)
        assert [leaf for leaf in leaves if means(leaf, name)] == [leaf for leaf in leaves if means(leaf, hub)]
        assert layer_of(name) == layer_of(hub)


def test_layers_are_read_of_names():
    assert layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert layer_of("qformer.encoder.layer.3.attention.output.dense.bias") == 3
    assert layer_of("visual.merger.mlp.2.weight") is None
    assert pattern_of("visual.blocks.7.norm1.weight") == "visual.blocks.*.norm1.weight"


@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
def test_weights_kept_in_any_type_agree_with_files_of_any_type(plain_pair, tmp_path, source, kept):
    folder = stored_as(plain_pair, tmp_path, source)
    table = port_of(plain_pair).table
    phase = compare_tensors(checksums(folder, kept), table, read_of(plain_pair, folder, kept), kept)
    assert (phase.verdict, phase.findings) == ("passes", ())


def read_of(pair, folder, kept):
    """Weights as they are read of a folder, kept in a type."""
    shapes = {leaf: value.shape for leaf, value in flatten(pair.jax.params).items()}
    weights = open_weights(folder, port_of(pair).table, pair.jax.params)

    def read(leaf, place):
        region = tuple((0, size) for size in shapes[leaf])
        if place is None:
            return weights.read(leaf, region, DTYPES[kept])
        return weights.read(leaf, ((place, place + 1), *region[1:]), DTYPES[kept])[0]

    return read


def stored_as(pair, tmp_path, dtype):
    folder = tmp_path / "stored"
    folder.mkdir()
    (folder / "config.json").write_text((pair.folder / "config.json").read_text())
    arrays = load_file(pair.folder / "model.safetensors")
    save_file({name: array.astype(dtype) for name, array in arrays.items()}, folder / "model.safetensors")
    return folder


def test_checksums_of_another_type_are_refused(plain_pair, tmp_path):
    folder = stored_as(plain_pair, tmp_path, ml_dtypes.bfloat16)
    read = read_of(plain_pair, folder, "float16")
    with pytest.raises(InputError, match="Record the reference again in float16"):
        compare_tensors(checksums(folder, "bfloat16"), port_of(plain_pair).table, read, "float16")


def test_what_is_recorded_of_a_tensor(plain_pair, monkeypatch):
    arrays = load_file(plain_pair.folder / "model.safetensors")
    whole = checksums(plain_pair.folder)
    assert set(whole) == set(arrays)
    for name, entry in whole.items():
        array = arrays[name]
        assert entry["shape"] == list(array.shape) and entry["dtype"] == "F32"
        assert entry["mean"] == pytest.approx(array.mean(dtype=np.float64), abs=1e-7)
        assert entry["std"] == pytest.approx(array.std(dtype=np.float64), rel=1e-5)
        assert [value for _, value in entry["probes"]] == [float(array.flat[at]) for at, _ in entry["probes"]]
        assert entry["digests"]["float32"] == digest_of(array)
        assert entry["digests"]["bfloat16"] == digest_of(array.astype(ml_dtypes.bfloat16))
        assert set(entry["digests"]) == {"float32", "bfloat16", "float16"}
    monkeypatch.setattr(tensors, "PANEL", 100)  # some rows at a time
    for name, entry in checksums(plain_pair.folder).items():
        assert (entry["digests"], entry["probes"]) == (whole[name]["digests"], whole[name]["probes"])
        assert entry["mean"] == pytest.approx(whole[name]["mean"], abs=1e-9)


def test_checksums_see_one_number(plain_pair):
    array = next(array for array in load_file(plain_pair.folder / "model.safetensors").values() if array.ndim == 2)
    other = array.copy()
    other[5, 7] = np.nextafter(other[5, 7], np.float32(9))
    assert digest_of(array) != digest_of(other)
    assert digest_of(array) == digest_of(np.asfortranarray(array))


QUERY, GATE, UP = (f"decoder/layers/{part}/kernel" for part in ("attention/query", "mlp/gate", "mlp/up"))
EMBEDDING, PATCHES = "decoder/embed/embedding", "vision/patch_embed/kernel"


def one_more(part):
    part = np.array(part)
    part.flat[3] += 1
    return part


# Leaf, its layer, what is done to it, what is said of it.
MISTAKES = {
    "transposed": (QUERY, 1, lambda part: part.T, "is transposed"),
    "negated": (QUERY, 0, lambda part: -part, "is negated"),
    "zero": (UP, 3, np.zeros_like, "is all zeros"),
    "rounded": (UP, 2, lambda part: part.astype(ml_dtypes.bfloat16), "is rounded to bfloat16"),
    "shifted": (EMBEDDING, None, lambda part: np.roll(part, 1, axis=0), "has its rows one place late"),
    "channels first": (
        PATCHES,
        None,
        lambda part: part.reshape(7, 7, 3, -1).transpose(2, 0, 1, 3).reshape(part.shape),
        "has its patches in the order channel, row, column",
    ),
    "permuted": (EMBEDDING, None, lambda part: part[::-1], "holds the same numbers in another order of rows"),
    "shuffled": (UP, 0, lambda part: part.reshape(-1)[::-1].reshape(part.shape), "holds the same numbers in another"),
    "scaled": (UP, 0, lambda part: part * 0.5, "is multiplied by about 0.5"),
    "one number": (UP, 0, one_more, "differs in 1 of 3,840 numbers, by up to 1;"),
    "shape": (UP, 0, lambda part: part[:-1], r"has shape \[47, 80\], and the tensor \[80, 48\]"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_in_one_part_is_named(plain_pair, mistake):
    leaf, layer, change, said = MISTAKES[mistake]
    phase = compared(plain_pair, changed(plain_pair, leaf, change, layer), tensor=read_tensor(plain_pair.folder))
    assert phase.verdict == "differs"
    place = "" if layer is None else rf"\[{layer}\]"
    (finding,) = phase.findings
    assert re.match(rf"{leaf}{place} {said}", finding), finding


def test_differences_are_told_without_the_checkpoint_at_hand(plain_pair):
    phase = compared(plain_pair, changed(plain_pair, UP, lambda part: part * 1.5 + 1, 1))
    (finding,) = phase.findings
    assert re.search(r"differs: mean 1\.\S+ and deviation \S+ instead of \S+ and \S+, and 4 of 4 numbers", finding)


def test_numbers_of_another_tensor_are_recognised(plain_pair):
    read = port_of(plain_pair).read
    other_layer = compared(plain_pair, lambda leaf, place: read(leaf, 0 if (leaf, place) == (UP, 2) else place))
    assert other_layer.findings[0].startswith(f"{UP}[2] holds that of layer 0")
    swapped = {UP: GATE, GATE: UP}
    exchanged = compared(plain_pair, lambda leaf, place: read(swapped.get(leaf, leaf), place))
    assert len(exchanged.findings) == 2
    assert any(re.match(rf"{UP}\[0\.\.3\] holds \S+layers\.\*\.mlp\.gate_proj", each) for each in exchanged.findings)


def test_parts_of_a_fused_projection_in_another_order_are_recognised(tmp_path):
    pair = tiny.make_pair("qwen2_vl", tmp_path)
    leaf = "vision/layers/attention/qkv/kernel"

    def key_first(part):
        query, key, value = np.split(np.asarray(part), 3, axis=1)
        return np.concatenate([key, query, value], axis=1)

    (finding,) = compared(pair, changed(pair, leaf, key_first, 2)).findings
    assert finding.startswith(f"{leaf}[2] has query, key and value in the order (1, 0, 2)")


def test_a_table_that_fills_leaves_from_wrong_names_is_told(plain_pair):
    port = port_of(plain_pair)
    swapped = {UP: GATE, GATE: UP}
    entries = tuple(
        dataclasses.replace(entry, leaf=swapped.get(entry.leaf, entry.leaf)) for entry in port.table.entries
    )
    phase = compared(
        plain_pair,
        lambda leaf, place: port.read(swapped.get(leaf, leaf), place),
        dataclasses.replace(port.table, entries=entries),
    )
    assert len(phase.findings) == 2
    assert all("whose name means something else" in finding for finding in phase.findings)


def test_a_tensor_that_is_dropped_or_left_over_is_told(plain_pair):
    port = port_of(plain_pair)
    entries = tuple(entry for entry in port.table.entries if entry.leaf != "decoder/norm/scale")
    without = compared(plain_pair, port.read, dataclasses.replace(port.table, entries=entries))
    assert without.findings == ("language_model.model.norm.weight fills no leaf",)
    ignored = (*port.table.ignored, (r".*mlp\.up_proj\.weight\Z", "not needed"))
    dropped = compared(plain_pair, port.read, dataclasses.replace(port.table, ignored=ignored))
    assert f"{UP} is filled from no tensor" in dropped.findings
    assert sum("is ignored, though the model needs it" in finding for finding in dropped.findings) == 4


def test_a_missing_layer_is_told(plain_pair):
    recorded = checksums(plain_pair.folder)
    port = port_of(plain_pair)
    kept = {name: entry for name, entry in recorded.items() if ".layers.1.mlp.up_proj" not in name}
    assert compare_tensors(kept, port.table, port.read, "float32").findings == (f"{UP}[1] is filled from no tensor",)


def test_a_head_that_is_not_tied_after_all_is_told(tmp_path):
    pair = tiny.make_pair("tied_linear_rope", tmp_path)
    recorded = checksums(pair.folder)
    port = port_of(pair)
    embedding = next(name for name in recorded if name.endswith("embed_tokens.weight"))
    same = recorded | {"lm_head.weight": recorded[embedding]}
    assert compare_tensors(same, port.table, port.read, "float32").verdict == "passes"
    other = same | {"lm_head.weight": recorded[embedding] | {"digests": {"float32": "0"}}}
    (finding,) = compare_tensors(other, port.table, port.read, "float32").findings
    assert finding.startswith("lm_head.weight is ignored as tied to the embedding, but holds other numbers")


def test_layouts_of_torch_are_those_of_convolutions():
    rng = np.random.default_rng(0)
    conv = rng.normal(size=(5, 3, 2, 4)).astype(np.float32)
    ours = conv.transpose(2, 3, 1, 0).reshape(-1, 5)
    np.testing.assert_array_equal(torch_layout(PATCHES, ours, conv.shape), conv)
    flat = rng.normal(size=(5, 3, 2, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(torch_layout(PATCHES, flat.reshape(5, -1).T, flat.shape), flat)


def test_many_findings_are_cut():
    pair_fields = tiny.config_fields("grouped_queries")
    model = random_model(pair_fields)
    port = from_model(model)
    recorded = {f"unknown.{number}": {"shape": [1], "dtype": "F32", "digests": {}} for number in range(100)}
    phase = compare_tensors(recorded, port.table, port.read, "float32")
    assert len(phase.findings) == tensors.MOST_FINDINGS + 1
    assert phase.findings[-1].endswith("more")
