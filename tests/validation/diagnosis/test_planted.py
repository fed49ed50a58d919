"""Every mistake that is known is found when it is planted, and on noise alone none is."""

import numpy as np
import pytest

from jaxmllm.validation.diagnosis import likely_causes
from jaxmllm.validation.diagnosis.causes import study_of
from jaxmllm.validation.diagnosis.hypotheses import CONFIRMED
from jaxmllm.validation.diagnosis.sample import distance
from tests.validation.diagnosis.cases import make_case, noisy
from tests.validation.diagnosis.plain import plain_reference

# Between them: biases, tied and apart heads, scaled rotary embedding, grouped keys, M-RoPE, windows, gated towers.
NAMES = ("class_token_biases", "llama3_rope", "qwen2_5_vl")
SEEN = 3e-5  # of the scale: a mistake that changes less is no departure
SITES = {
    "norms": ("decoder.1.attn_in", "decoder.1.mlp_in~faint", "vision.1.attn_in~faint", "vision.1.mlp_in", "final_norm"),
    "rotary": ("rotary", "decoder.1.keys"),
    "values": ("decoder.1.values", "decoder.1.resid_mid", "vision.1.resid_post", "vision.embed"),
    "blocks": ("decoder.1.mlp_out", "vision.1.mlp_out", "logits"),
    "weights": ("decoder.1.attn_probs",),
    "outputs": ("decoder.1.attn_out", "vision.1.attn_out"),
}


def planted(sound, component):
    """Every variation of a component that shows, with its array."""
    study = study_of(make_case(sound, component, sound.arrays[component]))
    right = study.correct()
    scale = np.sqrt(np.mean(right[study.sample.mask] ** 2))
    for variation in study.variations:
        with np.errstate(all="ignore"):
            array = variation.compute()
        if array is None or array.shape != right.shape or not np.isfinite(array).all():
            continue
        if distance(array, right, study.sample.mask) > SEEN * scale:
            yield study, variation, array


def same(study, name, array):
    """Whether the variation of that name makes the same array, to noise."""
    for other in study.variations:
        if other.change.name == name:
            found = other.compute()
            size = distance(array, study.correct(), study.sample.mask)
            return found is not None and distance(found, array, study.sample.mask) <= 0.02 * size
    return False


@pytest.mark.parametrize("group", SITES)
@pytest.mark.parametrize("name", NAMES)
def test_planted_mistakes_are_found(name, group):
    sound, count = plain_reference(name), 0
    every = 2 if group in ("norms", "values", "blocks") else 7
    for component in SITES[group]:
        for number, (study, variation, array) in enumerate(planted(sound, component)):
            if number % every:
                continue
            got = noisy(array.reshape(sound.arrays[component].shape))
            first = likely_causes(make_case(sound, component, got))[0]
            assert first.explained is not None and first.explained >= CONFIRMED, (component, variation.change.name)
            wanted = variation.change.name
            assert first.name == wanted or same(study, first.name, array), (component, wanted, first.name)
            count += 1
    assert count > 3


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_not_explained(name):
    sound = plain_reference(name)
    components = [each for sites in SITES.values() for each in sites]
    for component in components:
        for size in (1e-7, 1e-6):
            causes = likely_causes(make_case(sound, component, noisy(sound.arrays[component], size=size)))
            assert not [cause for cause in causes if (cause.explained or 0) >= 0.5], component


def test_some_rows_are_enough():
    sound = plain_reference("llama3_rope")
    rows = (0, 3, 5, 6, 9, 10, 13)
    for component in ("decoder.1.keys", "decoder.1.attn_probs", "decoder.1.attn_out", "decoder.1.mlp_out"):
        for number, (_, variation, array) in enumerate(planted(sound, component)):
            if number == 3:
                causes = likely_causes(make_case(sound, component, noisy(array), rows=rows))
                assert causes[0].name == variation.change.name


def test_what_cannot_be_computed_gives_hints():
    sound = plain_reference("llama3_rope")
    rng = np.random.default_rng(0)
    got = sound.arrays["decoder.1.mlp_out"] + rng.normal(size=sound.arrays["decoder.1.mlp_out"].shape) ** 3
    causes = likely_causes(make_case(sound, "decoder.1.mlp_out", got.astype(np.float32)))
    assert causes and all(cause.explained is None for cause in causes)
    assert any("activation" in cause.name for cause in causes)
    assert len(causes) <= 6
