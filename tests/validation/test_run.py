"""A whole validation: sound ports pass in every family and type, streamed or whole, with torch or from a recording."""

import dataclasses
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxmllm
from jaxmllm.errors import InputError
from jaxmllm.model import convert_checkpoint, export_checkpoint
from jaxmllm.validation import PHASES, Settings, compare, components, record, run, validate
from jaxmllm.validation.phases import BEHAVIOUR_PHASES, COMPONENT_PHASES
from jaxmllm.validation.port import decoder
from jaxmllm.validation.port.model import from_folder
from tests.support import families, tiny

# One variant of every family; edits compile a program each
QUICK = tuple(phase for phase in PHASES if phase != "edits")
ONE_OF_EACH = [next(iter(family.VARIANTS)) for family in families.FAMILIES.values()]


def saved(variant, folder):
    tiny.make_torch(tiny.config_fields(variant)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved("class_token_biases", tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="module")
def recording(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("recorded") / "reference"
    record(folder, destination, settings=Settings(accelerators=True))
    return destination


def nothing_departs(report):
    said = [(phase.name, phase.summary, phase.findings) for phase in report.phases if phase.verdict == "differs"]
    assert report.verdict == "passes" and report.first is None, said
    assert report.exit_code == 0


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=() if name == "grouped_queries" else pytest.mark.slow) for name in tiny.VARIANTS],
)
def test_a_sound_port_passes(variant, tmp_path):
    report = validate(saved(variant, tmp_path / "model"), settings=Settings(phases=QUICK))
    nothing_departs(report)
    verdicts = {phase.name: phase.verdict for phase in report.phases}
    assert verdicts == {
        **dict.fromkeys(QUICK, "passes"),
        "preprocessing": "skipped",  # these folders have no processor files
    }
    # what is passed was looked at: every layer from the reference's input and in the run
    config = jaxmllm.load(tmp_path / "model").config
    compared = {(each.component, each.kind) for phase in report.phases for each in phase.comparisons}
    for layer in range(config.text.num_layers):
        for site in ("keys", "values", "attn_in~faint"):
            assert (f"decoder.{layer}.{site}", "own") in compared
        for site in ("attn_in", "attn_probs", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"):
            assert {(f"decoder.{layer}.{site}", kind) for kind in ("own", "run")} <= compared
    assert all(each.floor.of for phase in report.phases for each in phase.comparisons)
    # samples hold no more than themselves, whatever they were taken of
    assert all(sample.base is None and len(sample) <= 512 for sample in report.samples.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_a_sound_port_passes_in_halves(variant, dtype, tmp_path):
    nothing_departs(validate(saved(variant, tmp_path / "model"), settings=Settings(phases=QUICK, dtype=dtype)))


@pytest.mark.slow
def test_the_embedded_model_passes_in_every_phase():
    report = validate(jaxmllm.__path__[0] + "/demo/model")
    nothing_departs(report)
    assert [phase.name for phase in report.phases] == list(PHASES)
    assert {phase.verdict for phase in report.phases} == {"passes"}


# --- recordings


def test_a_recording_is_compared_with_where_there_is_no_torch(folder, recording, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(InputError, match=r"PyTorch is not installed.*jaxmllm\[validate\].*--reference"):
        validate(folder)
    nothing_departs(validate(folder, reference=recording, settings=Settings(phases=("tensors", "decoder"))))


def test_a_store_is_compared_with_its_source(folder, recording, tmp_path):
    convert_checkpoint(folder, tmp_path / "store")
    phases = Settings(phases=("tensors", "connector"))
    with pytest.raises(InputError, match=r"is an Orbax store, which PyTorch does not read; .*--against"):
        validate(tmp_path / "store", settings=phases)
    nothing_departs(validate(tmp_path / "store", reference=recording, settings=phases))
    nothing_departs(validate(tmp_path / "store", against=folder, settings=phases))


def test_a_recording_has_floors_for_accelerators(recording):
    from jaxmllm.validation.recording import Recording

    for kind in ("own", "run"):
        of = Recording(recording).floor("decoder.1.mlp_out", kind).of
        assert (
            list(of) == ["float64", "other order", "tf32 products", "bf16 products", "bf16x3 products"] or kind == "run"
        )
        assert set(of) == {"float64", "other order", "tf32 products", "bf16 products", "bf16x3 products"}
        assert of["bf16 products"].mean > 4 * of["tf32 products"].mean > 16 * of["bf16x3 products"].mean
        assert of["bf16x3 products"].mean > of["float64"].mean > 0


@pytest.mark.slow
def test_a_port_that_rounds_products_passes_where_its_backend_does_and_nowhere_else(folder, recording, monkeypatch):
    """A TPU by default: operands of products are bfloat16. Here linear maps do it, on a CPU."""

    def rounded(self, inputs, out_sharding=None):
        inputs, kernel = (part.astype(jnp.bfloat16).astype(jnp.float32) for part in (inputs, self.kernel[...]))
        product = inputs @ kernel
        return product if self.bias is None else product + self.bias[...]

    def verdict(backend, precision):
        monkeypatch.setattr(compare.jax, "default_backend", lambda: backend)
        settings = Settings(phases=("connector", "decoder", "logits"), precision=precision)
        return validate(folder, reference=recording, settings=settings).verdict

    monkeypatch.setattr(nnx.Linear, "__call__", rounded)
    jax.clear_caches()
    try:
        assert verdict("tpu", "default") == "passes"
        assert {verdict("tpu", "high"), verdict("tpu", "highest"), verdict("gpu", "default")} == {"differs"}
    finally:
        jax.clear_caches()


def test_a_recording_of_another_model_or_type_is_refused(folder, recording, tmp_path):
    other = saved("qwen2_vl", tmp_path / "other")
    with pytest.raises(InputError, match=r"is of a llava model; this one is qwen2_vl"):
        validate(other, reference=recording)
    with pytest.raises(InputError, match=r"PyTorch computed in float32, the port computes in bfloat16; give --dtype"):
        validate(folder, reference=recording, settings=Settings(dtype="bfloat16"))


def test_a_failed_recording_leaves_nothing(folder, tmp_path, monkeypatch):
    from jaxmllm.validation.torch_side import record as side

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(side, "record_components", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        record(folder, tmp_path / "reference")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(dtype="float8"), "dtype is 'float8'; expected one of float32, bfloat16, float16"),
        (Settings(precision="low"), "precision is 'low'; expected one of default, high, highest"),
        (Settings(phases=("decoders",)), "phases are decoders; expected some of tensors, preprocessing"),
        (Settings(phases=()), "phases are none; expected some of"),
        (Settings(new_tokens=0), "new_tokens is 0; expected at least 1"),
    ],
)
def test_settings_that_do_not_exist(folder, settings, message):
    with pytest.raises(InputError, match=message):
        validate(folder, settings=settings)


# --- one layer at a time


def test_streamed_and_whole_give_the_same_figures(folder, recording):
    phases = Settings(phases=COMPONENT_PHASES)
    whole = validate(folder, reference=recording, settings=dataclasses.replace(phases, streamed=False))
    streamed = validate(folder, reference=recording, settings=dataclasses.replace(phases, streamed=True))
    nothing_departs(streamed)
    assert (whole.settings["streamed"], streamed.settings["streamed"]) == (False, True)
    figures = [
        {(each.component, each.kind): each.errors for phase in report.phases for each in phase.comparisons}
        for report in (whole, streamed)
    ]
    assert set(figures[0]) == set(figures[1])
    own = [name for name in figures[0] if name[1] == "own"]
    assert [figures[0][name] for name in own] == [figures[1][name] for name in own]


def test_weights_of_a_narrow_type_are_kept_in_it(folder, tmp_path):
    for path in folder.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    tensors = load_file(folder / "model.safetensors")
    halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(halves, tmp_path / "model.safetensors")
    ports = [from_folder(tmp_path, "float32", streamed) for streamed in (False, True)]
    leaf = "decoder/layers/mlp/up/kernel"
    assert [port.read(leaf, 1).dtype for port in ports] == [np.float32, ml_dtypes.bfloat16]
    inputs = tiny_inputs(ports[0])
    given = np.random.default_rng(0).normal(size=(*inputs.input_ids.shape, ports[0].config.text.hidden_size))
    whole, streamed = (decoder.layer_sites(port, 1, given, inputs, None) for port in ports)
    for site, value in whole.items():  # the numbers are the same; products may sum them in another order
        np.testing.assert_allclose(streamed[site], value, atol=2e-6, err_msg=site)


def tiny_inputs(port):
    ids = np.random.default_rng(1).integers(3, 80, (2, 7))
    return port.inputs({"input_ids": ids, "attention_mask": np.ones_like(ids)})


def test_what_needs_the_whole_model_is_skipped_and_says_so(folder, recording):
    report = validate(folder, reference=recording, settings=Settings(phases=BEHAVIOUR_PHASES, streamed=True))
    assert {phase.verdict for phase in report.phases} == {"skipped"}
    assert all("one layer was held at a time" in phase.summary for phase in report.phases)


def test_memory_decides_whether_to_stream(folder, monkeypatch):
    assert not run.must_stream(folder)
    monkeypatch.setattr(run.os, "sysconf", lambda name: 1024)
    assert run.must_stream(folder)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_folder_that_lacks_what_no_logit_needs(streamed, tmp_path):
    """Exports from a store lack CLIP's layers behind the one that is read."""
    folder = saved("grouped_queries", tmp_path / "model")
    convert_checkpoint(folder, tmp_path / "store")
    assert export_checkpoint(tmp_path / "store", tmp_path / "exported")
    settings = Settings(phases=("tensors", "connector"), streamed=streamed)
    nothing_departs(validate(tmp_path / "exported", settings=settings))


# --- departures


@pytest.fixture(scope="module")
def model(folder):
    return jaxmllm.load(folder)


def changed(model, change):
    params = jax.tree.map(lambda leaf: leaf, model.params)
    change(params)
    return dataclasses.replace(model, params=params)


def test_a_wrong_weight_is_named_with_its_layer_and_how_it_is_wrong(model, recording):
    def scale(params):
        kernel = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
        params["decoder"]["layers"]["mlp"]["up"]["kernel"] = kernel.at[2].multiply(1.5)

    report = validate(changed(model, scale), reference=recording, settings=Settings(phases=("tensors", "decoder")))
    assert (report.verdict, report.exit_code) == ("differs", 1)
    assert report.first == "decoder/layers/mlp/up/kernel[2]"
    assert "multiplied by about 1.5" in report.causes[0].name
    departing = {each.component for each in report.phase("decoder").departures if each.kind == "own"}
    assert departing == {"decoder.2.mlp_out", "decoder.2.resid_post"}
    assert any("scaled" in cause.name or "times" in cause.name for cause in report.phase("decoder").causes)


def test_phases_go_on_after_one_that_cannot_run(model, recording, monkeypatch):
    from jaxmllm.validation.port import images

    def fail(*_, **__):
        raise ZeroDivisionError("no grid")

    monkeypatch.setattr(images, "vision_embed", fail)
    report = validate(model, reference=recording, settings=Settings(phases=COMPONENT_PHASES))
    assert report.phase("vision").findings == ("ZeroDivisionError: no grid",)
    assert report.phase("decoder").verdict == "passes"
    # where PyTorch computes, a port that fails differs
    assert (report.verdict, report.exit_code, report.first) == ("differs", 1, "vision")


def test_a_machine_that_is_too_small_says_nothing_of_the_port(model, recording, monkeypatch):
    from jaxmllm.validation.port import images

    def fail(*_, **__):
        raise MemoryError("8 GB")

    monkeypatch.setattr(images, "vision_embed", fail)
    report = validate(model, reference=recording, settings=Settings(phases=("vision", "logits")))
    assert report.phase("vision").verdict == "failed"
    assert (report.verdict, report.exit_code, report.first) == ("failed", 2, None)


def test_numbers_that_are_not_finite_depart(model, recording):
    def poison(params):
        params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"].at[3].set(jnp.nan)

    report = validate(changed(model, poison), reference=recording, settings=Settings(phases=("decoder", "logits")))
    assert report.first == "final_norm"
    assert {each.component for each in report.phase("logits").departures} == {"final_norm", "logits"}
    json.dumps(report.to_json(), allow_nan=False)


def test_a_damaged_recording_is_named(folder, recording, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(recording, broken)
    name = sorted(broken.glob("arrays-*"))[0]
    name.write_bytes(name.read_bytes()[: name.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"{name.name}.*cannot be read"):
        validate(folder, reference=broken, settings=Settings(phases=("tensors",)))


@pytest.mark.parametrize(
    "variant",
    ["next_llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ONE_OF_EACH)],
)
def test_of_large_arrays_rows_are_kept_and_what_the_port_starts_from_whole(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(components, "MOST_VALUES", 200)
    monkeypatch.setattr(components, "ALL_ROWS", 8)
    monkeypatch.setattr(components, "SOME_ROWS", 6)
    folder = saved(variant, tmp_path / "model")
    recorded = record(folder, tmp_path / "reference", settings=Settings(phases=COMPONENT_PHASES))
    cut = [name for name in recorded.names() if recorded.rows(name) is not None]
    assert {"vision.0.mlp_out", "decoder.0.attn_probs", "decoder.1.keys", "logits"} <= set(cut)
    nothing_departs(validate(folder, reference=recorded.folder, settings=Settings(phases=COMPONENT_PHASES)))


def test_every_position_is_compared_in_long_prompts(model, recording):
    """Of long sequences rows are kept, but the residual stream whole, so that no position is passed over."""
    from jaxmllm.validation.components import keep, sequence_rows

    valid = np.ones((1, 600), bool)
    rows = sequence_rows(valid, [599, 17])
    assert {17, 599} <= set(rows) and len(rows) < 60
    array = np.arange(600.0)[None, :, None]
    np.testing.assert_array_equal(keep("decoder.0.mlp_out", array, rows)[0, :, 0], rows)
