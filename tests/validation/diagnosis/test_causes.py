"""Wrong weights, a wrong config, rounding, orders and patterns are told apart."""

import copy
import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmllm.validation.diagnosis import hints_for_phase, likely_causes
from jaxmllm.validation.diagnosis.causes import study_of
from jaxmllm.validation.diagnosis.hypotheses import CONFIRMED
from jaxmllm.validation.diagnosis.token_order import in_windows, matched_rows
from jaxmllm.validation.diagnosis.weights import how_they_differ
from tests.validation.diagnosis.cases import loaded, make_case, noisy, with_params
from tests.validation.diagnosis.plain import as_computed, plain_reference


@pytest.fixture(scope="module")
def sound():
    return plain_reference("class_token_biases")


def faulty(sound, component, model, **more):
    """The case of a port with other weights or another config, which computes what they say."""
    array = sound.arrays[component]
    got = as_computed(study_of(make_case(sound, component, array, model)), array.shape)
    return make_case(sound, component, noisy(got), model, **more)


def swap_gate(params):
    mlp = params["decoder"]["layers"]["mlp"]
    mlp["gate"], mlp["up"] = mlp["up"], mlp["gate"]


def transpose_out(params):
    out = params["vision"]["layers"]["attention"]["out"]
    out["kernel"] = jnp.swapaxes(out["kernel"], 1, 2)


def drop_key_bias(params):
    key = params["decoder"]["layers"]["attention"]["key"]
    key["bias"] = jnp.zeros_like(key["bias"])


def round_down(params):
    down = params["decoder"]["layers"]["mlp"]["down"]
    down["kernel"] = down["kernel"].astype(jnp.bfloat16).astype(jnp.float32)


