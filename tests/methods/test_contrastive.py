"""Contrastive attention as a method: the paper's rule, its alternatives, and what is cut out."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import jaxmllm
from jaxmllm.analysis import contrastive_attention, pre_fusion_layer
from jaxmllm.analysis.attention import image_distribution
from jaxmllm.errors import InputError
from jaxmllm.methods import ContrastiveReinput, ReviewMask
from jaxmllm.methods.contrastive import soft_weights
from jaxmllm.methods.regions import ImageMap
from jaxmllm.models.capture import ATTENTION
from jaxmllm.models.layout import make_layout
from tests.methods.test_carve import whole_view
from tests.support import demo

LAYERS, BATCH, TOKENS = 8, 3, 12


def attention_rows(seed):
    return jnp.asarray(np.random.default_rng(seed).random((LAYERS, BATCH, TOKENS)) ** 4, jnp.float32)


def read(method, attention):
    ids = jnp.zeros((BATCH, TOKENS), jnp.int32)
    layout = make_layout(ids, jnp.ones_like(ids), 0, None, None, TOKENS)
    return method.reader(LAYERS)({ATTENTION: attention[:, :, None]}, layout)


@pytest.mark.parametrize("candidates", ["all", "deep", "shallow", "fusion"])
def test_the_papers_rule(candidates):
    """The reader equals the analysis functions, which follow the paper's formulas."""
    attention = attention_rows(0)
    method = ContrastiveReinput(fusion_layers=(1, 4), candidates=candidates)
    named = (1, 4) if candidates == "fusion" else candidates
    found = read(method, attention)
    np.testing.assert_array_equal(found["pre"], pre_fusion_layer(attention, named))
    np.testing.assert_allclose(found["contrast"], contrastive_attention(attention, candidates=named), atol=1e-6)


def test_alternatives():
    attention = attention_rows(1)
    shares = np.asarray(image_distribution(attention))
    for method, expected in [
        (ContrastiveReinput(pre=0, post="mean"), shares.mean(axis=0) - shares[0]),
        (ContrastiveReinput(pre=0, post="fusion", fusion_layers=(2, 3)), shares[2:4].mean(axis=0) - shares[0]),
        (ContrastiveReinput(pre=2, post=5, subtract=0.25), shares[5] - 0.25 * shares[2]),
        (ContrastiveReinput(pre=0, post="last", subtract=0), shares[-1]),
    ]:
        np.testing.assert_allclose(read(method, attention)["contrast"], expected, atol=1e-6)


def test_layers_that_are_missing():
    with pytest.raises(InputError, match="needs the model's fusion layers"):
        ContrastiveReinput().reader(LAYERS)
    with pytest.raises(InputError, match="no layers"):
        ContrastiveReinput(fusion_layers=(8,)).reader(LAYERS)
    with pytest.raises(InputError, match="no layers"):
        ContrastiveReinput(candidates="all", post=8).reader(LAYERS)
    for options in ({"candidates": "some"}, {"post": "first"}, {"refined": "blur"}, {"threshold": 0.0}):
        with pytest.raises(InputError, match=next(iter(options))):
            ContrastiveReinput(**options)


def picture(size):
    return Image.fromarray(np.random.default_rng(0).integers(1, 255, (size[1], size[0], 3), np.uint8))


def test_the_crop_holds_the_patches_that_gained():
    size = (80, 60)
    values = np.zeros((6, 8))
    values[2, 3], values[3, 4], values[5, 7] = 1.0, 0.6, 0.3
    found = ImageMap(values.ravel(), whole_view(6, 8, size))
    method = ContrastiveReinput(candidates="all", threshold=0.5, margin=0.0, smallest=0.0)
    refined, box = method.refine(picture(size), found)
    assert box == (30, 20, 50, 40) and refined.size == (20, 20)
    np.testing.assert_array_equal(np.asarray(refined), np.asarray(picture(size))[20:40, 30:50])
    wider = ContrastiveReinput(candidates="all", threshold=0.5, margin=1.0, smallest=0.0, scale=2.0)
    refined, box = wider.refine(picture(size), found)
    assert box == (20, 10, 60, 50) and refined.size == (80, 80)
    all_of_them = ContrastiveReinput(candidates="all", threshold=0.25, margin=0.0, smallest=0.0)
    assert all_of_them.refine(picture(size), found)[1] == (30, 10, 80, 60)
    values[2, 4] = 0.4
    joined = ContrastiveReinput(candidates="all", threshold=0.25, margin=0.0, smallest=0.0, region="connected")
    assert joined.refine(picture(size), ImageMap(values.ravel(), whole_view(6, 8, size)))[1] == (30, 20, 50, 40)


