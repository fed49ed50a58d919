"""Scenes and their questions: geometry, pixels, answers worked out a second time, balance and the written set."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxmllm.data.digits import DigitBitmaps, load_digit_bitmaps
from jaxmllm.data.scene_questions import (
    EVEN_MIX,
    QUESTION_KINDS,
    VOCABULARY,
    Question,
    ask,
    ask_all,
    majority_baseline,
    write_question_set,
)
from jaxmllm.data.scenes import (
    COLOUR_NAMES,
    COLOURS,
    DIGITS,
    KINDS,
    SHAPES,
    Scene,
    SceneObject,
    patch_targets,
    render,
    sample_scene,
)
from jaxmllm.errors import InputError

pytest.importorskip("sklearn")

SEEDS = st.integers(0, 2**32 - 1)
PIXEL = 1 / 84


@pytest.fixture(scope="module")
def digits() -> DigitBitmaps:
    return load_digit_bitmaps("train")


def shape(kind: str, colour: str, x: float, y: float, side: float = 20.0) -> SceneObject:
    """A shape whose top left corner is at pixel (x, y) of an 84-pixel image."""
    return SceneObject(kind, colour, (x / 84, y / 84, (x + side) / 84, (y + side) / 84), COLOURS[colour])


def scene_of(*objects: SceneObject) -> Scene:
    return Scene(objects, (0.25, 0.25, 0.25), 7)


def drawn_pixels(scene: Scene, item: SceneObject, size: int) -> np.ndarray:
    """Where the object alone changes the scene's background, [size, size] bool."""
    with_item, without = (render(replace(scene, objects=objects), size) for objects in ((item,), ()))
    difference = np.abs(with_item.astype(np.int16) - without).max(axis=-1)
    # Half covered or more: the strongest change is that of full cover, which no outline pixel exceeds.
    return difference > 0.5 * difference.max()


# Scenes


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, most=st.integers(1, 7), augment=st.booleans())
def test_boxes_are_inside_apart_and_of_the_stated_size(digits, seed, most, augment):
    scene = sample_scene(np.random.default_rng(seed), digits, (1, most), augment)
    assert 1 <= len(scene.objects) <= most
    for position, item in enumerate(scene.objects):
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        assert 14 - 1e-6 <= max(x1 - x0, y1 - y0) * 84 <= 28 + 1e-6
        for other in scene.objects[position + 1 :]:
            gap_x = max(x0 - other.box[2], other.box[0] - x1)
            gap_y = max(y0 - other.box[3], other.box[1] - y1)
            assert max(gap_x, gap_y) >= PIXEL


@pytest.mark.parametrize("augment", [False, True])
def test_boxes_are_tight_around_the_drawn_pixels(digits, augment):
    rng = np.random.default_rng(3)
    size = 252
    seen = set()
    for _ in range(24):
        scene = sample_scene(rng, digits, (4, 5), augment)
        for item in scene.objects:
            seen.add(item.kind)
            changed = drawn_pixels(scene, item, size)
            rows, columns = np.nonzero(changed)
            drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            # A pixel of an 84-pixel image is 3 here; the tips of a star or triangle are thinner than a pixel.
            slack = 3.2 if item.kind in ("star", "triangle") else 1.5
            np.testing.assert_allclose(drawn, np.array(item.box) * size, atol=slack, err_msg=item.kind)
            inside = np.zeros((size, size), dtype=bool)
            x0, y0, x1, y1 = np.array(item.box) * size
            inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
            assert not (changed & ~inside).any()
    assert seen == set(KINDS)


def test_every_shape_is_drawn_differently_and_in_its_colour():
    masks = []
    for kind in SHAPES:
        item = shape(kind, "red", 30, 30, side=14)
        scene = scene_of(item)
        mask = drawn_pixels(scene, item, 84)
        masks.append(mask[30:44, 30:44])
        assert not mask[:30].any() and not mask[44:].any() and not mask[:, :30].any() and not mask[:, 44:].any()
        colour = render(scene, 84)[mask].mean(axis=0) / 255
        nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - colour).sum())
        assert nearest == "red"
    for position, mask in enumerate(masks):
        assert mask[5:9, 5:9].all() == (SHAPES[position] != "ring")
        for other in masks[position + 1 :]:
            assert (mask != other).mean() > 0.08


