"""A reference without JAX: every component by the diagnosis' own plain computation, from random inputs."""

import functools

import numpy as np

from jaxmllm.validation.components import BLOCK_SITES, DECODER_SITES
from jaxmllm.validation.diagnosis.causes import study_of
from tests.validation.diagnosis.cases import Reference, loaded, make_case


@functools.cache
def plain_reference(name):
    """Of a tiny checkpoint; block 1 of the vision tower and layer 1 of the decoder."""
    model, inputs = loaded(name).model, loaded(name).inputs
    rng = np.random.default_rng(7)
    text, vision = model.config.text, model.config.vision
    examples, length = inputs["input_ids"].shape
    sound = Reference(model, inputs, {})
    arrays = sound.arrays

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def compute(component, *shape):
        arrays[component] = np.zeros(shape, np.float32)
        arrays[component] = as_computed(study_of(make_case(sound, component, arrays[component])), shape)

    if hasattr(vision, "merge"):
        rows = (len(inputs["pixel_values"]), vision.hidden_size)
    else:
        rows = (len(inputs["pixel_values"]), vision.num_patches + 1, vision.hidden_size)
    compute("vision.embed", *rows)
    arrays["vision.1.resid_pre"] = random(*rows)
    for site in BLOCK_SITES[1:]:
        compute(f"vision.1.{site}", *rows)
    states = (examples, length, text.hidden_size)
    compute("rotary", examples, length, 2 * text.head_dim)
    arrays["decoder.1.resid_pre"] = random(*states)
    heads = {"keys": text.num_kv_heads, "values": text.num_kv_heads}
    for site in DECODER_SITES[1:]:
        shape = (examples, length, heads[site], text.head_dim) if site in heads else states
        shape = (examples, text.num_heads, length, length) if site == "attn_probs" else shape
        compute(f"decoder.1.{site}", *shape)
    for layer in range(text.num_layers):
        arrays.setdefault(f"decoder.{layer}.resid_post", random(*states))
    compute("final_norm", *states)
    compute("logits", examples, length, text.vocab_size)
    return sound


def as_computed(study, shape):
    """The plain computation's array."""
    return study.correct().astype(np.float32).reshape(shape)