def test_a_segment_shows_the_kept_patches_alone():
    size = (80, 60)
    values = np.zeros((6, 8))
    values[2, 3], values[3, 4] = 1.0, 0.6
    method = ContrastiveReinput(candidates="all", refined="segment", margin=0.0, smallest=0.0)
    refined = np.asarray(method.refine(picture(size), ImageMap(values.ravel(), whole_view(6, 8, size)))[0])
    whole = np.asarray(picture(size))
    np.testing.assert_array_equal(refined[:10, :10], whole[20:30, 30:40])
    np.testing.assert_array_equal(refined[10:, 10:], whole[30:40, 40:50])
    assert not refined[:10, 10:].any() and not refined[10:, :10].any()


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["patches", "connected", "window"]),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.booleans(),
)
def test_crops_lie_in_the_image(seed, region, threshold, smallest, square):
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(20, 400)),) * 2 if square else tuple(rng.integers(20, 400, 2).tolist())
    found = ImageMap(rng.normal(size=30), whole_view(5, 6, size))
    method = ContrastiveReinput(candidates="all", region=region, threshold=threshold, smallest=smallest)
    refined, (left, top, right, bottom) = method.refine(Image.new("RGB", size), found)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert refined.size == (right - left, bottom - top)
    if region != "window":
        assert abs((right - left) - (bottom - top)) <= 1


def test_soft_weights():
    contrast = jnp.array([[0.3, -0.2, 0.1, 0.0, 9.0]])
    filled = jnp.array([[True, True, True, True, False]])
    weights = np.asarray(soft_weights(contrast, filled, 0.5, 0.8))[0]
    # the median of the filled is 0.05; the lowest loses 0.8, and 0.0 a fifth of that
    np.testing.assert_allclose(weights, [1, 0.2, 1, 1 - 0.8 * 0.05 / 0.25, 1], atol=1e-6)
    np.testing.assert_allclose(np.asarray(soft_weights(contrast, filled, 0.5, 0.0)), 1.0)


@pytest.fixture(scope="module")
def asked():
    return demo.questions()[:4]


def test_three_lines(asked):
    """The use that the README shows, and what comes back for plotting."""
    from jaxmllm.report import figures

    model = jaxmllm.load(demo.DEMO / "model")
    method = jaxmllm.methods.ContrastiveReinput(fusion_layers=[0, 1])
    images, questions = [question.image for question in asked], [question.text for question in asked]
    answers = jaxmllm.answer(model, images, questions, method=method, max_new_tokens=4)
    assert len(answers) == 4 and all(isinstance(text, str) for text in answers)
    drawn = figures.overlay(Image.open(images[0]), answers.maps[0].values, answers.maps[0].tokens)
    assert drawn.ndim == 3
    assert {picture.size[0] for picture in answers.details.pictures} <= set(range(1, 85))
    assert answers.details.findings["pre"].tolist() == [1] * 4 or set(answers.details.findings["pre"].tolist()) <= {
        0,
        1,
    }
    assert answers.details.count.prompts == 2
    plain = jaxmllm.answer(model, images, questions, max_new_tokens=4)
    assert list(plain) == list(jaxmllm.generate(model, model.prepare(images, questions), max_new_tokens=4).texts)
    assert plain.maps is None


def test_nothing_is_compiled_for_another_rule(asked):
    """Layers, thresholds and strengths are data: a second rule runs the first one's programs."""
    from jaxmllm.decoding.generate import run_prompts, run_tail, run_tokens

    model = jaxmllm.load(demo.DEMO / "model")
    images, questions = [question.image for question in asked], [question.text for question in asked]
    kinds = [
        [ContrastiveReinput(candidates="all"), ContrastiveReinput(pre=0, post="mean", threshold=0.3)],
        [ReviewMask(candidates="all"), ReviewMask(pre=0, post=3, layer=2, strength=0.9)],
    ]
    for first, second in kinds:
        jaxmllm.answer(model, images, questions, method=first, max_new_tokens=4)
        before = [program._cache_size() for program in (run_prompts, run_tail, run_tokens)]
        jaxmllm.answer(model, images, questions, method=second, max_new_tokens=4)
        assert [program._cache_size() for program in (run_prompts, run_tail, run_tokens)] == before