def test_a_digit_is_drawn_like_its_bitmap(digits):
    rng = np.random.default_rng(5)
    agreement: dict[str, list[float]] = {"upright": [], "mirrored": [], "upside down": []}
    for _ in range(40):
        scene = sample_scene(rng, digits)
        for item in scene.objects:
            if item.digit_index is None or item.glyph is None:
                assert item.kind in SHAPES
                continue
            assert digits.labels[item.digit_index] == int(item.kind)
            bitmap = digits.images[item.digit_index]
            np.testing.assert_array_equal(np.array(item.glyph.bitmap).reshape(8, 8), bitmap)
            x0, y0, x1, y1 = np.round(np.array(item.box) * 252).astype(int)
            drawn = drawn_pixels(scene, item, 252)[y0:y1, x0:x1]
            ink = bitmap >= item.glyph.level
            rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
            cropped = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            enlarged = np.asarray(Image.fromarray(cropped).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR))
            expected = enlarged >= item.glyph.level
            for name, version in (
                ("upright", expected),
                ("mirrored", expected[:, ::-1]),
                ("upside down", expected[::-1]),
            ):
                agreement[name].append(float((drawn == version).mean()))
    assert len(agreement["upright"]) > 30
    assert min(agreement["upright"]) > 0.7
    assert np.mean(agreement["upright"]) > 0.83
    assert np.mean(agreement["mirrored"]) < 0.8
    assert np.mean(agreement["upside down"]) < 0.8


def test_augmentation_changes_how_digits_are_written_and_nothing_else(digits):
    plain = [sample_scene(np.random.default_rng(seed), digits) for seed in range(40)]
    varied = [sample_scene(np.random.default_rng(seed), digits, augment=True) for seed in range(40)]
    plain_glyphs = [item.glyph for scene in plain for item in scene.objects if item.glyph]
    varied_glyphs = [item.glyph for scene in varied for item in scene.objects if item.glyph]
    assert plain_glyphs and all(glyph.rotation == glyph.shear == 0 for glyph in plain_glyphs)
    assert len({glyph.rotation for glyph in varied_glyphs}) == len(varied_glyphs)
    assert len({glyph.level for glyph in varied_glyphs}) > len(varied_glyphs) / 2
    assert max(abs(glyph.rotation) for glyph in varied_glyphs) < 0.3


@pytest.mark.parametrize("upright", [True, False])
def test_rotation_and_shear_move_the_ink_as_stated(upright):
    bar = np.zeros((8, 8), dtype=np.float32)
    bar[:, 3:5] = 1
    bars = DigitBitmaps(np.stack([bar if upright else bar.T] * 10), np.arange(10))
    checked = 0
    for seed in range(60):
        for item in sample_scene(np.random.default_rng(seed), bars, augment=True).objects:
            if item.glyph is None:
                continue
            cosine, sine = np.cos(item.glyph.rotation), np.sin(item.glyph.rotation)
            corners = np.array([(x, y) if upright else (y, x) for x in (-1, 1) for y in (-4, 4)])
            turned = corners @ np.array([[cosine, sine], [-sine, cosine]])
            x, y = turned[:, 0] + item.glyph.shear * turned[:, 1], turned[:, 1]
            # The upscaling rounds corners off by a fraction of a bitmap pixel.
            np.testing.assert_allclose(item.glyph.ink, (x.min(), y.min(), x.max(), y.max()), atol=0.4)
            # The box has the proportions of the ink, unless that would make it thinner than 0.4 of its height.
            (left, top, right, bottom), (x0, y0, x1, y1) = item.glyph.ink, item.box
            assert (x1 - x0) / (y1 - y0) == pytest.approx(max(0.4, (right - left) / (bottom - top)))
            checked += 1
    assert checked > 40


def test_digits_and_colours_come_as_often_as_stated(digits):
    rng = np.random.default_rng(1)
    objects = [item for _ in range(600) for item in sample_scene(rng, digits).objects]
    assert abs(np.mean([item.is_digit for item in objects]) - 0.45) < 0.04
    assert set(Counter(item.colour for item in objects)) == set(COLOUR_NAMES)
    assert max(Counter(item.colour for item in objects).values()) < 0.17 * len(objects)
    assert set(Counter(item.kind for item in objects)) == set(KINDS)


def test_a_seed_fixes_scene_pixels_and_questions(digits):
    def draw(seed: int) -> tuple[Scene, np.ndarray, list[Question]]:
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, digits, augment=True)
        return scene, render(scene), ask_all(rng, scene, 8)

    first, again, other = draw(11), draw(11), draw(12)
    assert first[0] == again[0] and first[2] == again[2]
    np.testing.assert_array_equal(first[1], again[1])
    assert first[0] != other[0] and first[2] != other[2]
    assert (first[1] != other[1]).mean() > 0.5


