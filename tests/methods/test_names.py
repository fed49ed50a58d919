"""Methods in words."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm import methods
from jaxmllm.errors import InputError
from jaxmllm.methods import METHODS, Method, parse_method, spell


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("base", Method()),
        ("vcd:alpha=1,beta=0.2", methods.Vcd(alpha=1.0, beta=0.2)),
        ("vcd:preset=llava,alpha=0.7", methods.Vcd(alpha=0.7, beta=0.2, seed=55)),
        (" vicrop : map = grad-att , layer = 3 ", methods.ViCrop(map="grad-att", layer=3)),
        ("vicrop:general=how many objects are there ?", methods.ViCrop(general="how many objects are there ?")),
        ("dola:candidates=1+3,norm=true", methods.Dola(candidates=(1, 3), norm=True)),
        ("contrastive:post=mean,pre=0", methods.ContrastiveReinput(post="mean", pre=0)),
        ("contrastive:post=3", methods.ContrastiveReinput(post=3)),
        ("opera:preset=fast", methods.Opera(candidates=1, threshold=25)),
    ],
)
def test_specs(spec, method):
    assert parse_method(spec) == method


def test_fusion_layers_reach_the_methods_that_use_them():
    assert parse_method("contrastive", [2, 4]) == methods.ContrastiveReinput(fusion_layers=(2, 4))
    assert parse_method("contrastive:fusion_layers=1", [2, 4]).fusion_layers == (1,)
    assert parse_method("vcd", [2, 4]) == methods.Vcd()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magic", "no method 'magic'; expected one of base, contrastive"),
        ("vcd:gamma=1", "no option 'gamma'; there are alpha, beta"),
        ("vcd:alpha", "'alpha' is no option"),
        ("vcd:alpha=1,alpha=2", "each name once"),
        ("vcd:alpha=much", "expected a number"),
        ("opera:beams=2.5", "expected a whole number"),
        ("dola:norm=maybe", "expected true or false"),
        ("dola:candidates=1+x", "numbers joined by"),
        ("vicrop:layer=deep", "expected int"),
        ("opera:preset=slow", "no preset 'slow' of opera; there are code, fast"),
        ("second-look:preset=x", "there are none"),
        ("vcd:beta=2", "beta"),
    ],
)
def test_errors_say_what_there_is(spec, message):
    with pytest.raises(InputError, match=message):
        parse_method(spec)


@given(st.sampled_from(sorted(METHODS)), st.data())
def test_a_method_is_spelt_and_read_again(name, data):
    kind = METHODS[name]
    presets = data.draw(st.sampled_from(["", *kind.presets])) if kind.presets else ""
    method = parse_method(f"{name}:preset={presets}" if presets else name)
    numbers = [field.name for field in dataclasses.fields(method) if type(getattr(method, field.name)) is int]
    if numbers and name not in ("opera",):
        method = dataclasses.replace(method, **{data.draw(st.sampled_from(numbers)): data.draw(st.integers(1, 99)) | 1})
    assert parse_method(spell(method)) == method


def test_every_method_says_what_it_is():
    for name, kind in METHODS.items():
        assert kind.name == name and kind.__doc__
