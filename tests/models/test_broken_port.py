"""The parity comparison notices a broken port: each of these mistakes, planted, makes it fail."""

import copy
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

import jaxmllm
from tests.models.test_parity import compare
from tests.support import tiny


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny.make_pair("class_token_biases", tmp_path_factory.mktemp("sound"))


def with_config(pair, folder, change):
    """The same weights, read by another config."""
    shutil.copytree(pair.folder, folder)
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))
    return dataclasses.replace(pair, jax=jaxmllm.load(folder))


def with_params(pair, change):
    """Other weights."""
    params = copy.deepcopy(jax.tree.map(lambda leaf: leaf, pair.jax.params))
    change(params)
    return dataclasses.replace(pair, jax=dataclasses.replace(pair.jax, params=params))


def swap_gate(params):
    mlp = params["decoder"]["layers"]["mlp"]
    mlp["gate"], mlp["up"] = mlp["up"], mlp["gate"]


def transpose_square_kernel(params):
    kernels = params["vision"]["layers"]["attention"]["out"]
    kernels["kernel"] = jnp.swapaxes(kernels["kernel"], 1, 2)


def swap_position_rows(params):
    params["vision"]["position_embed"] = jnp.roll(params["vision"]["position_embed"], 1, axis=0)


def drop_bias(block, name):
    def change(params):
        part = params[block]["layers"]["attention"][name]
        part["bias"] = jnp.zeros_like(part["bias"])

    return change


PARAM_FAULTS = {
    "gate and up swapped": swap_gate,
    "bias dropped in the decoder": drop_bias("decoder", "query"),
    "bias dropped in the vision tower": drop_bias("vision", "out"),
    "square kernel transposed": transpose_square_kernel,
    "positions off by one in the vision tower": swap_position_rows,
}
CONFIG_FAULTS = {
    "wrong rotary base": lambda fields: fields["text_config"].update(
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}
    ),
    "feature layer off by one": lambda fields: fields.update(vision_feature_layer=-2),
    "wrong norm epsilon": lambda fields: fields["text_config"].update(rms_norm_eps=1e-2),
    "wrong activation": lambda fields: fields["vision_config"].update(hidden_act="gelu"),
}


def inputs_of(pair):
    return tiny.make_inputs(pair, tiny.LAYOUTS["unlike_lengths"])


def test_the_sound_port_passes(sound):
    compare(sound, inputs_of(sound), None)


@pytest.mark.parametrize("fault", PARAM_FAULTS)
def test_parity_notices_wrong_weights(sound, fault):
    with pytest.raises(AssertionError):
        compare(with_params(sound, PARAM_FAULTS[fault]), inputs_of(sound), None)


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_parity_notices_a_wrong_config(sound, fault, tmp_path):
    with pytest.raises(AssertionError):
        compare(with_config(sound, tmp_path / "broken", CONFIG_FAULTS[fault]), inputs_of(sound), None)
