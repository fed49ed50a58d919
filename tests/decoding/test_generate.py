"""Generation apart from PyTorch: batches, caches, random numbers, programs, captures, faults."""

import jax
import numpy as np
import pytest

import jaxmllm
from jaxmllm import Capture, InputError, Sampling
from jaxmllm.analysis import at_site, compose, erase_image, knockout, score_answers, score_options
from jaxmllm.analysis.sharing.compilations import count_compilations
from jaxmllm.decoding import batch_that_fits
from jaxmllm.decoding.fit import bytes_needed, repeat_rows
from jaxmllm.processing import append_answers
from tests.support import demo, tiny
from tests.support.tiny_checkpoints import write_checkpoint

LAYOUT = [[2, 7], [5, 3], [1, 1], [4, 4]]
DRAWN = Sampling(temperature=1.3, top_k=20, top_p=0.9)


def test_a_batch_is_its_questions_one_by_one(plain_pair):
    inputs = tiny.make_inputs(plain_pair, LAYOUT)
    options = {"max_new_tokens": 10, "stop_tokens": (5, 6, 7, 8, 9, 10), "key": jax.random.key(3)}
    # one token left to draw is the greedy one
    for sampling in (DRAWN, Sampling(1.0, 1, 1.0)):
        together = jaxmllm.generate(plain_pair.jax, inputs, **options, sampling=sampling, row_numbers=[7, 8, 9, 10])
        for row, mask in enumerate(inputs["attention_mask"]):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            alone |= {name: alone[name][:, : mask.sum()] for name in ("input_ids", "attention_mask")}
            single = jaxmllm.generate(plain_pair.jax, alone, **options, sampling=sampling, row_numbers=[7 + row])
            length = together.lengths[row]
            assert single.tokens[0].tolist() == together.tokens[row, :length].tolist()
            np.testing.assert_allclose(single.log_probabilities[0], together.log_probabilities[row, :length], atol=1e-5)


def test_what_is_drawn_follows_the_key(plain_pair):
    inputs = tiny.make_inputs(plain_pair, LAYOUT)

    def draw(seed, sampling=DRAWN, **options):
        key = jax.random.key(seed)
        return jaxmllm.generate(
            plain_pair.jax, inputs, max_new_tokens=10, stop_tokens=(), sampling=sampling, key=key, **options
        ).tokens.tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0) != draw(0, row_numbers=[4, 5, 6, 7])
    greedy = jaxmllm.generate(plain_pair.jax, inputs, max_new_tokens=10, stop_tokens=())
    assert draw(0, Sampling(1.0, 1, 1.0)) == greedy.tokens.tolist()  # one token left to draw
    assert draw(0, Sampling(1e-6, 20, 1.0)) == greedy.tokens.tolist()


def test_two_programs_serve_unlike_batches(plain_pair):
    with count_compilations() as compiled:
        for text, limit in ((3, 4), (9, 16), (14, 11)):
            inputs = tiny.make_inputs(plain_pair, [[2, text], [1, 1]])
            jaxmllm.generate(plain_pair.jax, inputs, max_new_tokens=limit, stop_tokens=[limit])
        assert compiled.programs == 2


def test_the_first_captures_and_log_probabilities_are_those_of_forward(plain_pair):
    inputs = tiny.make_inputs(plain_pair, LAYOUT)
    kept = Capture.attention() | Capture.early_output() | Capture.residual("resid_post", rows="all")
    found = jaxmllm.generate(plain_pair.jax, inputs, max_new_tokens=5, stop_tokens=(), capture=kept)
    checked = plain_pair.jax.as_inputs(inputs, bucketed=True)
    out = plain_pair.jax.forward(plain_pair.jax.params, checked, capture=kept)
    valid = np.asarray(checked.attention_mask).astype(bool)
    for site in ("attn_probs", "early_logits"):
        np.testing.assert_allclose(found.captured[site], out.captured[site], atol=1e-5)
    states = (np.asarray(each.captured["resid_post"])[:, valid] for each in (found, out))
    np.testing.assert_allclose(*states, atol=1e-5)
    # teacher forcing on what was generated gives its log-probabilities back
    forced = append_answers(inputs, found.tokens.tolist())
    logits = plain_pair.jax.forward(plain_pair.jax.params, forced, logits_at="answer").logits
    again = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), found.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.log_probabilities, again, atol=1e-5)


def test_a_masked_image_stays_masked(plain_pair):
    first, second = (tiny.make_inputs(plain_pair, [[3, 5]], seed=seed) for seed in (0, 1))
    second |= {name: first[name] for name in ("input_ids", "attention_mask")}

    def both(erased: float, cut: float):
        """Answers about either image, which is erased or cut off by so much."""
        edits = compose(erase_image(0, strength=erased), knockout(slice(None), "question", "image", strength=cut))
        options = {"max_new_tokens": 8, "stop_tokens": (), "edits": edits}
        return [jaxmllm.generate(plain_pair.jax, inputs, **options) for inputs in (first, second)]

    seen = both(0.0, 0.0)
    assert not np.allclose(seen[0].log_probabilities, seen[1].log_probabilities, atol=1e-3)
    for hidden in (both(1.0, 0.0), both(0.0, 1.0)):
        np.testing.assert_allclose(hidden[0].log_probabilities, hidden[1].log_probabilities, atol=1e-6)
        np.testing.assert_array_equal(hidden[0].tokens, hidden[1].tokens)


