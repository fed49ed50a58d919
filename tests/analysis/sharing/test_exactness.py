"""The fast sweep gives the plain sweep's numbers: drawn prompts, drawn edits, several models."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmllm.analysis import (
    at_site,
    blind_image,
    compose,
    erase_image,
    from_layer,
    knockout,
    scale_heads,
    up_to_layer,
    window,
)
from jaxmllm.analysis.sharing.budget import Lengths
from jaxmllm.analysis.sharing.compilations import Compilations
from jaxmllm.analysis.sharing.shapes import Shapes
from jaxmllm.analysis.sweeping import Sweeper, plan_for
from jaxmllm.models.text_config import RopeConfig
from tests.analysis.sharing import cases
from tests.analysis.sharing.cases import SHAPES, WIDTH, arrays, assert_same, causal, fast, last_of, plain, prompt

L, H, N = 3, 4, cases.TOKENS
ROWS = 5


def drawn(examples: int) -> settings:
    return settings(deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow])


SPANS = st.one_of(
    st.integers(0, L - 1),
    st.integers(0, L - 1).map(from_layer),
    st.integers(0, L - 1).map(up_to_layer),
    st.sampled_from([window(0, 2), window(1, 3)]),
)
STRENGTHS = st.sampled_from([1.0, 0.5, np.array([1.0, 0.0, 0.3], np.float32)])
SEEDS = st.integers(0, 2**16)
SIDES = st.sampled_from(["left", "right"])
LENGTHS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3)), min_size=ROWS, max_size=ROWS)
PICTURES = st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS)


def alike(seed: int, lengths, pictures, side: str, per_image: int = N):
    """One text before every image; questions of any length, some on the same picture; answers of 1 to 3 tokens."""
    rng = np.random.default_rng(seed)
    prefix = cases.words(rng, 3)
    many = [min(question, cases.QUESTION + 1) for question, _ in lengths]
    prompts = [
        prompt(rng, [3, question], [shown], answer, prefix)
        for question, (_, answer), shown in zip(many, lengths, pictures, strict=True)
    ]
    # the longest answer decides the number of answer columns, and so the programs
    prompts[0] = prompt(rng, [3, many[0]], [pictures[0]], cases.ANSWER, prefix)
    return arrays(prompts, side, per_image)


def unlike(seed: int, order, side: str):
    """Prompts of every form: two images after texts of unlike lengths, none, one that ends the prompt, one first."""
    rng = np.random.default_rng(seed)
    forms = [
        prompt(rng, [2, 1, int(rng.integers(1, 7))], [0, 2], 2),
        prompt(rng, [3, 0, int(rng.integers(1, 7))], [1, 1], cases.ANSWER),
        prompt(rng, [int(rng.integers(1, 7))], (), 2),
        prompt(rng, [2, 0], [1], 1),
        prompt(rng, [0, int(rng.integers(1, 7))], [2], 3),
    ]
    return arrays([forms[number] for number in order], side)


@drawn(5)
@given(SEEDS, LENGTHS, PICTURES, SIDES, st.lists(SPANS, min_size=8, max_size=8), st.tuples(STRENGTHS, STRENGTHS))
def test_every_edit_of_questions_on_shared_images(seed, lengths, pictures, side, spans, strengths):
    batch, rng = alike(seed, lengths, pictures, side), np.random.default_rng(seed)
    everywhere = rng.random((2, ROWS, WIDTH)) * (rng.random((2, ROWS, WIDTH)) > 0.5)
    branches = [
        erase_image(spans[0]),
        blind_image(spans[1]),
        knockout(spans[2]),
        erase_image(spans[3], rng.integers(0, 2, N), strengths[0]),
        knockout(spans[4], everywhere[0], everywhere[1], strengths[1]),
        scale_heads(spans[5], rng.random(H)),
        compose(erase_image(spans[6]), blind_image(spans[7]), knockout(spans[2], "last", "question")),
        blind_image(spans[0], rng.integers(0, 2, N)),
    ]
    assert_same(fast(cases.model(), batch, branches), plain(cases.model(), batch, branches))


ROLES = [("last", "image"), ("last", "question"), ("question", "prefix"), ("image", "prefix"), ("image", "question"),
         ("all", "all"), ("text", "text"), ("prefix", "all")]  # fmt: skip


@drawn(4)
@given(SEEDS, LENGTHS, PICTURES, SIDES, st.lists(SPANS, min_size=8, max_size=8))
def test_knockouts_of_every_role(seed, lengths, pictures, side, spans):
    batch = alike(seed, lengths, pictures, side)
    branches = [knockout(span, *roles) for span, roles in zip(spans, ROLES, strict=True)]
    assert_same(fast(cases.model(), batch, branches), plain(cases.model(), batch, branches))


@drawn(4)
@given(SEEDS, st.permutations(range(5)), SIDES, st.tuples(SPANS, SPANS, SPANS))
def test_prompts_of_every_form_together(seed, order, side, spans):
    batch = unlike(seed, order, side)
    branches = [erase_image(spans[0]), compose(blind_image(spans[1]), knockout(spans[2]))]
    assert_same(fast(cases.model(), batch, branches), plain(cases.model(), batch, branches))


FIXED = {"lengths": [(5, 3), (7, 1), (1, 2), (3, 1), (7, 1)], "pictures": [0, 1, 0, 2, 0]}


def fixed(side: str = "right", seed: int = 7, per_image: int = N):
    return alike(seed, FIXED["lengths"], FIXED["pictures"], side, per_image)


def erase_and_knockout():
    """Both, layer by layer and twice at several; eight branches as in the other tests, to share programs."""
    return [make(span) for make in (erase_image, knockout) for span in (0, 1, 2, window(0, 2))]


SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize("name", ["class_token_biases", "llama3_rope", "tied_linear_rope"])
def test_other_models(name):
    """Biases, a class token among the image tokens, a tower read at its end; one key-value head, scaled angles."""
    which = cases.model(name)
    batch, branches = fixed(per_image=which.config.tokens_per_image), erase_and_knockout()
    assert_same(fast(which, batch, branches), plain(which, batch, branches))


@pytest.fixture(scope="module")
def single_layer():
    """One layer, and angles that depend on the longest sequence once that is over 32 positions."""
    return cases.altered(num_layers=1, rope=RopeConfig("dynamic", theta=1e3, factor=3.0, original_max_positions=32))


SINGLE = [erase_image(0), knockout(0), knockout(0, "last", "question")]


def test_a_model_of_a_single_layer(single_layer):
    assert_same(fast(single_layer, fixed(), SINGLE), plain(single_layer, fixed(), SINGLE))


def test_angles_that_depend_on_the_longest_sequence_are_left_to_the_plain_way(single_layer):
    batch = {name: value for name, value in fixed().items()}
    for name in ("input_ids", "attention_mask"):
        batch[name] = np.pad(batch[name], ((0, 0), (0, 33 - WIDTH)))
    engine = cases.engine_of(single_layer)
    assert engine.run_block(single_layer.as_inputs(batch), batch["answer_ids"], SINGLE, SHAPES) is None


def test_angles_that_depend_on_positions_of_the_callers_own_are_right(single_layer):
    """Positions may lie beyond the trained ones though the sequence is short."""
    batch = fixed()
    batch["position_ids"] = np.tile(np.arange(WIDTH, dtype=np.int32) * 4, (ROWS, 1))
    scores = cases.engine_of(single_layer).run_block(single_layer.as_inputs(batch), batch["answer_ids"], SINGLE, SHAPES)
    if scores is not None:  # the plain way may be left to do it
        assert_same(scores, plain(single_layer, batch, SINGLE))


def erasing_hook(batch, layer: int):
    kept = jnp.asarray(batch["input_ids"] != cases.IMAGE)[..., None]
    return at_site("resid_pre", lambda value, at: jnp.where(kept | (at != layer), value, 0.0))


@pytest.mark.parametrize("others", [(), (knockout(0, strength=0.0),)])
def test_hooks_are_left_to_the_plain_way(reference_scores, others):
    batch = fixed()
    hooked = compose(erasing_hook(batch, 1), *others)
    plan = plan_for(cases.model(), [hooked], Lengths(3, N, cases.QUESTION, cases.ANSWER), ROWS, 1.0)
    sweeper = Sweeper(cases.model(), [hooked], SHAPES, plan, Compilations())
    scores = sweeper.run(cases.model().as_inputs(batch), batch["answer_ids"])
    got, erased = scores.edited.log_probability[0], reference_scores.edited.log_probability[1]
    np.testing.assert_allclose(got, erased, atol=1e-5, rtol=0)
    assert sweeper.cost().clean_seconds == 0 and sweeper.cost().questions == ROWS


def test_positions_of_the_callers_own():
    batch = fixed()
    jumps = np.random.default_rng(0).integers(1, 4, (ROWS, WIDTH))
    jumps[1:, :3], jumps[:, 3:8] = jumps[0, :3], 1  # rows 1 to 4 stand alike up to the image, row 0 does not
    jumps[0, 0] += 2
    batch["position_ids"] = np.cumsum(jumps, axis=1).astype(np.int32)
    assert_same(fast(cases.model(), batch, erase_and_knockout()), plain(cases.model(), batch, erase_and_knockout()))


@SLOW
@pytest.mark.parametrize("hidden", [[(1, 1)], [(0, 8)], [(1, 4)], [(2, 3), (2, 4), (2, 5), (2, 6)]])
def test_tokens_that_the_mask_hides(hidden):
    """A word before the image, one of the question, one image token, all of one row's."""
    batch = fixed()
    batch["attention_mask"][tuple(zip(*hidden, strict=True))] = 0
    assert_same(fast(cases.model(), batch, erase_and_knockout()), plain(cases.model(), batch, erase_and_knockout()))