def test_the_same_scene_looks_alike_at_other_sizes(digits):
    rng = np.random.default_rng(2)
    for _ in range(10):
        scene = sample_scene(rng, digits)
        small, large = render(scene, 84), render(scene, 168)
        assert small.shape == (84, 84, 3) and large.shape == (168, 168, 3)
        assert small.dtype == large.dtype == np.uint8
        halved = large.reshape(84, 2, 84, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - small).mean() < 3
        background = render(replace(scene, objects=()), 84).astype(float)
        halved_background = render(replace(scene, objects=()), 168).reshape(84, 2, 84, 2, 3).mean(axis=(1, 3))
        assert np.corrcoef(background.ravel(), halved_background.ravel())[0, 1] > 0.9
        # The same grain too, not only the same clouds: neighbouring pixels differ alike.
        grain, halved_grain = np.diff(background, axis=0).ravel(), np.diff(halved_background, axis=0).ravel()
        assert np.corrcoef(grain, halved_grain)[0, 1] > 0.6
        # Textured, but with less contrast than any object.
        assert 1 < background.mean(axis=-1).std() < 16


def test_train_and_test_digits_are_disjoint_and_stratified():
    train, test = load_digit_bitmaps("train"), load_digit_bitmaps("test")
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    share = np.bincount(train.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    np.testing.assert_allclose(share, 0.8, atol=0.01)
    np.testing.assert_array_equal(load_digit_bitmaps("test").images, test.images)
    assert train.images.min() == 0 and train.images.max() == 1


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxmllm\[scenes\]'"):
        load_digit_bitmaps("train")


def test_bad_arguments_are_refused(digits, tmp_path):
    rng = np.random.default_rng(0)
    scene = scene_of(shape("star", "red", 10, 10))
    for objects in ((0, 3), (4, 3), (2, 8)):
        with pytest.raises(InputError, match="objects"):
            sample_scene(rng, digits, objects)
    with pytest.raises(InputError, match="split"):
        load_digit_bitmaps("validation")
    with pytest.raises(InputError, match="images"):
        DigitBitmaps(digits.images[:, :7], digits.labels)
    with pytest.raises(InputError, match="labels"):
        DigitBitmaps(digits.images[digits.labels > 0], digits.labels[digits.labels > 0])
    with pytest.raises(InputError, match="ink"):
        DigitBitmaps(digits.images * 0, digits.labels)
    with pytest.raises(InputError, match="size"):
        render(scene, 8)
    with pytest.raises(InputError, match="grid"):
        patch_targets(scene, 0)
    with pytest.raises(InputError, match="riddle"):
        ask(rng, scene, "riddle")
    with pytest.raises(InputError, match="riddle"):
        ask_all(rng, scene, 1, {"riddle": 1.0})
    with pytest.raises(InputError, match="negative"):
        ask_all(rng, scene, 1, {"count": -1.0})
    with pytest.raises(InputError, match="admits no question"):
        ask_all(rng, scene, 1, {"digit": 1.0})
    with pytest.raises(InputError, match="no questions"):
        majority_baseline([])
    with pytest.raises(InputError, match="already there"):
        write_question_set(tmp_path, rng, digits)


# Questions


def one(found: list[SceneObject]) -> SceneObject:
    """The only object found; fails where the question is ambiguous or about nothing."""
    assert len(found) == 1
    return found[0]


def referent(objects: tuple[SceneObject, ...], name: str) -> SceneObject:
    """The object called "red object", "circle" or "7"."""
    if name.endswith(" object"):
        return one([item for item in objects if item.colour == name.removesuffix(" object")])
    return one([item for item in objects if item.kind == name])


def solve(scene: Scene, question: Question) -> tuple[str, set[tuple[float, ...]]]:
    """Answer and evidence worked out from the question's words and the scene's objects alone."""
    objects = scene.objects
    words = question.text.removesuffix(" ?").split()
    middle = {item: ((item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2) for item in objects}
    if words[:2] == ["how", "many"]:
        noun = words[2]
        if noun == "objects":
            counted = list(objects)
        elif noun in ("shapes", "digits"):
            counted = [item for item in objects if (item.kind in DIGITS) == (noun == "digits")]
        else:
            assert words[3] == "objects"
            counted = [item for item in objects if item.colour == noun]
        number = ["zero", "one", "two", "three", "four", "five", "six", "seven"][len(counted)]
        return number, {item.box for item in counted}
    if words[:2] == ["is", "there"]:
        assert words[2] == ("an" if words[3] in ("orange", "8") else "a")
        found = [item for item in objects if (item.colour if words[-1] == "object" else item.kind) == words[3]]
        return "yes" if found else "no", {item.box for item in found}
    for relation, axis in (("above or below", 1), ("left or right of", 0)):
        if relation in question.text:
            first, second = question.text.removesuffix(" ?").removeprefix("is the ").split(f" {relation} the ")
            a, b = referent(objects, first), referent(objects, second)
            assert a is not b
            assert abs(middle[a][axis] - middle[b][axis]) >= 10 * PIXEL
            low, high = relation.split()[0], relation.split()[2]
            return (low if middle[a][axis] < middle[b][axis] else high), {a.box, b.box}
    for word, axis, sign in (("leftmost", 0, 1), ("rightmost", 0, -1), ("topmost", 1, 1), ("bottommost", 1, -1)):
        if word in words:
            ordered = sorted(objects, key=lambda item: sign * middle[item][axis])
            assert sign * (middle[ordered[1]][axis] - middle[ordered[0]][axis]) >= 6 * PIXEL
            assert words[-1] == "object"
            return (ordered[0].colour if words[1] == "colour" else ordered[0].kind), {ordered[0].box}
    if words[:4] == ["what", "colour", "is", "the"]:
        item = referent(objects, words[4])
        return item.colour, {item.box}
    assert words[0] == "what" and words[1] in ("shape", "digit") and words[2] == "is"
    item = one([item for item in objects if item.colour == words[3]])
    assert (item.kind in DIGITS) == (words[1] == "digit")
    return item.kind, {item.box}


@pytest.fixture(scope="module")
def asked(digits) -> dict[str, list[tuple[Scene, Question]]]:
    """About a thousand questions of every kind."""
    rng = np.random.default_rng(17)
    pairs = defaultdict(list)
    for _ in range(1300):
        scene = sample_scene(rng, digits)
        for kind in QUESTION_KINDS:
            question = ask(rng, scene, kind)
            if question is not None:
                pairs[kind].append((scene, question))
    return pairs


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_questions_have_one_right_answer_and_exact_evidence(asked, kind):
    assert len(asked[kind]) > 800
    for scene, question in asked[kind]:
        assert question.kind == kind
        answer, boxes = solve(scene, question)
        assert question.answer == answer, question.text
        assert set(question.boxes) == boxes and len(question.boxes) == len(boxes), question.text


def test_question_kinds_ask_what_their_names_say(asked):
    starts = {
        "colour": "what colour is the ",
        "shape": "what shape is ",
        "digit": "what digit is ",
        "digit_colour": "what colour is the ",
        "count": "how many ",
        "presence": "is there a",
        "extreme": "what ",
        "above_below": "is the ",
        "left_right": "is the ",
    }
    assert set(starts) == set(QUESTION_KINDS)
    for kind, start in starts.items():
        assert all(question.text.startswith(start) for _, question in asked[kind])
    assert all(question.text.split()[4] in SHAPES for _, question in asked["colour"])
    assert all(question.text.split()[4] in DIGITS for _, question in asked["digit_colour"])
    assert all("most object" in question.text for _, question in asked["extreme"])
    assert {question.text.split()[1] for _, question in asked["extreme"]} == {"is", "colour"}
    assert {question.text.split()[2] for _, question in asked["count"]} == {
        "objects",
        "shapes",
        "digits",
        *COLOUR_NAMES,
    }
    assert len({question.text for _, question in asked["presence"]}) == len(COLOUR_NAMES) + len(KINDS)


def test_vocabulary_is_exactly_the_words_in_use(asked, digits):
    rng = np.random.default_rng(4)
    used = {
        word for pairs in asked.values() for _, question in pairs for word in (*question.text.split(), question.answer)
    }
    for _ in range(60):  # only crowded scenes have answers such as "seven"
        crowded = sample_scene(rng, digits, (6, 7))
        used |= {word for question in ask_all(rng, crowded, 30) for word in (*question.text.split(), question.answer)}
    assert used == set(VOCABULARY)
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


@pytest.mark.parametrize(
    ("kind", "answers"), [("presence", "yes no"), ("above_below", "above below"), ("left_right", "left right")]
)
def test_two_way_answers_are_balanced(asked, kind, answers):
    tally = Counter(question.answer for _, question in asked[kind])
    assert set(tally) == set(answers.split())
    assert max(tally.values()) / sum(tally.values()) < 0.55


def test_presence_is_balanced_within_each_family_of_words(asked):
    families = defaultdict(Counter)
    for _, question in asked["presence"]:
        word = question.text.split()[3]
        family = "colour" if word in COLOUR_NAMES else "shape" if word in SHAPES else "digit"
        families[family][question.answer] += 1
    assert len(families) == 3
    for tally in families.values():
        assert 0.4 < tally["yes"] / sum(tally.values()) < 0.6


def test_no_answer_dominates_the_other_kinds(asked):
    for kind in set(QUESTION_KINDS) - {"presence", "above_below", "left_right"}:
        tally = Counter(question.answer for _, question in asked[kind])
        assert max(tally.values()) / sum(tally.values()) < 0.45, kind


def test_ambiguous_scenes_admit_no_question():
    rng = np.random.default_rng(0)
    twins = scene_of(shape("star", "red", 5, 30), shape("star", "red", 40, 33))
    for kind in ("colour", "shape", "digit", "digit_colour", "above_below", "left_right"):
        assert ask(rng, twins, kind) is None
    # 3 pixels apart in height: only left and right are asked for.
    asked_of_twins = {ask(rng, twins, "extreme").text.split()[-3] for _ in range(60)}
    assert asked_of_twins == {"leftmost", "rightmost"}
    assert ask(rng, scene_of(shape("star", "red", 5, 30)), "extreme") is None
    level = scene_of(shape("star", "red", 5, 30), shape("ring", "blue", 40, 38))
    assert ask(rng, level, "above_below") is None
    assert ask(rng, level, "left_right") is not None


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, count=st.integers(0, 12))
def test_ask_all_gives_exactly_as_many_different_questions(digits, seed, count):
    rng = np.random.default_rng(seed)
    questions = ask_all(rng, sample_scene(rng, digits), count)
    assert len(questions) == len({question.text for question in questions}) == count


def test_ask_all_follows_the_weights_and_repeats_only_when_it_must(digits):
    rng = np.random.default_rng(8)
    kinds = Counter()
    for _ in range(150):
        scene = sample_scene(rng, digits)
        kinds.update(
            question.kind for question in ask_all(rng, scene, 6, {"presence": 3.0, "count": 1.0, "digit": 0.0})
        )
    assert set(kinds) == {"presence", "count"}
    assert 0.68 < kinds["presence"] / sum(kinds.values()) < 0.82
    lone = scene_of(shape("star", "red", 10, 10))
    questions = ask_all(rng, lone, 5, {"colour": 1.0})
    assert [question.text for question in questions] == ["what colour is the star ?"] * 5
    many = ask_all(rng, lone, 60, {"count": 1.0})
    assert len(many) == 60 and len({question.text for question in many}) == 11


def test_boxes_scale_and_the_majority_baseline_is_by_kind():
    scene = scene_of(*(shape("star", "red", x, y) for x, y in ((5, 5), (5, 40), (40, 5), (40, 40))))
    boxes = tuple(item.box for item in scene.objects)
    question = Question("count", "how many stars ?", "two", boxes[:2])
    np.testing.assert_allclose(question.scaled(84)[0], (5, 5, 25, 25))
    np.testing.assert_allclose(question.scaled(168)[1], (10, 80, 50, 120))
    answers = [("count", "one"), ("count", "one"), ("count", "two"), ("presence", "yes"), ("presence", "no")]
    assert majority_baseline([Question(kind, "", answer, ()) for kind, answer in answers]) == pytest.approx(3 / 5)


# Patch targets


def test_patch_targets_of_a_known_scene():
    # Patches are 12 pixels wide. The star fills four of them and a sixth of two more in column 3; the ring lies at
    # pixels 46 to 66 across and 58 to 78 down.
    scene = scene_of(
        SceneObject("star", "blue", (12 / 84, 12 / 84, 38 / 84, 36 / 84), COLOURS["blue"]),
        shape("ring", "red", 46, 58, side=20),
    )
    targets = patch_targets(scene)
    star, ring = 1 + KINDS.index("star"), 1 + KINDS.index("ring")
    expected = np.zeros((7, 7), dtype=int)
    expected[1:3, 1:4] = star
    expected[5, 3:6] = ring  # in column 3 only 2 pixels wide, a sixth of the patch
    expected[4, 4] = ring  # 2 pixels high, a sixth; column 5 has a twelfth and stays background
    expected[6, 4:6] = ring  # a half and a quarter; column 3 has a twelfth
    np.testing.assert_array_equal(targets.kind, expected)
    np.testing.assert_array_equal(targets.covered, expected > 0)
    np.testing.assert_array_equal(
        targets.colour,
        np.select(
            [expected == star, expected == ring], [1 + COLOUR_NAMES.index("blue"), 1 + COLOUR_NAMES.index("red")], 0
        ),
    )
    assert np.argwhere(targets.centre).tolist() == [[2, 2], [5, 4]]
    np.testing.assert_array_equal(targets.row, np.select([expected == star, expected == ring], [2, 5], -1))
    np.testing.assert_array_equal(targets.column, np.select([expected == star, expected == ring], [2, 4], -1))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, grid=st.integers(3, 12))