def test_hooks_see_every_token(plain_pair):
    inputs = tiny.make_inputs(plain_pair, [[3, 5]])
    lengths = []

    def shrink(value, layer):
        lengths.append(value.shape[1])
        return value * 0.5

    clean = jaxmllm.generate(plain_pair.jax, inputs, max_new_tokens=4, stop_tokens=())
    hooked = jaxmllm.generate(
        plain_pair.jax, inputs, max_new_tokens=4, stop_tokens=(), edits=at_site("mlp_out", shrink)
    )
    assert set(lengths) >= {1} and max(lengths) > 8
    assert not np.allclose(clean.log_probabilities, hooked.log_probabilities, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"edits": erase_image(9)}, "no layer 9"),
        ({"edits": knockout(0, np.ones(500), "image")}, "position weights"),
        ({"sampling": DRAWN}, "needs a key"),
        ({"sampling": DRAWN, "key": jax.random.key(0), "row_numbers": [1]}, "row_numbers have shape"),
        ({"sampling": Sampling(0.0), "key": jax.random.key(0)}, "temperature is 0.0"),
        ({"sampling": Sampling(1.0, 0), "key": jax.random.key(0)}, "top_k is 0"),
        ({"sampling": Sampling(1.0, None, 1.5), "key": jax.random.key(0)}, "top_p is 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(plain_pair, options, message):
    inputs = tiny.make_inputs(plain_pair, [[3, 5], [1, 2]])
    with pytest.raises(InputError, match=message):
        jaxmllm.generate(plain_pair.jax, inputs, **options)


def test_prompts_with_answers_or_masks_over_pairs_are_refused(plain_pair):
    inputs = tiny.make_inputs(plain_pair, [[3, 5]])
    with pytest.raises(InputError, match="prompts alone"):
        jaxmllm.generate(plain_pair.jax, append_answers(inputs, [[4]]))
    length = inputs["input_ids"].shape[1]
    with pytest.raises(InputError, match="over pairs"):
        jaxmllm.generate(plain_pair.jax, inputs | {"attention_mask": np.tri(length, dtype=bool)[None, None]})


def test_the_embedded_model_answers():
    model = demo.pair().jax
    asked = demo.questions()[:12]
    images, texts = [question.image for question in asked], [question.text for question in asked]
    answers = jaxmllm.answer(model, images, texts, max_new_tokens=4)
    right = [given == question.answer for given, question in zip(answers, asked, strict=True)]
    assert sum(right) >= 10, answers
    prompts = model.prepare(images, texts)
    scores = score_answers(model, prompts, answers)
    assert scores.correct.all()
    options = ["red", "2", "above"]
    letters = score_options(model, prompts, options)
    assert letters.shape == (12, 3)
    for column, option in enumerate(options):
        alone = score_answers(model, prompts, [option] * 12).log_probability
        np.testing.assert_allclose(letters[:, column], alone, atol=1e-5)


def test_options_of_several_tokens(tmp_path):
    write_checkpoint("llava", tmp_path / "m")
    model = jaxmllm.load(tmp_path / "m")
    prompts = model.prepare([np.zeros((28, 28, 3), np.uint8)] * 2, ["which?", "which is it?"])
    options = ["A", "yes it is"]
    found = score_options(model, prompts, options)
    for column, option in enumerate(options):
        np.testing.assert_allclose(
            found[:, column], score_answers(model, prompts, [option] * 2).log_probability, atol=1e-5
        )
    with pytest.raises(InputError, match="expected a list"):
        score_options(model, prompts, "AB")


def test_the_batch_fits_and_its_programs_are_the_ones_that_run(plain_pair):
    model, inputs = plain_pair.jax, tiny.make_inputs(plain_pair, [[3, 5]])
    with count_compilations() as compiled:
        assert batch_that_fits(model, inputs, 8, most=4, budget=10**9) == 4
        before = compiled.programs
        jaxmllm.generate(model, repeat_rows(inputs, 4), max_new_tokens=8)
        assert compiled.programs == before
    needed = [bytes_needed(model, repeat_rows(inputs, rows), 8, None, None) for rows in (1, 2, 4)]
    assert needed[0] < needed[1] < needed[2]
    assert batch_that_fits(model, inputs, 8, most=4, budget=needed[2] - 1) == 2
    assert batch_that_fits(model, inputs, 8, most=4, budget=needed[0]) == 1
    with pytest.raises(InputError, match="one prompt needs"):
        batch_that_fits(model, inputs, 8, most=4, budget=needed[0] - 1)
    with pytest.raises(InputError, match="2 prompts"):
        batch_that_fits(model, repeat_rows(inputs, 2), 8)
