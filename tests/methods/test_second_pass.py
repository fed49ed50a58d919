"""Prompts that begin as others did: what is computed of the rest equals the whole prompts computed anew."""

import numpy as np
import pytest
from PIL import Image

import jaxmllm
from jaxmllm.analysis import compose, erase_image, knockout, review_mask, scale_heads
from jaxmllm.errors import InputError
from jaxmllm.methods import ContrastiveReinput, ReviewMask, SecondLook, Vcd, ViCrop, tails
from jaxmllm.models.capture import ATTENTION, Capture
from jaxmllm.processing import make_prompt
from tests.support import families
from tests.support.tiny_checkpoints import write_checkpoint

QUESTIONS = ["what is this ?", "is it a cup , or is it not ?", "why ?"]
SIZES = [(40, 28), (90, 30), (33, 70)]
NEW_TOKENS = 5
# Most of the time goes into compiling: the others run before a release.
QUICK = ("llava",)
IMAGES_OF_THEIR_OWN = ("qwen2_5_vl",)  # rotary positions by the image, images of any size


def of_families(quick):
    """A model of every family, marked slow but for some."""
    params = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES]
    return pytest.mark.parametrize("model", params, indirect=True)


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods") / request.param
    write_checkpoint(request.param, folder)
    return jaxmllm.load(folder)


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (high, wide, 3), np.uint8)) for wide, high in SIZES]


def texts(model, count):
    """Whole prompts with so many images each, the images side by side."""
    prompts = [make_prompt(model.processor, question, 1) for question in QUESTIONS]
    return prompts if count == 1 else [tails.with_two_images(text, model.processor.image_token) for text in prompts]


def edits_of(model):
    scale = np.linspace(0.5, 1.5, model.num_heads)
    return compose(erase_image(1), knockout(0, "last", "image", strength=0.7), scale_heads(0, scale))


@of_families(families.FAMILIES)
def test_prompts_with_two_images_are_those_of_the_processor(model):
    """The placeholder that is put in is where the chat template puts a second image."""
    for question, text in zip(QUESTIONS, texts(model, 2), strict=True):
        assert text.split() == make_prompt(model.processor, question, 2).split()


@of_families((*QUICK, *IMAGES_OF_THEIR_OWN))
def test_a_second_image_equals_the_prompt_with_two(model):
    shown = pictures()
    options = {"max_new_tokens": NEW_TOKENS, "stop_tokens": (), "edits": edits_of(model)}
    answers = jaxmllm.answer(model, shown, QUESTIONS, method=SecondLook(), **options)
    twice = model.prepare([[image, image] for image in shown], texts(model, 2))
    whole = jaxmllm.generate(model, twice, **options)
    np.testing.assert_array_equal(answers.details.generated.tokens, whole.tokens)
    np.testing.assert_allclose(
        answers.details.generated.log_probabilities, whole.log_probabilities, atol=1e-4, rtol=1e-4
    )
    assert list(answers) == list(whole.texts)
    assert answers.details.count.prompts == 2


@pytest.mark.slow
@of_families(families.FAMILIES)
def test_the_padding_side_and_the_batch_change_nothing(model):
    shown = pictures()
    options = {"method": SecondLook(), "max_new_tokens": NEW_TOKENS, "stop_tokens": ()}
    together = jaxmllm.answer(model, shown, QUESTIONS, **options)
    model.processor.tokenizer.padding_side = "right" if model.processor.tokenizer.padding_side == "left" else "left"
    other = jaxmllm.answer(model, shown, QUESTIONS, **options)
    alone = jaxmllm.answer(model, shown[1:2], QUESTIONS[1:2], **options)
    np.testing.assert_array_equal(together.details.generated.tokens, other.details.generated.tokens)
    np.testing.assert_array_equal(together.details.generated.tokens[1:2], alone.details.generated.tokens)


@of_families(QUICK)
def test_the_review_mask_equals_an_edit_from_the_start(model):
    """Run again over the whole question, it is the edit with the same weights."""
    method = ReviewMask(candidates="all", layer=1, quantile=0.8, strength=0.9, again="question")
    options = {"max_new_tokens": NEW_TOKENS, "stop_tokens": ()}
    answers = jaxmllm.answer(model, pictures(), QUESTIONS, method=method, **options)
    weights = answers.details.findings["weights"]
    assert weights.min() == pytest.approx(0.1, abs=1e-5)
    whole = jaxmllm.generate(model, model.prepare(pictures(), QUESTIONS), edits=review_mask(1, weights), **options)
    np.testing.assert_array_equal(answers.details.generated.tokens, whole.tokens)
    np.testing.assert_allclose(
        answers.details.generated.log_probabilities, whole.log_probabilities, atol=1e-4, rtol=1e-4
    )


@of_families(QUICK)
def test_the_relative_map_equals_two_separate_passes(model):
    method = ViCrop(layer=1, general="what is there ?", base=20)
    maps = jaxmllm.answer(model, pictures(), QUESTIONS, method=method, max_new_tokens=1).maps
    attention, looks = [], []
    for questions in (QUESTIONS, [method.general] * 3):
        inputs = model.prepare(pictures(), questions)
        out = model.forward(model.params, inputs, capture=Capture.attention(rows="last", keys="image"))
        attention.append(np.asarray(out.captured[ATTENTION])[1, :, 0])
        images = model.as_inputs(inputs).images
        if model.family.patch_boxes:
            from jaxmllm.analysis.geometry import looks_of

            looks.append(looks_of(model, images, nth=min(2, len(model.config.qformer.cross_layers) - 1)))
    for row, found in enumerate(maps):
        count = int(images.counts[row])
        asked, general = (part[row, :count] for part in attention)
        if looks:
            asked, general = asked @ looks[0][row], general @ looks[1][row]
        np.testing.assert_allclose(found.values, asked / general, rtol=1e-3)


@pytest.mark.slow
@of_families(families.FAMILIES)
def test_edits_hold_in_every_view(model):
    """Without contrast, two views give the tokens of one, under weights for each example too."""
    counts = model.as_inputs(model.prepare(pictures(), QUESTIONS)).max_image_tokens
    weights = np.random.default_rng(1).random((len(QUESTIONS), counts))
    options = {"max_new_tokens": NEW_TOKENS, "stop_tokens": (), "edits": erase_image(1, weights)}
    answers = jaxmllm.answer(model, pictures(), QUESTIONS, method=Vcd(alpha=0.0), **options)
    whole = jaxmllm.generate(model, model.prepare(pictures(), QUESTIONS), **options)
    np.testing.assert_array_equal(answers.details.generated.tokens, whole.tokens)


@of_families(QUICK)
def test_edits_that_count_positions_are_refused(model):
    length = model.prepare(pictures(), QUESTIONS)["input_ids"].shape[1]
    edits = knockout(0, np.ones(length), "image")
    with pytest.raises(InputError, match="position weights"):
        jaxmllm.answer(model, pictures(), QUESTIONS, method=SecondLook(), edits=edits)


@of_families(QUICK)
def test_several_images_are_refused(model):
    shown = pictures()
    with pytest.raises(InputError, match="one image an example"):
        jaxmllm.answer(model, [shown[:2], shown[1:]], QUESTIONS[:2], method=SecondLook())
    with pytest.raises(InputError, match="there are 0 for 1"):
        jaxmllm.answer(model, [[]], QUESTIONS[:1], method=ContrastiveReinput(candidates="all"))
