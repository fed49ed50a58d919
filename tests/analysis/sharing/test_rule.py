"""The rule by hand, and against a simulation that follows every dependency."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.analysis.sharing.rule import Segment, Tier, Touch, trace

HEAD, BODY, QUESTION, ANSWER = Segment
GROUP, CONTEXT, ROW = Tier
SHARED, UNSHARED = (GROUP, CONTEXT, ROW, ROW), (CONTEXT, CONTEXT, ROW, ROW)
ALL = (True, True, True, True)
L = 5


def touch(num_layers: int = L, **where) -> Touch:
    """A touch from ``kind=[(layers, segments), ...]`` and ``tier=[(layers, segments, tier), ...]``."""
    arrays = {name: np.zeros((num_layers, 4), bool) for name in ("wipes", "inputs", "keys", "outputs")}
    for name, places in where.items():
        for layers, segments in places if name != "tier" else ():
            arrays[name][np.ix_(np.atleast_1d(layers), np.atleast_1d(segments))] = True
    tier = np.zeros((num_layers, 4), int)
    for layers, segments, value in where.get("tier", ()):
        tier[np.ix_(np.atleast_1d(layers), np.atleast_1d(segments))] = value
    return Touch(**arrays, tier=tier)


def erase(layers) -> Touch:
    return touch(wipes=[(layers, BODY)], inputs=[(layers, BODY)])


def runs_from(start: int, *segments: Segment) -> np.ndarray:
    runs = np.zeros((L, 4), bool)
    runs[start:, list(segments)] = True
    return runs


def test_without_edits_nothing_runs():
    path = trace(touch(), SHARED, ALL)
    assert not path.runs.any() and path.start == L and not path.changes_answer
    assert not any(path.from_clean(*node) or path.reads_clean_keys(*node) for node in np.ndindex(L, 4))


@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("content, tier", [(SHARED, GROUP), (UNSHARED, CONTEXT)])
def test_an_erased_image_runs_once_for_all_that_share_the_text_around_it(layer, content, tier):
    path = trace(erase(layer), content, ALL)
    expected = runs_from(layer, BODY, QUESTION, ANSWER)
    expected[-1, QUESTION] = layer < L - 1  # at the last layer the question only runs if its keys change
    np.testing.assert_array_equal(path.runs, expected)
    assert (path.tier[layer:, BODY] == tier).all()
    assert (path.tier[layer:, [QUESTION, ANSWER]] == ROW).all()
    assert path.start == layer and path.changes_answer
    assert path.wiped[layer, BODY] and not path.from_clean(layer, BODY) and path.from_clean(layer, ANSWER)
    assert all(path.reads_clean_keys(later, HEAD) for later in range(layer, L))
    assert not any(path.reads_clean_keys(later, BODY) for later in range(layer, L))


@pytest.mark.parametrize("kind", ["inputs", "keys"])
def test_a_weakened_or_blinded_image_keeps_its_content(kind):
    """Blinding changes what the layer computes as well as what it shows; erasing in part leaves the rest."""
    outputs = [(2, BODY)] if kind == "keys" else []
    path = trace(touch(**{kind: [(2, BODY)]}, outputs=outputs), SHARED, ALL)
    np.testing.assert_array_equal(path.runs, runs_from(2, BODY, QUESTION, ANSWER))
    assert (path.tier[2:, BODY] == CONTEXT).all()
    assert path.from_clean(2, BODY) and not path.from_clean(3, BODY)


def test_a_knockout_of_the_question_leaves_the_image_alone():
    path = trace(touch(outputs=[(1, [QUESTION, ANSWER])], tier=[(1, [QUESTION, ANSWER], ROW)]), SHARED, ALL)
    np.testing.assert_array_equal(path.runs, runs_from(1, QUESTION, ANSWER))
    assert (path.tier[1:, [QUESTION, ANSWER]] == ROW).all()
    assert path.reads_clean_keys(1, BODY) and path.reads_clean_keys(4, HEAD)
    assert not path.reads_clean_keys(0, BODY)


def test_a_knockout_of_the_last_token_runs_the_answer_alone():
    path = trace(touch(outputs=[(1, ANSWER)], tier=[(1, ANSWER, ROW)]), SHARED, ALL)
    np.testing.assert_array_equal(path.runs, runs_from(1, ANSWER))
    assert path.reads_clean_keys(1, QUESTION)


def test_weights_of_every_question_make_the_image_its_own():
    path = trace(touch(inputs=[(1, BODY)], tier=[(1, BODY, ROW)]), SHARED, ALL)
    assert (path.tier[1:, BODY] == ROW).all()
    wiped = trace(touch(wipes=[(1, BODY)], inputs=[(1, BODY)], tier=[(1, BODY, CONTEXT)]), SHARED, ALL)
    assert (wiped.tier[1:, BODY] == CONTEXT).all()


def test_erasing_again_makes_alike_what_weights_had_told_apart():
    both = touch(
        wipes=[(3, BODY)], inputs=[(1, BODY), (3, BODY)], tier=[(1, BODY, ROW)], keys=[(1, BODY)], outputs=[(1, BODY)]
    )
    path = trace(both, SHARED, ALL)
    assert path.tier[1:, BODY].tolist() == [ROW, ROW, GROUP, GROUP]
    assert path.runs[1:, BODY].all() and path.wiped[:, BODY].tolist() == [False, False, False, True, False]


def test_at_the_last_layer_only_keys_and_the_answer_run():
    outputs = trace(touch(outputs=[(L - 1, [HEAD, BODY, QUESTION, ANSWER])]), SHARED, ALL)
    np.testing.assert_array_equal(outputs.runs, runs_from(L - 1, ANSWER))
    keys = trace(touch(keys=[(L - 1, BODY)], outputs=[(L - 1, BODY)]), SHARED, ALL)
    np.testing.assert_array_equal(keys.runs, runs_from(L - 1, BODY, ANSWER))
    unread = trace(touch(outputs=[(L - 1, BODY)]), SHARED, ALL)
    assert not unread.runs.any() and not unread.changes_answer


def test_an_image_that_is_not_there_cannot_be_erased():
    path = trace(erase(1), SHARED, (False, False, True, True))
    assert not path.runs.any()


def test_an_edit_of_the_text_before_the_image_changes_all_that_follows():
    path = trace(touch(outputs=[(1, [HEAD])]), SHARED, ALL)
    expected = runs_from(2, *Segment)
    expected[1, HEAD] = True
    np.testing.assert_array_equal(path.runs, expected)
    assert (path.tier[2:, HEAD] == GROUP).all() and (path.tier[2:, BODY] == CONTEXT).all()


# Random touches, and a simulation of what every node depends on.


@st.composite
def touches(draw, tiers=st.integers(0, 2)):
    layers = draw(st.integers(1, 4))
    # few edits a touch, or nothing would be left unchanged
    chances = st.integers(0, 9).map(lambda number: number == 0)
    inputs, wipes, keys, outputs = (
        np.array(draw(st.lists(chances, min_size=4 * layers, max_size=4 * layers))).reshape(layers, 4) for _ in range(4)
    )
    inputs |= wipes
    tier = np.array(draw(st.lists(tiers, min_size=4 * layers, max_size=4 * layers))).reshape(layers, 4)
    return Touch(wipes, inputs, keys, outputs, np.where(inputs | keys | outputs, tier, 0))


PRESENT = st.tuples(st.booleans(), st.booleans(), st.just(True), st.just(True))
CONTENT = st.sampled_from([SHARED, UNSHARED])


class Simulation:
    """Every value as a number that stands for all it was computed from: equal numbers, equal values."""

    def __init__(self):
        self.numbers = {}

    def value(self, *made_of) -> int:
        return self.numbers.setdefault(made_of, len(self.numbers))

    def run(self, touch: Touch, content, present, example: tuple[int, int, int]):
        """States before every layer (and after the last) and the keys of every layer, by segment.

        ``example`` names the text around the image, the image, and the question.
        """
        there = [segment for segment in Segment if present[segment]]
        place = example[: content[HEAD] + 1]  # what positions depend on
        state = {segment: self.value("start", segment, example[: content[segment] + 1]) for segment in there}
        states, keys = [dict(state)], []
        for layer in range(len(touch.tier)):
            edit = {segment: ("edit", layer, segment, example[: touch.tier[layer, segment] + 1]) for segment in there}
            for segment in there:
                if touch.inputs[layer, segment]:
                    left = "zeros" if touch.wipes[layer, segment] else state[segment]
                    # a segment that is wiped is all zeros, unless other edits of it come on top
                    own = edit[segment] if touch.tier[layer, segment] or left != "zeros" else "whole"
                    state[segment] = self.value("edited", segment, left, own)
            seen = {
                segment: self.value("keys", place, state[segment], edit[segment] if touch.keys[layer, segment] else 0)
                for segment in there
            }
            state = {
                segment: self.value(
                    "layer",
                    layer,
                    state[segment],
                    tuple(seen[earlier] for earlier in there if earlier <= segment),
                    edit[segment] if touch.outputs[layer, segment] else 0,
                )
                for segment in there
            }
            keys.append(seen)
            states.append(dict(state))
        return states, keys


def nothing_of(touch: Touch) -> Touch:
    none = np.zeros_like(touch.inputs)
    return Touch(none, none, none, none, np.zeros_like(touch.tier))


def computed(simulated, last: bool, layer: int, segment: Segment) -> int:
    """What a run of a segment through a layer gives: its keys alone at the last one, unless it is the answer."""
    states, keys = simulated
    return keys[layer][segment] if last and segment != ANSWER else states[layer + 1][segment]


@settings(deadline=None, max_examples=300)
@given(touches(), CONTENT, PRESENT)
def test_what_does_not_run_is_what_the_clean_run_computed_and_nothing_else(touch, content, present):
    path, simulation = trace(touch, content, present), Simulation()
    edited = simulation.run(touch, content, present, (0, 0, 0))
    clean = simulation.run(nothing_of(touch), content, present, (0, 0, 0))
    num_layers = len(touch.tier)
    for layer, segment in itertools.product(range(num_layers), Segment):
        if not present[segment]:
            assert not path.runs[layer, segment]
            continue
        node = (layer == num_layers - 1, layer, segment)
        assert path.runs[layer, segment] == (computed(edited, *node) != computed(clean, *node))
        if path.from_clean(layer, segment):
            assert edited[0][layer][segment] == clean[0][layer][segment]
        if path.reads_clean_keys(layer, segment):
            assert edited[1][layer][segment] == clean[1][layer][segment]


@settings(deadline=None, max_examples=300)
@given(touches(), CONTENT, PRESENT)
def test_one_computation_serves_all_examples_that_the_tier_says(touch, content, present):
    path, simulation = trace(touch, content, present), Simulation()
    run = simulation.run(touch, content, present, (0, 0, 0))
    like = {
        GROUP: simulation.run(touch, content, present, (0, 1, 1)),
        CONTEXT: simulation.run(touch, content, present, (0, 0, 1)),
    }
    for layer, segment in np.argwhere(path.runs):
        node = (layer == len(touch.tier) - 1, layer, Segment(segment))
        if path.tier[layer, segment] < ROW:
            other = like[Tier(path.tier[layer, segment])]
            assert computed(run, *node) == computed(other, *node)


@settings(deadline=None, max_examples=300)
@given(touches(tiers=st.just(0)), CONTENT, PRESENT)
def test_edits_that_are_alike_for_all_examples_lead_to_no_computation_that_could_be_shared_further(
    touch, content, present
):
    path, simulation = trace(touch, content, present), Simulation()
    run = simulation.run(touch, content, present, (0, 0, 0))
    unlike = {
        CONTEXT: simulation.run(touch, content, present, (0, 1, 0)),
        ROW: simulation.run(touch, content, present, (0, 0, 1)),
    }
    for layer, segment in np.argwhere(path.runs & (path.tier > GROUP)):
        node = (layer == len(touch.tier) - 1, layer, Segment(segment))
        assert computed(run, *node) != computed(unlike[Tier(path.tier[layer, segment])], *node)


@settings(deadline=None, max_examples=200)
@given(touches(), CONTENT, PRESENT)
def test_what_runs_runs_to_the_end_and_later_segments_are_shared_no_further(touch, content, present):
    path = trace(touch, content, present)
    assert (path.runs[1:] >= path.runs[:-1]).all()
    unwiped = ~np.logical_or.accumulate(touch.wipes, axis=0)
    for layer in range(len(touch.tier)):
        there = [segment for segment in Segment if path.runs[layer, segment]]
        last = layer == len(touch.tier) - 1
        if not last:
            assert (np.diff(path.tier[layer, there]) >= 0).all()
        for segment in there:
            assert path.tier[layer, segment] <= path.tier[layer, ANSWER] or not path.runs[layer, ANSWER]
            if unwiped[layer, segment]:
                assert path.tier[layer, segment] >= content[segment]
            elif touch.wipes[layer, segment]:
                assert path.wiped[layer, segment] and not path.from_clean(layer, segment)
