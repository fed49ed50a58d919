"""Departures to diagnose: a sound port's arrays are the reference, those of a faulty one or planted ones the port."""

import copy
import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

import jaxmllm
from jaxmllm.convert.plan import flatten
from jaxmllm.validation.components import along_sequence, keep, meaningful, split
from jaxmllm.validation.diagnosis import Case
from jaxmllm.validation.port import decoder, images
from jaxmllm.validation.port.model import from_model

GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model, its inputs and every component from its own input."""

    model: jaxmllm.Model
    inputs: dict
    arrays: dict


@functools.cache
def loaded(name):
    """A tiny checkpoint with its inputs, without any component."""
    model = jaxmllm.load(GOLDENS / name)
    with np.load(GOLDENS / name / "golden.npz") as golden:
        inputs = {key.removeprefix("inputs/"): golden[key] for key in golden if key.startswith("inputs/")}
    return Reference(model, inputs, {})


@functools.cache
def reference(name):
    """A tiny checkpoint with every component of the port."""
    bare = loaded(name)
    return dataclasses.replace(bare, arrays=components_of(bare.model, bare.inputs))


def components_of(model, arrays, given=None):
    """Every component, each from the input that ``given`` holds, by default from what the model itself gave."""
    port = from_model(model)
    inputs = port.inputs(arrays)
    out = {}

    def entering(name):
        return (given or out)[name]

    tokens = None
    if inputs.images is not None:
        out["vision.embed"] = images.vision_embed(port, inputs, arrays)
        hidden = entering("vision.embed")
        blocks = images.Blocks(port, inputs, arrays)
        for number in range(blocks.depth):
            hidden = hidden if given is None else given[f"vision.{number}.resid_pre"]
            sites = {"resid_pre": hidden, **blocks.sites(number, hidden)}
            out |= {f"vision.{number}.{site}": value for site, value in sites.items()}
            hidden = sites["resid_post"]
        features = images.vision_features(port, inputs, arrays)
        if features is not None:
            out["vision.features"] = features
            hidden = entering("vision.features")
        if hasattr(model.config, "qformer"):
            source, state = hidden, images.qformer_embed(port, inputs)
            for number in range(model.config.qformer.num_layers):
                state = state if given is None else given[f"qformer.{number}.resid_pre"]
                sites = {"resid_pre": state, **images.qformer_sites(port, inputs, number, state, source)}
                if number not in model.config.qformer.cross_layers:
                    del sites["cross_out"]
                out |= {f"qformer.{number}.{site}": value for site, value in sites.items()}
                state = sites["resid_post"]
        out["connector"] = images.connector(port, inputs, arrays, hidden)
        out["image_tokens"] = images.arranged(port, inputs, arrays, entering("connector"))
        tokens = images.padded_tokens(inputs, entering("image_tokens"))
    out["positions"] = decoder.positions(port, inputs)
    out["rotary"] = decoder.rotary(port, inputs)
    out["embedding"] = decoder.embedding(port, inputs, tokens)
    hidden = entering("embedding")
    for number in range(port.num_layers):
        hidden = hidden if given is None else given[f"decoder.{number}.resid_pre"]
        sites = decoder.layer_sites(port, number, hidden, inputs, None)
        out |= {f"decoder.{number}.{site}": value for site, value in sites.items()}
        hidden = sites["resid_post"]
    out["final_norm"] = decoder.final_norm(port, hidden if given is None else given[f"decoder.{number}.resid_post"])
    out["logits"] = decoder.logits(port, entering("final_norm"))
    return out


def make_case(sound, component, got, model=None, rows=None, tensors=False, kind="own", **more):
    """A departure of one component.

    Args:
      sound: the reference.
      component: that departs.
      got: the port's whole array.
      model: the port; by default as the reference.
      rows: the positions that are kept; ``None`` for all.
      tensors: whether the checkpoint is at hand.
    """
    port = sound.model if model is None else model
    mine, theirs = flatten(port.params), flatten(sound.model.params)
    number = split(component)[1]

    def kept(name, array):
        return keep(name, array, rows) if along_sequence(name) else array

    def read(name):
        array = sound.arrays.get(name)
        return array if array is None or name.endswith("resid_pre") else kept(name, array)

    def pick(leaves, path):
        value = leaves.get(path)
        if value is None:
            return None
        if "/layers/" in path:
            return np.asarray(value[number])
        if path.startswith("qformer/cross/"):
            return np.asarray(value[number // port.config.qformer.cross_attention_frequency])
        return np.asarray(value)

    got, expected = kept(component, got), kept(component, sound.arrays[component])
    part_rows = rows if along_sequence(component) else None
    return Case(
        component=component,
        kind=kind,
        got=got,
        expected=expected,
        mask=meaningful(component, expected.shape, part_rows, sound.inputs),
        rows=part_rows,
        read=read,
        leaf=lambda path: pick(mine, path),
        tensor=lambda path: pick(theirs, path) if tensors else None,
        inputs=sound.inputs,
        config=port.config,
        **more,
    )


def noisy(array, seed=0, size=2e-7):
    """An array with float32's rounding noise, a few ulps of every number and of the scale."""
    rng = np.random.default_rng(seed)
    wide = np.asarray(array, np.float64)
    scale = np.sqrt(np.mean(wide[np.isfinite(wide)] ** 2))
    noise = rng.normal(size=wide.shape) * size * (np.abs(wide) + 0.1 * scale)
    return (wide + noise).astype(np.float32)


def with_params(model, change):
    """Other weights."""
    params = copy.deepcopy(jax.tree.map(lambda leaf: leaf, model.params))
    change(params)
    return dataclasses.replace(model, params=params)
