"""Components of transformers' models: names, shapes, numbers found otherwise, floors; streamed as whole."""

import numpy as np
import pytest
import torch

from jaxmllm.validation.components import BLOCK_SITES, DECODER_SITES, FAINT
from jaxmllm.validation.recording import Recorder
from jaxmllm.validation.torch_side.anatomy import find, forward_arguments, tensors_of
from jaxmllm.validation.torch_side.forward import record_components
from jaxmllm.validation.torch_side.loading import load_reference
from jaxmllm.validation.torch_side.ways import ways_for
from tests.support import tiny

LAYOUT = [[2, 7], [5, 3], [1, 1]]


def record(pair, folder, inputs, dtype="float32", streamed=False, ways=None, on_progress=lambda done, total: None):
    recorder = Recorder(folder / f"{dtype}-{streamed}", inputs, dtype, None)
    reference = load_reference(pair.folder, dtype, streamed)
    record_components(recorder, reference, pair.folder, ways or ways_for(dtype, False), on_progress)
    return recorder.finish({})


@pytest.fixture(scope="module")
def recorded(pair, tmp_path_factory):
    """Each tiny model with a recording of prompts that are padded on the left."""
    inputs = tiny.make_inputs(pair, LAYOUT, "left")
    return pair, inputs, record(pair, tmp_path_factory.mktemp("recordings"), inputs)


def expected_names(pair):
    """The components of a model, in order."""
    found = find(pair.torch)
    names = ["vision.embed"]
    names += [f"vision.{block}.{site}" for block in range(found.used_blocks) for site in BLOCK_SITES]
    if not pair.name.startswith("qwen2"):
        names.append("vision.features")
    if found.qformer is not None:
        names.append("qformer.embed")
    for number, layer in enumerate(found.qformer_layers):
        sites = ("resid_pre", "attn_out", *(("cross_out",) if layer.has_cross_attention else ()), "resid_post")
        names += [f"qformer.{number}.{site}" for site in sites]
    names += ["connector", "image_tokens", "positions", "rotary", "embedding"]
    names += [f"decoder.{layer}.{site}" for layer in range(len(found.layers)) for site in DECODER_SITES]
    return [*names, "final_norm", "logits"]


def test_names_are_in_the_order_of_computation(recorded):
    pair, _, recording = recorded
    assert list(recording.names()) == expected_names(pair)


def test_logits_layers_and_image_tokens_are_the_models(recorded):
    pair, inputs, recording = recorded
    reference = load_reference(pair.folder, "float32")
    model = reference.model
    hidden = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: hidden.append(output)) for layer in find(model).layers
    ]
    tensors = tensors_of(inputs)
    with torch.no_grad():
        logits = model(**tensors, **forward_arguments(model, inputs)).logits
        features = torch.cat([each.reshape(-1, each.shape[-1]) for each in pair.family.features(model, tensors)])
    for handle in handles:
        handle.remove()
    np.testing.assert_array_equal(recording.read("logits"), logits)
    np.testing.assert_array_equal(recording.read("image_tokens"), features)
    for number, output in enumerate(hidden):
        np.testing.assert_array_equal(recording.read(f"decoder.{number}.resid_post"), output)


def test_sites_fit_together(recorded):
    """What is added to the residual stream is what it grows by; inputs are the outputs before."""
    pair, inputs, recording = recorded
    valid = inputs["attention_mask"].astype(bool)
    count = len(find(pair.torch).layers)
    stream = recording.read("embedding")
    for number in range(count):
        site = {name: recording.read(f"decoder.{number}.{name}") for name in DECODER_SITES}
        np.testing.assert_array_equal(site["resid_pre"], stream)
        np.testing.assert_array_equal(site["resid_mid"], site["resid_pre"] + site["attn_out"])
        np.testing.assert_array_equal(site["resid_post"], site["resid_mid"] + site["mlp_out"])
        np.testing.assert_allclose(site["attn_probs"].sum(-1), 1, rtol=1e-6)
        text = pair.torch.config.text_config
        assert site["keys"].shape == site["values"].shape
        assert site["keys"].shape[:3] == (*valid.shape, text.num_key_value_heads)
        stream = site["resid_post"]
    stream = recording.read("vision.embed")
    for number in range(find(pair.torch).used_blocks):
        site = {name: recording.read(f"vision.{number}.{name}") for name in BLOCK_SITES}
        np.testing.assert_array_equal(site["resid_pre"], stream)
        np.testing.assert_allclose(
            site["resid_post"], site["resid_pre"] + site["attn_out"] + site["mlp_out"], rtol=1e-5, atol=1e-5
        )
        stream = site["resid_post"]
    if "positions" in recording and not pair.name.startswith("qwen2"):
        assert recording.read("positions").shape == valid.shape