@pytest.fixture(scope="module")
def both_ways():
    """Prompts under a mask in which an image sees all of itself, and their plain scores."""
    batch = fixed()
    mask, image = causal(batch), batch["input_ids"] == cases.IMAGE
    batch["attention_mask"] = (mask | (image[:, :, None] & image[:, None]))[:, None]
    return batch, plain(cases.model(), batch, erase_and_knockout())


def test_an_image_that_sees_all_of_itself(both_ways):
    batch, expected = both_ways
    assert_same(fast(cases.model(), batch, erase_and_knockout()), expected)
    one_way = fast(cases.model(), fixed(), erase_and_knockout())
    assert np.abs(one_way.clean.log_probability - expected.clean.log_probability).max() > 1e-3


def test_an_image_that_sees_the_question_shares_nothing_but_is_right(both_ways):
    batch = dict(both_ways[0])
    batch["attention_mask"] = batch["attention_mask"].copy()
    for row, last in enumerate(last_of(batch)):
        batch["attention_mask"][row, 0, 3 : 3 + N, :last] = True
    shapes, branches = (
        Shapes((3 + N + cases.QUESTION,), cases.ANSWER, 2, 4),
        [knockout(layer % L) for layer in range(8)],
    )
    assert_same(fast(cases.model(), batch, branches, shapes), plain(cases.model(), batch, branches))


