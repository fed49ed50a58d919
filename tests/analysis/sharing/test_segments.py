"""How questions are cut into segments, packed into chunks and padded."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxmllm.analysis.sharing.rule import Segment, Tier
from jaxmllm.analysis.sharing.segments import make_lanes, pack, slots_of, take_pairs, take_slots
from jaxmllm.analysis.sharing.shapes import LENGTH_CLASSES, Shapes, choose_shapes, length_classes
from tests.analysis.sharing import cases
from tests.analysis.sharing.cases import IMAGE, TOKENS, arrays, causal, inputs_of, prompt, rows_of

RNG = np.random.default_rng(0)


def only_row(lengths, answer=2, side="right"):
    batch = arrays([prompt(RNG, lengths, range(len(lengths) - 1), answer)], side)
    (row,) = rows_of(batch)
    return row, batch


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "lengths, ends",
    [
        ([3, 5], (3, 7, 11)),  # text, image, text
        ([0, 5], (0, 4, 8)),  # the image comes first
        ([2, 1, 4], (2, 11, 14)),  # text between two images belongs to the body
        ([0, 0, 1], (0, 8, 8)),  # nothing but images and the last token
        ([6], (0, 0, 5)),  # no image
        ([3, 0], (0, 0, 6)),  # the last prompt token, where the answer is read, is an image token
    ],
)
def test_a_prompt_is_cut_at_its_images(lengths, ends, side):
    row, batch = only_row(lengths, 2, side)
    assert row.ends == (*ends, ends[-1] + 2)  # last prompt token, first answer token; the second is never fed
    assert row.images == tuple(range(len(lengths) - 1))
    ids = batch["input_ids"][0][row.tokens]
    prompt_ids = batch["input_ids"][0][batch["attention_mask"][0] == 1][: len(ids)]
    np.testing.assert_array_equal(ids, prompt_ids)
    np.testing.assert_array_equal(row.features >= 0, ids == IMAGE)
    assert row.features[row.features >= 0].tolist() == list(range(TOKENS * len(row.images)))
    assert np.concatenate([row.span(segment) for segment in Segment]).tolist() == row.tokens.tolist()


def test_an_answer_is_cut_by_its_own_length():
    batch = arrays([prompt(RNG, [2, 3], [0], many) for many in (1, 3)])
    assert [row.length(Segment.ANSWER) for row in rows_of(batch)] == [1, 3]


def test_images_are_counted_over_the_batch():
    rows = rows_of(arrays([prompt(RNG, [1, 2, 2], [0, 1]), prompt(RNG, [4]), prompt(RNG, [1, 2], [0])]))
    assert [row.images for row in rows] == [(0, 1), (), (2,)]


def test_hidden_placeholders_take_their_features_away():
    batch = arrays([prompt(RNG, [2, 3], [0])])
    batch["attention_mask"][0, 3] = 0  # the second of four placeholders
    (row,) = rows_of(batch)
    assert 3 not in row.tokens
    assert row.features[row.span(Segment.BODY) - np.array([0, 1, 1])].tolist() == [0, 2, 3]
    batch["attention_mask"][0, 2:6] = 0
    (row,) = rows_of(batch)
    assert row.ends[:2] == (0, 0) and row.images == (0,) and (row.features == -1).all()


def with_mask(batch, mask):
    return batch | {"attention_mask": mask[:, None]}


def test_a_causal_square_cuts_as_a_plain_mask_does():
    batch = arrays([prompt(RNG, [3, 5], [0], 2), prompt(RNG, [2, 1, 2], [1, 2], 1), prompt(RNG, [4], (), 3)], "left")
    mask = causal(batch)
    expected = rows_of(batch)
    additive = np.where(mask, 0.0, -1e9).astype(np.float32)
    for square in (mask, additive):
        for row, wanted in zip(rows_of(with_mask(batch, square)), expected, strict=True):
            assert row.ends == wanted.ends and row.images == wanted.images
            np.testing.assert_array_equal(row.tokens, wanted.tokens)


def test_an_image_that_sees_all_of_itself_is_cut_as_usual():
    batch = arrays([prompt(RNG, [3, 5], [0], 2)])
    mask = causal(batch)
    mask[0, 3:7, 3:7] = True
    assert rows_of(with_mask(batch, mask))[0].ends == (3, 7, 11, 13)


@pytest.mark.parametrize("query, key", [(4, 8), (1, 5), (2, 9)])  # image to question, prefix to image, to question
def test_a_context_that_sees_what_follows_is_not_cut(query, key):
    batch = arrays([prompt(RNG, [3, 5], [0], 2)])
    mask = causal(batch)
    mask[0, query, key] = True
    assert rows_of(with_mask(batch, mask))[0].ends == (0, 0, 11, 13)


@pytest.mark.parametrize("query", [1, 5, 9])
def test_where_the_prompt_sees_its_answer_nothing_is_cut(query):
    batch = arrays([prompt(RNG, [3, 5], [0], 2)])
    mask = causal(batch)
    mask[0, query, 11] = True
    assert rows_of(with_mask(batch, mask)) is None


@st.composite
def batches(draw):
    """Prompts of all forms; prefixes and pictures recur."""
    prefixes = [cases.words(np.random.default_rng(number), many) for number, many in enumerate([3, 3, 2, 0])]
    prompts = []
    for _ in range(draw(st.integers(1, 9))):
        prefix = draw(st.sampled_from(prefixes))
        images = draw(st.integers(0, 2))
        lengths = [0] + [draw(st.integers(0, 2)) for _ in range(images - 1)] + [draw(st.integers(0, 5))] * (images > 0)
        if not images and not prefix:
            lengths = [2]
        pictures = [draw(st.integers(0, 1)) for _ in range(images)]
        rng = np.random.default_rng(draw(st.integers(0, 2)))
        prompts.append(prompt(rng, lengths, pictures, draw(st.integers(1, 3)), prefix if images or prefix else None))
    return prompts


# beartype looks at a random item of the tuple, which no strategy may do, so ``Shapes`` are made from these in the tests
SIZES = st.tuples(
    st.sets(st.integers(0, 7), max_size=3).map(sorted), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)
)


def shapes_from(sizes) -> Shapes:
    questions, answer, contexts, rows = sizes
    return Shapes(tuple(questions), answer, min(contexts, rows), rows)


@settings(deadline=None, max_examples=150)
@given(batches(), SIZES, st.sampled_from(["left", "right"]))
def test_every_row_is_in_one_chunk_with_its_own_context(prompts, sizes, side):
    shapes = shapes_from(sizes)
    batch = arrays(prompts, side)
    rows, ids = rows_of(batch), batch["input_ids"]
    lanes = make_lanes(rows, inputs_of(batch), shapes)
    kept = [int(row) for lane in lanes for chunk in lane.chunks for row in chunk.rows[chunk.kept]]
    assert sorted(kept) == list(range(len(prompts)))

    def text(number):
        return ids[number][rows[number].tokens[: rows[number].ends[1]]].tolist()

    for lane in lanes:
        everyone = [int(row) for chunk in lane.chunks for row in chunk.rows]
        assert lane.content == ((Tier.GROUP if lane.shared else Tier.CONTEXT), Tier.CONTEXT, Tier.ROW, Tier.ROW)
        if lane.shared:
            assert all(text(row) == text(everyone[0]) and rows[row].ends[:2] == rows[everyone[0]].ends[:2]
                       for row in everyone)  # fmt: skip
        assert len({chunk.lengths[:2] for chunk in lane.chunks}) == 1
        assert lane.present == tuple(any(chunk.lengths[segment] for chunk in lane.chunks) for segment in Segment)
        for chunk in lane.chunks:
            assert chunk.rows.shape == chunk.owner.shape == (shapes.rows,) and chunk.contexts.shape == (
                shapes.contexts,
            )
            assert 0 < len(chunk.kept) <= shapes.rows and chunk.lengths[Segment.QUESTION] > 0
            assert chunk.end == sum(chunk.lengths) and chunk.context_end == sum(chunk.lengths[:2])
            for row, owner in zip(chunk.rows, chunk.owner, strict=True):
                context = chunk.contexts[owner]
                assert text(row) == text(context)
                assert all(rows[row].length(segment) <= chunk.lengths[segment] for segment in Segment)
                if rows[row].ends[1]:
                    assert prompts[row].pictures == prompts[context].pictures


@settings(deadline=None, max_examples=60)
@given(batches(), SIZES, st.integers(1, 4))
def test_chunks_side_by_side_are_the_same_chunks(prompts, sizes, devices):
    shapes = shapes_from(sizes)
    batch = arrays(prompts, "left")
    for lane in make_lanes(rows_of(batch), inputs_of(batch), shapes):
        joined = lane.side_by_side(devices)
        assert (joined.shared, joined.widest, joined.content) == (lane.shared, lane.widest, lane.content)
        of_devices = []
        for chunk in joined.chunks:
            assert len(chunk.rows) == devices * shapes.rows and len(chunk.contexts) == devices * shapes.contexts
            for device in range(devices):
                rows = slice(device * shapes.rows, (device + 1) * shapes.rows)
                contexts = slice(device * shapes.contexts, (device + 1) * shapes.contexts)
                kept = chunk.kept[(chunk.kept >= rows.start) & (chunk.kept < rows.stop)] - rows.start
                owner = chunk.owner[rows] - contexts.start
                assert ((owner >= 0) & (owner < shapes.contexts)).all(), "a device needs another one's context"
                if len(kept):
                    of_devices.append((chunk.rows[rows], chunk.contexts[contexts], owner, kept, chunk.lengths))
        alone = [(c.rows, c.contexts, c.owner, c.kept, c.lengths) for c in lane.chunks]

        def plain(chunks):
            return sorted(str([np.asarray(part).tolist() for part in chunk]) for chunk in chunks)

        assert plain(of_devices) == plain(alone)


@settings(deadline=None, max_examples=60)
@given(batches(), SIZES)
def test_slots_hold_the_same_tokens_whatever_side_is_padded(prompts, sizes):
    shapes, by_side = shapes_from(sizes), {}
    for side in ("left", "right"):
        batch = arrays(prompts, side)
        rows = rows_of(batch)
        for lane in make_lanes(rows, inputs_of(batch), shapes):
            for place, chunk in enumerate(lane.chunks):
                slots = slots_of(rows, chunk.rows, chunk.lengths)
                assert slots.shape == (shapes.rows, chunk.end)
                for row, at in zip(chunk.rows, slots, strict=True):
                    assert at[at >= 0].tolist() == rows[row].tokens.tolist()
                ids = take_slots(batch["input_ids"], chunk.rows, slots)
                assert (ids[slots < 0] == 0).all()
                key = (lane.shared, lane.present, tuple(chunk.rows), place)
                by_side.setdefault(key, {})[side] = (ids, slots >= 0)
                square = take_pairs(causal(batch), chunk.rows, slots)
                for row, at, pairs in zip(chunk.rows, slots, square, strict=True):
                    many = len(rows[row].tokens)
                    assert not pairs[at < 0].any() and not pairs[:, at < 0].any()
                    np.testing.assert_array_equal(pairs[at >= 0][:, at >= 0], np.tril(np.ones((many, many), bool)))
    for found in by_side.values():
        (left, left_there), (right, right_there) = found["left"], found["right"]
        np.testing.assert_array_equal(left, right)
        np.testing.assert_array_equal(left_there, right_there)


def shared_prompts(number, many, pictures=None):
    prefix = cases.words(np.random.default_rng(50 + number), 3)
    return [prompt(RNG, [3, 4], [row if pictures is None else pictures[row]], 1, prefix) for row in range(many)]


def lanes_of(prompts, shapes=cases.SHAPES):
    batch = arrays(prompts)
    return make_lanes(rows_of(batch), inputs_of(batch), shapes)


def test_texts_that_recur_get_lanes_of_their_own_and_rare_ones_are_computed_together():
    lanes = lanes_of(shared_prompts(0, 4) + shared_prompts(1, 5) + shared_prompts(2, 3) + shared_prompts(3, 1))
    members = {tuple(sorted({int(row) for chunk in lane.chunks for row in chunk.rows})): lane.shared for lane in lanes}
    assert members == {(0, 1, 2, 3): True, (4, 5, 6, 7, 8): True, (9, 10, 11, 12): False}


def test_a_text_that_is_all_there_is_is_shared_however_rare():
    (lane,) = lanes_of(shared_prompts(0, 2))
    assert lane.shared
    (lane,) = lanes_of(shared_prompts(0, 1))
    assert lane.shared


def test_questions_on_one_image_share_its_context():
    (lane,) = lanes_of(shared_prompts(0, 4, [0, 0, 1, 0]), Shapes((4,), 1, 2, 4))
    (chunk,) = lane.chunks
    assert sorted(chunk.contexts.tolist()) == [0, 2]
    assert [chunk.contexts[owner] for owner in chunk.owner] == [{0: 0, 1: 0, 3: 0, 2: 2}[row] for row in chunk.rows]


def test_other_positions_or_another_mask_make_another_text():
    batch = arrays(shared_prompts(0, 4))
    moved = np.tile(np.arange(cases.WIDTH, dtype=np.int32), (4, 1))
    moved[2:] += 1
    masked = causal(batch)
    masked[3, 5, 4] = False
    for changed, many in ((batch | {"position_ids": moved}, 2), (with_mask(batch, masked), 2), (batch, 1)):
        rows = rows_of(changed)
        lanes = make_lanes(rows, inputs_of(changed), cases.SHAPES)
        texts = {group for group in cases.groups_of(rows, changed)}
        assert len(texts) == many
        assert all(lane.shared for lane in lanes) == (many == 1)


def test_prompts_of_unlike_form_are_never_computed_together():
    forms = [prompt(RNG, [3, 4], [0]), prompt(RNG, [0, 4], [0]), prompt(RNG, [5]), prompt(RNG, [2, 1, 3], [0, 1])]
    lanes = lanes_of(forms)
    assert len(lanes) == 4 and not any(lane.shared for lane in lanes)
    assert sorted(lane.present[:2] for lane in lanes) == [(False, False), (False, True), (True, True), (True, True)]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 4))
def test_packing_keeps_order_and_limits(sizes, width, size):
    numbers = iter(range(sum(sizes)))
    owned = [[next(numbers) for _ in range(many)] for many in sizes]
    packed = pack(owned, width, size)
    assert [row for chunk in packed for part in chunk for row in part] == list(range(sum(sizes)))
    for chunk in packed:
        assert 1 <= len(chunk) <= width and sum(map(len, chunk)) <= size
        for part in chunk:
            assert part and any(set(part) <= set(rows) for rows in owned)


def waste(lengths, allowed):
    return sum(min(one for one in allowed if one >= length) for length in lengths)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 3))
def test_length_classes_waste_least_of_all_choices(lengths, classes):
    from itertools import combinations

    chosen = length_classes(lengths, classes)
    unlike = sorted(set(lengths))
    assert 1 <= len(chosen) <= classes and list(chosen) == sorted(chosen) and chosen[-1] == unlike[-1]

    def least(many):
        return min(waste(lengths, (*few, unlike[-1])) for few in combinations(unlike[:-1], many - 1))

    assert waste(lengths, chosen) == least(len(chosen))
    # one class more would have to save over 5%
    if len(chosen) < min(classes, len(unlike)):
        assert least(len(chosen) + 1) > 0.95 * least(len(chosen))
    assume(len(chosen) > 1)
    assert least(len(chosen)) <= 0.95 * least(len(chosen) - 1)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(1, 30), st.integers(1, 16))
def test_shapes_are_few_and_within_the_batch_size(questions, contexts, batch_size):
    contexts = min(contexts, len(questions))
    shapes = choose_shapes(questions, 2, contexts, batch_size)
    assert 1 <= shapes.contexts <= shapes.rows == min(batch_size, len(questions))
    assert len(shapes.questions) <= (LENGTH_CLASSES if len(questions) < 2 * contexts else 1)
    assert all(shapes.question(length) >= length for length in questions)
    assert shapes.question(25) == 25
