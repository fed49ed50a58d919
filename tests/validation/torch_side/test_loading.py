"""transformers' models, whole and streamed, hold the same weights and give the same numbers, bit by bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxmllm.errors import CheckpointError, ConfigError, InputError
from jaxmllm.validation.torch_side.anatomy import forward_arguments, tensors_of
from jaxmllm.validation.torch_side.loading import load_reference
from jaxmllm.validation.torch_side.ways import computing
from tests.support import tiny

LAYOUT = [[2, 7], [5, 3], [1, 1]]


def logits(reference, inputs):
    model = reference.model
    with torch.no_grad():
        return model(**tensors_of(inputs), **forward_arguments(model, inputs)).logits


def rewrite(pair, folder, change):
    """A copy of a checkpoint with changed tensors."""
    for file in pair.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_streamed_is_whole(pair, dtype):
    inputs = tiny.make_inputs(pair, LAYOUT, "left")
    whole, streamed = (load_reference(pair.folder, dtype, streamed) for streamed in (False, True))
    assert streamed.streamed
    assert not whole.streamed
    with computing(dtype) if dtype == "float64" else computing("float32"):
        expected, got = logits(whole, inputs), logits(streamed, inputs)
    assert got.dtype == getattr(torch, dtype)
    assert torch.equal(got, expected)


def test_the_whole_model_is_the_one_that_was_saved(pair):
    found = dict(load_reference(pair.folder, "float32").model.named_parameters())
    for name, value in pair.torch.named_parameters():
        assert torch.equal(found[name], value), name


def test_streamed_generates_what_the_whole_generates(pair):
    inputs = tiny.make_inputs(pair, LAYOUT, "left")
    arguments = tensors_of(inputs)
    if "image_grid_thw" in inputs:
        arguments["mm_token_type_ids"] = (arguments["input_ids"] == pair.image_token).int()
    said = [
        load_reference(pair.folder, "float32", streamed).model.generate(**arguments, max_new_tokens=3, do_sample=False)
        for streamed in (False, True)
    ]
    assert torch.equal(*said)


def test_streamed_text_alone(pair):
    inputs = tiny.make_inputs(pair, tiny.LAYOUTS["text_only"], "left")
    whole, streamed = (load_reference(pair.folder, "float32", streamed) for streamed in (False, True))
    assert torch.equal(logits(streamed, inputs), logits(whole, inputs))


def held_bytes(model):
    """Memory of a model's parameters; placeholders share a number."""
    values = (value for module in model.modules() for value in module._parameters.values())
    return sum(value.untyped_storage().nbytes() for value in values if value is not None)


def test_no_more_than_one_stage_is_in_memory(pair):
    reference = load_reference(pair.folder, "float32", streamed=True)
    model, found = reference.model, reference.anatomy
    at_rest = held_bytes(model)
    largest = 0
    for stage in reference.stages:
        with reference.hold(stage.module):
            largest = max(largest, held_bytes(model) - at_rest)
    most = []
    for layer in [*found.layers, *found.blocks, *found.qformer_layers, found.connector, found.head]:
        layer.register_forward_hook(lambda *_: most.append(held_bytes(model)), prepend=True)
    logits(reference, tiny.make_inputs(pair, LAYOUT))
    whole = sum(value.nbytes for value in pair.torch.parameters())
    assert max(most) <= at_rest + largest
    assert at_rest + largest < whole / 2
    assert held_bytes(model) == at_rest


def test_a_failure_gives_weights_back(plain_pair):
    reference = load_reference(plain_pair.folder, "float32", streamed=True)
    at_rest = held_bytes(reference.model)
    with pytest.raises(RuntimeError):
        reference.anatomy.layers[0].mlp.register_forward_hook(fail)
        logits(reference, tiny.make_inputs(plain_pair, LAYOUT))
    assert held_bytes(reference.model) == at_rest


def fail(*_):
    raise RuntimeError("on purpose")


