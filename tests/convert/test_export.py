"""Exported folders: transformers loads them to equal logits; the same tensors, names and types; whole or not at all."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxmllm
from jaxmllm.convert import export
from jaxmllm.convert.checkpoint import INDEX, SINGLE
from jaxmllm.convert.plan import flatten
from jaxmllm.errors import CheckpointError, InputError
from jaxmllm.model import convert_checkpoint, export_checkpoint
from tests.support import tiny
from tests.support.families import FAMILIES
from tests.support.spellings import hub_name
from tests.support.stores import write_format_1

ONE_A_FAMILY = [next(iter(family.VARIANTS)) for family in FAMILIES.values()]


@pytest.fixture(scope="module", params=ONE_A_FAMILY)
def family_pair(request, tmp_path_factory):
    return tiny.make_pair(request.param, tmp_path_factory.mktemp(request.param))


def logits_of(pair, model):
    inputs = tiny.make_inputs(pair, tiny.LAYOUTS["unlike_lengths"])
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.inference_mode():
        return model(**tensors, **pair.family.forward_arguments(model, inputs)).logits.numpy()


def load_in_torch(pair, folder):
    kind = getattr(transformers, pair.family.TORCH_CLASS)
    model, report = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    return model.eval(), report


def tensors_in(folder) -> dict[str, np.ndarray]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_transformers_loads_an_exported_store_to_equal_logits(family_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", 40_000)
    monkeypatch.setattr(export, "PANEL", 5000)
    pair = family_pair
    convert_checkpoint(pair.folder, tmp_path / "store")
    lacks = export_checkpoint(tmp_path / "store", tmp_path / "folder")
    assert len(list((tmp_path / "folder").glob("model-*-of-*.safetensors"))) > 1
    model, report = load_in_torch(pair, tmp_path / "folder")
    np.testing.assert_array_equal(logits_of(pair, model), logits_of(pair, pair.torch))
    # what transformers makes up, for want of it, is what the store never had
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    beyond = ("post_layernorm", "vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers")
    assert all(any(part in name for part in beyond) for name in report["missing_keys"])
    if report["missing_keys"]:
        assert any("comes after the layer that is read" in line for line in lacks)


def test_an_exported_folder_has_every_tensor_of_the_folder_it_came_from(family_pair, tmp_path):
    pair = family_pair
    assert export_checkpoint(pair.folder, tmp_path / "folder") == ()
    ours = tensors_in(tmp_path / "folder")
    family = pair.jax.config.model_type
    theirs = {hub_name(name, family): tensor.numpy() for name, tensor in pair.torch.state_dict().items()}
    tied = {name for name in theirs if name.endswith("lm_head.weight")} - set(ours)
    assert sorted(ours) == sorted(set(theirs) - tied)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
    model, report = load_in_torch(pair, tmp_path / "folder")
    assert not report["missing_keys"]
    np.testing.assert_array_equal(logits_of(pair, model), logits_of(pair, pair.torch))


@pytest.fixture(scope="module")
def source(plain_pair, tmp_path_factory):
    folder = Path(shutil.copytree(plain_pair.folder, tmp_path_factory.mktemp("source") / "checkpoint"))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "notes.txt").write_text("not part of the model")
    return folder


def same_params(got, wanted):
    got, wanted = flatten(got), flatten(wanted)
    assert sorted(got) == sorted(wanted)
    for leaf in wanted:
        np.testing.assert_array_equal(np.asarray(got[leaf]), np.asarray(wanted[leaf]), err_msg=leaf)


def test_config_and_processor_files_go_along_unchanged_and_nothing_else(source, tmp_path):
    export_checkpoint(source, tmp_path / "deep" / "folder")
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == sorted(
        ["config.json", "generation_config.json", "tokenizer.json", SINGLE]
    )
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "deep" / "folder" / name).read_bytes() == (source / name).read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_written_in_the_type_asked_for(source, plain_pair, tmp_path, dtype):
    export_checkpoint(source, tmp_path / "folder", dtype)
    params = jaxmllm.load(tmp_path / "folder").params
    expected = jaxmllm.load(source, dtype="float32", param_dtype=dtype).params
    same_params(params, expected)
    query = tensors_in(tmp_path / "folder")["language_model.model.layers.1.self_attn.q_proj.weight"]
    assert query.dtype == jnp.dtype(dtype)


def test_a_store_of_another_type_is_exported_in_it(source, tmp_path):
    convert_checkpoint(source, tmp_path / "store", param_dtype="bfloat16")
    export_checkpoint(tmp_path / "store", tmp_path / "folder")
    assert {tensor.dtype.name for tensor in tensors_in(tmp_path / "folder").values()} == {"bfloat16"}
    same_params(jaxmllm.load(tmp_path / "folder").params, jaxmllm.load(tmp_path / "store").params)


def test_a_store_of_format_1_is_exported(source, plain_pair, tmp_path):
    write_format_1(tmp_path / "store", source, plain_pair.jax.params)
    export_checkpoint(tmp_path / "store", tmp_path / "folder")
    same_params(jaxmllm.load(tmp_path / "folder").params, plain_pair.jax.params)


def test_buffers_are_copied_through(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    buffers = {"vision_tower.vision_model.embeddings.position_ids": np.arange(17)[None]}
    save_file(load_file(folder / SINGLE) | buffers, folder / SINGLE)
    export_checkpoint(folder, tmp_path / "folder", "bfloat16")
    copied = tensors_in(tmp_path / "folder")["vision_tower.vision_model.embeddings.position_ids"]
    np.testing.assert_array_equal(copied, np.arange(17)[None])


def test_the_index_names_every_tensor_and_its_shard(source, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", 30_000)
    reports = []
    export_checkpoint(source, tmp_path / "folder", on_progress=lambda done, total: reports.append((done, total)))
    index = json.loads((tmp_path / "folder" / INDEX).read_text())
    found = {name: path.name for path in (tmp_path / "folder").glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == found
    sizes = [tensor.nbytes for tensor in tensors_in(tmp_path / "folder").values()]
    assert index["metadata"]["total_size"] == sum(sizes) == reports[-1][0] == reports[-1][1]
    for path in (tmp_path / "folder").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= max(30_000, *sizes)


# --- what fails -------------------------------------------------------------------------------------------------------


def test_what_reads_back_unlike_it_was_written_is_an_error_and_leaves_nothing(source, tmp_path, monkeypatch):
    write = export._write_tensor

    def write_and_spoil(file, tensor):
        checksum = write(file, tensor)
        return checksum ^ (tensor.name == "language_model.model.norm.weight")

    monkeypatch.setattr(export, "_write_tensor", write_and_spoil)
    with pytest.raises(CheckpointError, match=r"language_model\.model\.norm\.weight reads back unlike it was written"):
        export_checkpoint(source, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path, monkeypatch):
    def write(file, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_tensor", write)
    with pytest.raises(InputError, match=r"folder: cannot be written \(No space left on device\)"):
        export_checkpoint(source, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(source, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder exists already"):
        export_checkpoint(source, tmp_path / "folder")
    with pytest.raises(InputError, match="dtype is 'int8'; expected one of float32, bfloat16, float16"):
        export_checkpoint(source, tmp_path / "other", "int8")
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(InputError, match="parent/folder: cannot be written"):
        export_checkpoint(source, tmp_path / "parent" / "folder")