def test_a_prompt_that_sees_its_last_token_is_left_to_the_plain_way(both_ways):
    batch = dict(both_ways[0])
    batch["attention_mask"] = batch["attention_mask"].copy()
    for row, last in enumerate(last_of(batch)):
        batch["attention_mask"][row, 0, : last + 1, : last + 1] = True
    engine = cases.engine_of(cases.model())
    assert engine.run_block(cases.model().as_inputs(batch), batch["answer_ids"], erase_and_knockout(), SHAPES) is None


def test_branches_that_change_nothing_have_the_clean_scores_bit_for_bit():
    branches = [
        erase_image(0, strength=0.0),
        blind_image(slice(None), np.zeros(N)),
        knockout(1, "image", "question"),
        knockout(slice(None), "prefix", "image"),
        scale_heads(1, np.ones(H)),
        erase_image(1),
    ]
    scores = fast(cases.model(), fixed(), branches)
    for field in ("log_probability", "correct", "rank"):
        clean, edited = getattr(scores.clean, field), getattr(scores.edited, field)
        np.testing.assert_array_equal(edited[:-1], np.broadcast_to(clean, edited[:-1].shape))
    assert (scores.edited.log_probability[-1] != scores.clean.log_probability).all()


def test_an_erased_image_that_is_not_there_changes_nothing_but_the_others():
    scores = fast(cases.model(), unlike(1, range(5), "right"), [erase_image(1), compose(blind_image(0), knockout(0))])
    same = scores.edited.log_probability == scores.clean.log_probability
    assert same.tolist() == [[False, False, True, False, False]] * 2


def part_of(batch, rows):
    """Some rows of prompts that hold one image each, in any order."""
    return {name: value[rows] for name, value in batch.items()}


def close(got, expected, rows=slice(None)):
    for table in ("edited", "clean", "early"):
        ours, theirs = getattr(got, table).log_probability, getattr(expected, table).log_probability[..., rows]
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got.attention, expected.attention[:, rows], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def reference_scores():
    return fast(cases.model(), fixed(), erase_and_knockout())


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [1, 0, 3, 4, 2], [2, 2, 0, 1, 4]])
def test_the_order_of_questions_does_not_matter(reference_scores, order):
    close(fast(cases.model(), part_of(fixed(), order), erase_and_knockout()), reference_scores, order)


def test_questions_asked_one_by_one_get_the_same_scores(reference_scores):
    for row in range(ROWS):
        close(fast(cases.model(), part_of(fixed(), [row]), erase_and_knockout()), reference_scores, [row])


def test_the_padding_side_does_not_matter(reference_scores):
    close(fast(cases.model(), fixed("left"), erase_and_knockout()), reference_scores)


@SLOW
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_does_not_matter(reference_scores, batch_size):
    close(fast(cases.model(), fixed(), erase_and_knockout(), batch_size), reference_scores)


def test_other_questions_in_the_batch_do_not_matter(reference_scores):
    """With texts of their own in front, nothing is shared between questions any more."""
    rng = np.random.default_rng(3)
    batch = fixed()
    others = fixed()
    others["input_ids"][1:, :3] = rng.integers(3, 89, (ROWS - 1, 3))
    close_to = fast(cases.model(), others, erase_and_knockout())
    assert_same(close_to, plain(cases.model(), others, erase_and_knockout()))
    np.testing.assert_array_equal(others["input_ids"][0], batch["input_ids"][0])
    np.testing.assert_allclose(
        close_to.edited.log_probability[:, 0], reference_scores.edited.log_probability[:, 0], atol=1e-5, rtol=0
    )
    assert np.abs(close_to.clean.log_probability - reference_scores.clean.log_probability)[1:].min() > 1e-4
