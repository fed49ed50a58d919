"""Scenes of small objects: the splits, what the seed decides, and boxes that hold what is drawn."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from jaxmllm.data.digits import HALVES, held_out_digits, load_digit_bitmaps
from jaxmllm.data.scene_questions import EVEN_MIX, QUESTION_KINDS
from jaxmllm.data.scenes import render, sample_scene
from jaxmllm.data.small_scenes import A_SCENE, OBJECTS, SCALE, SIDE, small_scene_questions
from jaxmllm.errors import InputError
from jaxmllm.processing import open_image


def bitmaps(digits) -> set[bytes]:
    return {image.tobytes() for image in digits.images}


def pixels(question) -> np.ndarray:
    return np.asarray(open_image(question.image))


def drawn(question) -> np.ndarray:
    """Pixels that stand out from the background, [SIDE, SIDE] bool: backgrounds are dark or nearly grey."""
    channels = pixels(question).astype(int)
    return (channels.max(axis=-1) - channels.min(axis=-1) > 60) | (channels.min(axis=-1) > 160)


def test_the_halves_share_no_digit_and_make_up_the_held_out_ones():
    validation, test = (held_out_digits(half) for half in HALVES)
    assert not bitmaps(validation) & bitmaps(test)
    assert abs(len(validation.labels) - len(test.labels)) <= 10
    for half in (validation, test):
        assert np.bincount(half.labels).min() >= 15


def test_the_halves_are_the_samples_that_are_never_trained_on():
    pytest.importorskip("sklearn")
    validation, test = (held_out_digits(half) for half in HALVES)
    train, held_out = load_digit_bitmaps("train"), load_digit_bitmaps("test")
    assert bitmaps(validation) | bitmaps(test) == bitmaps(held_out)
    assert not (bitmaps(validation) | bitmaps(test)) & bitmaps(train)
    labels = {image.tobytes(): label for image, label in zip(held_out.images, held_out.labels, strict=True)}
    for half in (validation, test):
        assert [labels[image.tobytes()] for image in half.images] == half.labels.tolist()


def test_scikit_learn_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert len(small_scene_questions("test", 3)) == 3


def test_the_seed_decides_everything_and_splits_differ():
    one, again = (small_scene_questions("test", 20) for _ in range(2))
    assert one == again
    np.testing.assert_array_equal(pixels(one[0]), pixels(again[0]))
    assert small_scene_questions("test", 9) == one[:9]
    others = small_scene_questions("test", 20, seed=1), small_scene_questions("validation", 20)
    for other in others:
        assert not {question.image.data for question in one} & {question.image.data for question in other}
        assert not {question.question_id for question in one} & {question.question_id for question in other}


def test_eight_questions_a_scene_of_all_kinds_with_unlike_ids():
    questions = small_scene_questions("validation", 240)
    assert len({question.question_id for question in questions}) == 240
    names = [str(question.image) for question in questions]
    assert all(names.count(name) == A_SCENE for name in set(names))
    kinds = [question.category for question in questions]
    assert set(kinds) == set(QUESTION_KINDS) == set(EVEN_MIX)
    assert min(kinds.count(kind) for kind in QUESTION_KINDS) >= 12
    assert pixels(questions[0]).shape == (SIDE, SIDE, 3)


def test_boxes_hold_the_drawn_objects_and_nothing_is_drawn_beside_them():
    for question in small_scene_questions("test", 64)[::A_SCENE]:
        seen, inside = drawn(question), np.zeros((SIDE, SIDE), bool)
        assert OBJECTS[0] <= len(question.objects) <= OBJECTS[1]
        for left, top, right, bottom in question.objects:
            assert 14 <= max(right - left, bottom - top) <= 0.3 * 28 * 4 + 1e-6
            part = np.s_[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
            assert seen[part].mean() > 0.1, "nothing is drawn in the box"
            inside[part] = True
        assert (seen & ~inside).sum() == 0


def test_evidence_is_of_the_scene_and_shows_what_is_asked_for():
    questions = small_scene_questions("test", 240)
    for question in questions:
        assert set(question.boxes) <= set(question.objects)
    rng = np.random.default_rng([HALVES.index("test"), 0, 0])
    scene = sample_scene(rng, held_out_digits("test"), OBJECTS, scale=SCALE)
    np.testing.assert_array_equal(pixels(questions[0]), render(scene, SIDE))
    asked = [question for question in questions[:A_SCENE] if question.category in ("digit", "shape")]
    assert asked
    for question in asked:
        (box,) = question.boxes
        item = next(item for item in scene.objects if np.allclose(np.array(item.box) * SIDE, box))
        assert item.kind == question.answer and item.colour in question.text.split()
        without = render(replace(scene, objects=tuple(one for one in scene.objects if one is not item)), SIDE)
        changed = np.argwhere((pixels(question) != without).any(axis=-1))
        (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0) + 1
        assert box[0] - 1 <= left and box[1] - 1 <= top and right <= box[2] + 1 and bottom <= box[3] + 1


@pytest.mark.parametrize("wrong", [{"split": "train"}, {"count": 0}, {"seed": -1}])
def test_bad_input_is_told(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        small_scene_questions(**{"split": "test"} | wrong)


def test_an_unknown_half_is_told():
    with pytest.raises(InputError, match="half must be"):
        held_out_digits("train")