def test_faint_inputs_show_epsilons(recorded):
    _, _, recording = recorded
    norm = recording.read("decoder.0.attn_in")
    faint = recording.read("decoder.0.attn_in~faint")
    stream = recording.read("decoder.0.resid_pre")
    # without an epsilon, a norm does not change when its input is scaled
    scale = np.sqrt((stream**2).mean(-1, keepdims=True))
    epsilon = 1e-5
    shrunk = scale * FAINT / np.sqrt((scale * FAINT) ** 2 + epsilon) * np.sqrt(scale**2 + epsilon) / scale
    np.testing.assert_allclose(faint, norm * shrunk, rtol=1e-4, atol=1e-6)


EXACT = ("embedding", "image_tokens", "positions")  # copies: nothing is computed


def test_own_floors_are_those_of_float32(recorded):
    pair, _, recording = recorded
    for name in recording.names():
        floor = recording.floor(name, "own").of
        if name.endswith("resid_pre"):
            assert not floor
            continue
        assert list(floor) == ["float64", "other order"]
        copied = name in EXACT or (name == "vision.features" and not pair.name.startswith("instructblip"))
        if copied:
            assert floor["float64"].max == floor["other order"].max == 0
            continue
        assert 1e-8 < floor["float64"].relative < 1e-5, name
        assert floor["other order"].relative < 1e-5, name
        if not name.endswith("~faint") and name != "rotary":  # tables hold no sums; an epsilon hides the sums' order
            assert floor["other order"].max > 0, name


def test_run_floors_grow_by_little(recorded):
    _, _, recording = recorded
    for name in recording.names():
        floor = recording.floor(name, "run").of
        assert set(floor) == {"float64", "other order"}
        assert floor["float64"].relative < 3e-5, name
        if name != "positions":
            assert floor["float64"].max > 0, name
    assert recording.floor("logits", "run").of["other order"].max > 0


def test_streamed_recording_is_the_whole_one(recorded, tmp_path):
    pair, inputs, whole = recorded
    streamed = record(pair, tmp_path, inputs, streamed=True)
    assert list(streamed.names()) == list(whole.names())
    for name in whole.names():
        np.testing.assert_array_equal(streamed.read(name), whole.read(name), err_msg=name)
        for kind in ("own", "run"):
            assert streamed.floor(name, kind) == whole.floor(name, kind), name


@pytest.mark.parametrize("variant", ["grouped_queries", "instructblip_cross_seldom", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(variant, dtype, tmp_path):
    (tmp_path / "model").mkdir()
    pair = tiny.make_pair(variant, tmp_path / "model")
    recording = record(pair, tmp_path, tiny.make_inputs(pair, LAYOUT), dtype)
    steps = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert list(recording.names()) == expected_names(pair)
    for name in recording.names():
        floor = recording.floor(name, "own").of
        if name in EXACT or name.endswith("resid_pre") or name == "vision.features":
            continue
        assert set(floor) == {"float32", "other order"}
        assert 0 < floor["float32"].relative < 60 * steps, name
    assert recording.read("logits").dtype == np.float32


def test_accelerators_ways(plain_pair, tmp_path):
    inputs = tiny.make_inputs(plain_pair, LAYOUT)
    recording = record(plain_pair, tmp_path, inputs, ways=ways_for("float32", True))
    floor = recording.floor("decoder.1.mlp_out", "own").of
    assert floor["bf16 products"].mean > 4 * floor["tf32 products"].mean > 40 * floor["bf16x3 products"].mean
    assert floor["bf16x3 products"].mean > floor["float64"].mean
    assert set(recording.floor("logits", "run").of) == set(ways_for("float32", True))


@pytest.mark.parametrize("variant", ["grouped_queries", "instructblip_cross_seldom", "qwen2_5_vl"])
def test_text_alone_has_no_images(variant, tmp_path):
    (tmp_path / "model").mkdir()
    pair = tiny.make_pair(variant, tmp_path / "model")
    inputs = tiny.make_inputs(pair, tiny.LAYOUTS["text_only"], "left")
    recording = record(pair, tmp_path, inputs)
    names = list(recording.names())
    assert names == expected_names(pair)[expected_names(pair).index("positions") :]
    assert recording.read("positions").shape == inputs["input_ids"].shape


def test_progress_ends_at_its_total(plain_pair, tmp_path):
    told = []
    record(plain_pair, tmp_path, tiny.make_inputs(plain_pair, LAYOUT), on_progress=lambda *each: told.append(each))
    total = told[0][1]
    assert told == [(done, total) for done in range(1, total + 1)]


def test_a_recorded_model_is_as_it_was(plain_pair, tmp_path):
    inputs = tiny.make_inputs(plain_pair, LAYOUT)
    reference = load_reference(plain_pair.folder, "float32")
    before = {name: module.__dict__.get("forward") for name, module in reference.model.named_modules()}
    recorder = Recorder(tmp_path / "recording", inputs, "float32", None)
    record_components(recorder, reference, plain_pair.folder, ways_for("float32", False))
    recorder.discard()
    assert before == {name: module.__dict__.get("forward") for name, module in reference.model.named_modules()}
    for name, value in plain_pair.torch.state_dict().items():
        assert torch.equal(reference.model.state_dict()[name], value), name