WEIGHTS = {
    "swapped": ("decoder.1.mlp_out", swap_gate, "swapped", True),
    "transposed": ("vision.1.attn_out", transpose_out, "transposed", True),
    "zeros": ("decoder.1.keys", drop_key_bias, "zeros", False),
    "rounded": ("decoder.1.mlp_out", round_down, "rounded to bfloat16", False),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_wrong_weights(sound, fault):
    component, change, word, without_checkpoint = WEIGHTS[fault]
    model = with_params(sound.model, change)
    first = likely_causes(faulty(sound, component, model, tensors=True))[0]
    assert word in first.name and first.explained >= CONFIRMED and first.evidence
    if without_checkpoint:
        first = likely_causes(faulty(sound, component, model))[0]
        assert word in first.name and "in the port's weights" in first.name


def with_text(**fields):
    return lambda config: dataclasses.replace(config, text=dataclasses.replace(config.text, **fields))


def other_base(config):
    return with_text(rope=dataclasses.replace(config.text.rope, theta=5e5))(config)


CONFIGS = {
    "rotary base": ("decoder.1.keys", other_base, "rotary base 10000"),
    "epsilon": ("decoder.1.attn_in~faint", with_text(rms_norm_eps=1e-2), "norm epsilon 1e-05"),
    "activation": ("decoder.1.mlp_out", with_text(hidden_act="silu"), "activation gelu instead of silu"),
    "tied head": ("logits", with_text(tie_word_embeddings=True), "not tied"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_wrong_config(sound, fault):
    component, change, word = CONFIGS[fault]
    model = dataclasses.replace(sound.model, config=change(sound.model.config))
    first = likely_causes(faulty(sound, component, model))[0]
    assert word in first.name and first.explained >= CONFIRMED
    assert "weights and config say" in first.evidence


def test_an_unusual_epsilon_is_solved_for(sound):
    config = with_text(rms_norm_eps=0.37)(sound.model.config)
    got = faulty(sound, "decoder.1.attn_in", dataclasses.replace(sound.model, config=config)).got
    first = likely_causes(make_case(sound, "decoder.1.attn_in", got))[0]
    assert first.name == "norm epsilon 0.37"


def test_rounding_is_told_by_the_numbers(sound):
    array = sound.arrays["decoder.1.mlp_out"]
    first = likely_causes(make_case(sound, "decoder.1.mlp_out", array.astype(ml_dtypes.bfloat16).astype(np.float32)))[0]
    assert "bfloat16" in first.name and first.explained >= CONFIRMED
    sized = likely_causes(make_case(sound, "decoder.1.mlp_out", noisy(array, size=3e-3)))
    assert "bfloat16" in sized[0].name and sized[0].explained is None and sized[0].evidence


def test_a_reference_in_half_precision_has_no_finer_numbers(sound):
    array = sound.arrays["decoder.1.mlp_out"].astype(ml_dtypes.bfloat16).astype(np.float32)
    sound = dataclasses.replace(sound, arrays={**sound.arrays, "decoder.1.mlp_out": array})
    got = noisy(array, size=3e-3).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert not any("bfloat16" in cause.name for cause in likely_causes(make_case(sound, "decoder.1.mlp_out", got)))


def test_positions(sound):
    ids, mask = (sound.inputs[name] for name in ("input_ids", "attention_mask"))
    mask = np.ones_like(mask)
    mask[1, :2] = 0
    right = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    sound = dataclasses.replace(sound, inputs={**sound.inputs, "attention_mask": mask}, arrays={"positions": right})
    counted = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    first = likely_causes(make_case(sound, "positions", counted))[0]
    assert first.name == "positions counted with padding" and first.explained == 1.0
    assert likely_causes(make_case(sound, "positions", right + 1))[0].name == "positions one too high"


def test_a_factor_and_a_bias(sound):
    array = sound.arrays["decoder.1.mlp_out"]
    assert "scaled by 1.7" in likely_causes(make_case(sound, "decoder.1.mlp_out", 1.7 * array))[0].name
    row = np.random.default_rng(0).normal(size=array.shape[-1]).astype(np.float32)
    assert "bias" in likely_causes(make_case(sound, "decoder.1.mlp_out", array + row))[0].name


def test_what_departs_is_told(sound):
    rng = np.random.default_rng(1)

    def names(component, change):
        got = sound.arrays[component].copy()
        change(got)
        return " | ".join(cause.name for cause in likely_causes(make_case(sound, component, got)))

    def head(got):
        got[:, 2] = rng.random(got[:, 2].shape)

    def positions(got):
        got[:, 4:7] += rng.normal(size=got[:, 4:7].shape)

    def features(got):
        got[..., ::2] += rng.normal(size=got[..., ::2].shape)

    assert "heads depart: 2 of 4" in names("decoder.1.attn_probs", head)
    assert "positions depart: 4-6" in names("decoder.1.mlp_out", positions)
    assert "features of a head depart: every second from 0 on" in names("decoder.1.keys", features)


def test_numbers_that_are_not_finite(sound):
    got = sound.arrays["decoder.1.attn_in"].copy()
    got[0, 3] = np.nan
    assert likely_causes(make_case(sound, "decoder.1.attn_in", got))[0].name == "the port's numbers are not finite"


def test_another_shape(sound):
    got = sound.arrays["decoder.1.attn_in"][:, :-1]
    assert likely_causes(make_case(sound, "decoder.1.attn_in", got))[0].name == "the array has another shape"


def test_the_run_at_another_layer(sound):
    sound = dataclasses.replace(sound, arrays=copy.copy(sound.arrays))
    got = sound.arrays["decoder.2.resid_post"]
    (first, *_) = likely_causes(make_case(sound, "decoder.1.resid_post", got, kind="run"))
    assert "belongs to layer 2" in first.name and first.explained == 1.0
    follows = likely_causes(
        make_case(sound, "decoder.1.resid_post", noisy(got, size=0.3), kind="run", departures=("decoder.0.keys",))
    )
    assert "follows from decoder.0.keys" in follows[0].name


def tokens(name, change):
    sound = loaded(name)
    config, rng = sound.model.config, np.random.default_rng(3)
    if config.model_type == "llava_next":
        tilings = [config.tiling((int(y), int(x))) for y, x in sound.inputs["image_sizes"]]
        rows = sum(len(tiling.order) for tiling in tilings)
        kept, base = tilings[0].kept, tilings[0].grid ** 2
    else:
        grid = sound.inputs["image_grid_thw"][0]
        rows, kept, base = int(grid.prod()) // 4, (int(grid[1]) // 2, int(grid[2]) // 2), 0
    array = rng.normal(size=(rows, config.text.hidden_size)).astype(np.float32)
    got = change(array, base, kept)
    sound = dataclasses.replace(sound, arrays={"image_tokens": array})
    return likely_causes(make_case(sound, "image_tokens", got))


def without_newlines(array, base, kept):
    lines = array[base:].reshape(kept[0], -1, array.shape[-1])[:, :-1]
    return np.concatenate([array[:base], lines.reshape(-1, array.shape[-1])])


ORDERS = {
    "newline tokens missing": ("next_llama", without_newlines),
    "tiles before the whole image": ("next_llama", lambda a, base, kept: np.concatenate([a[base:], a[:base]])),
    "grid transposed": ("qwen2_5_vl", lambda a, base, kept: a[np.arange(len(a)).reshape(kept).T.ravel()]),
    "window order": ("qwen2_5_vl", lambda a, base, kept: a[in_windows(np.arange(len(a)).reshape(kept), 2)]),
    "shifted by 1 row": ("qwen2_5_vl", lambda a, base, kept: np.concatenate([a[1:], a[-1:]])),
}


@pytest.mark.parametrize("word", ORDERS)
def test_orders_of_image_tokens(word):
    name, change = ORDERS[word]
    first = tokens(name, change)[0]
    assert word in first.name and first.explained >= CONFIRMED


def test_rows_are_matched():
    rows = np.random.default_rng(0).normal(size=(20, 8))
    order = np.random.default_rng(1).permutation(20)
    found, share = matched_rows(rows[order], rows)
    np.testing.assert_array_equal(found, order)
    assert share == 1
    assert matched_rows(rows + 1, rows)[1] == 0


def test_how_weights_differ():
    rng = np.random.default_rng(0)
    want, other = rng.normal(size=(2, 6, 6)).astype(np.float32)
    known = {"other": other}.get

    def words(have):
        return how_they_differ(have.astype(np.float32), want, known, ["other"])

    assert words(want.T) == "transposed"
    assert words(-want) == "negated"
    assert words(0 * want) == "all zeros"
    assert words(2.5 * want) == "scaled by 2.5"
    assert words(other) == "holds the tensor of other"
    assert words(np.roll(want, 1, axis=0)) == "rows rolled by 1"
    assert words(want[:, ::-1]).startswith("columns in another order")
    changed = want.copy()
    changed[0, 0] += 1
    assert words(changed).startswith("1 of 36 numbers differ")


def test_hints_of_phases():
    causes = hints_for_phase("edits", ["knockout: logits depart"])
    assert "knocked out" in causes[0].name and causes[0].explained is None and causes[0].where
    for phase in ("tensors", "preprocessing", "answer", "generation", "edits", "contrast"):
        assert hints_for_phase(phase, [])
    assert hints_for_phase("vision", ["anything"]) == ()