def test_patch_targets_name_the_object_that_covers_most(digits, seed, grid):
    scene = sample_scene(np.random.default_rng(seed), digits)
    targets = patch_targets(scene, grid)
    for row in range(grid):
        for column in range(grid):
            shares = []
            for item in scene.objects:
                x0, y0, x1, y1 = np.array(item.box) * grid
                width = max(0.0, min(x1, column + 1) - max(x0, column))
                shares.append(width * max(0.0, min(y1, row + 1) - max(y0, row)))
            if max(shares) < 0.15:
                found = targets.colour[row, column], targets.kind[row, column], targets.column[row, column]
                assert found == (0, 0, -1) and targets.row[row, column] == -1 and not targets.covered[row, column]
                continue
            item = scene.objects[int(np.argmax(shares))]
            assert COLOUR_NAMES[targets.colour[row, column] - 1] == item.colour
            assert KINDS[targets.kind[row, column] - 1] == item.kind
            assert targets.covered[row, column]
            assert targets.column[row, column] == int(item.centre[0] * grid)
            assert targets.row[row, column] == int(item.centre[1] * grid)
    expected = {(int(item.centre[1] * grid), int(item.centre[0] * grid)) for item in scene.objects}
    assert {tuple(place) for place in np.argwhere(targets.centre).tolist()} == expected