def test_held_weights_are_the_files(plain_pair):
    reference = load_reference(plain_pair.folder, "float32", streamed=True)
    layer = reference.anatomy.layers[1]
    expected = plain_pair.torch.model.language_model.layers[1]
    assert layer.mlp.up_proj.weight.isnan().all()
    with reference.hold(layer.mlp), reference.hold(reference.model):
        assert torch.equal(layer.mlp.up_proj.weight, expected.mlp.up_proj.weight)
    assert layer.mlp.up_proj.weight.isnan().all()
    with load_reference(plain_pair.folder, "float32").hold(layer):
        pass


@pytest.mark.parametrize("streamed", [False, True])
def test_the_wide_way_has_the_rounded_weights(pair, streamed):
    half = load_reference(pair.folder, "bfloat16")
    wide = load_reference(pair.folder, "float32", streamed, rounded_to="bfloat16")
    with wide.hold(wide.model):
        found = wide.model.state_dict()
        for name, value in half.model.named_parameters():
            assert torch.equal(found[name], value.float()), name


def test_what_transformers_keeps_in_float32_stays(tmp_path):
    pair = tiny.make_pair("instructblip_cross_seldom", tmp_path)
    for streamed in (False, True):
        model = load_reference(tmp_path, "float16", streamed).model
        assert model.query_tokens.dtype == torch.float32
        assert torch.equal(model.query_tokens, pair.torch.query_tokens)
        wide = load_reference(tmp_path, "float32", streamed, rounded_to="float16").model
        assert torch.equal(wide.query_tokens, pair.torch.query_tokens)


def test_frequencies_in_float64_are_computed_in_float64(plain_pair):
    for streamed in (False, True):
        found = load_reference(plain_pair.folder, "float64", streamed).anatomy.rotary.inv_freq
        exact = 1e4 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
        assert torch.allclose(found, exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("language_model.model.layers.2.mlp.up_proj.weight"), "lacks.*up_proj"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "no parameter takes: extra"),
        (lambda tensors: tensors.update({"language_model.model.norm.weight": torch.zeros(3)}), "norm.weight"),
    ],
    ids=["missing", "left over", "misshaped"],
)
def test_tensors_that_do_not_fit_are_named(plain_pair, tmp_path, change, message, streamed):
    names = load_file(plain_pair.folder / "model.safetensors")
    assert "language_model.model.norm.weight" in names
    folder = rewrite(plain_pair, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_reference(folder, "float32", streamed)


def test_buffers_that_older_releases_saved_are_passed_over(plain_pair, tmp_path):
    saved = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(17.0)[None]}
    folder = rewrite(plain_pair, tmp_path, lambda tensors: tensors.update(saved))
    inputs = tiny.make_inputs(plain_pair, LAYOUT)
    whole, streamed = (load_reference(folder, "float32", streamed) for streamed in (False, True))
    assert torch.equal(logits(streamed, inputs), logits(whole, inputs))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_the_file_also_holds(tmp_path, same):
    (tmp_path / "saved").mkdir()
    (tmp_path / "changed").mkdir()
    pair = tiny.make_pair("tied_linear_rope", tmp_path / "saved")

    def add_head(tensors):
        embedding = tensors["language_model.model.embed_tokens.weight"]
        tensors["language_model.lm_head.weight"] = embedding.clone() if same else embedding + 1

    folder = rewrite(pair, tmp_path / "changed", add_head)
    inputs = tiny.make_inputs(pair, LAYOUT)
    whole, streamed = (load_reference(folder, "float32", streamed) for streamed in (False, True))
    got = logits(streamed, inputs)
    assert torch.equal(got, logits(whole, inputs))
    assert torch.equal(got, logits(load_reference(pair.folder, "float32"), inputs)) == same


def test_other_families_and_types_are_refused(plain_pair, tmp_path):
    with pytest.raises(InputError, match="'float8'"):
        load_reference(plain_pair.folder, "float8")
    folder = rewrite(plain_pair, tmp_path, lambda tensors: None)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "blip"}))
    with pytest.raises(ConfigError, match="'blip'"):
        load_reference(folder, "float32")