# The written set


def test_written_set_is_complete_and_small(tmp_path):
    test_digits = load_digit_bitmaps("test")
    directory = tmp_path / "sets" / "held_out"
    path = write_question_set(directory, np.random.default_rng(6), test_digits)
    assert path == directory / "questions.jsonl"
    assert [entry.name for entry in directory.parent.iterdir()] == ["held_out"]
    assert sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) < 2_000_000
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["question_id"] for record in records] == list(range(64 * 8))
    # The same generator gives the same scenes again.
    rng = np.random.default_rng(6)
    for number in range(64):
        scene = sample_scene(rng, test_digits)
        questions = ask_all(rng, scene, 8, EVEN_MIX)
        with Image.open(directory / "images" / f"{number:04d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), render(scene, 84))
        for record, question in zip(records[8 * number : 8 * number + 8], questions, strict=True):
            assert set(record) == {"question_id", "image", "text", "category", "answer", "boxes", "objects"}
            assert record["image"] == f"{number:04d}.png"
            assert (record["text"], record["category"], record["answer"]) == (
                question.text,
                question.kind,
                question.answer,
            )
            np.testing.assert_allclose(
                np.reshape(record["boxes"], (-1, 4)), np.reshape(question.scaled(84), (-1, 4)), atol=0.0051
            )
            np.testing.assert_allclose(
                record["objects"], [np.array(item.box) * 84 for item in scene.objects], atol=0.0051
            )
            assert all(box in record["objects"] for box in record["boxes"])


def test_a_failed_write_leaves_nothing_behind(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("jaxmllm.data.scene_questions.render", lambda scene, size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_question_set(tmp_path / "set", np.random.default_rng(0), digits, scenes=1)
    assert list(tmp_path.iterdir()) == []


def test_even_mix_asks_every_kind_about_equally_often(digits):
    rng, counts = np.random.default_rng(3), Counter()
    for _ in range(400):
        counts.update(question.kind for question in ask_all(rng, sample_scene(rng, digits), 8, EVEN_MIX))
    shares = np.array([counts[kind] for kind in QUESTION_KINDS]) / counts.total()
    np.testing.assert_allclose(shares, 1 / 9, atol=0.02)
