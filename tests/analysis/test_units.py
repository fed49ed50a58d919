"""How a study is cut into units, and what is kept of each."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.analysis.blocks import UNIT_ROWS, UNITS, Cut, unit_rows
from jaxmllm.analysis.generated import Answer
from jaxmllm.analysis.scores import BlockScores, Scores
from jaxmllm.analysis.sharing.shapes import Shapes
from jaxmllm.analysis.units import UnitResult, from_arrays, join_looks, to_arrays


@given(st.integers(1, 100_000), st.integers(1, 64), st.sampled_from([1, 2, 3, 8]))
def test_units_are_whole_chunks_many_enough_and_not_too_large(questions, rows, data):
    unit, together = unit_rows(questions, rows, data), rows * data
    assert unit % together == 0
    assert together <= unit < UNIT_ROWS + together
    if (
        unit > together
    ):  # one round of chunks less, and units would be as many as are asked for, or as large as they may be
        assert (unit - together) * UNITS < questions and unit - together < UNIT_ROWS


def test_a_cut_comes_back_from_its_record():
    cut = Cut(3, Shapes((5, 9), 3, 2, 4, (16, 64)), 32, 4)
    assert Cut.read(json.loads(json.dumps(dataclasses.asdict(cut)))) == cut


def scores(rng, *shape):
    return Scores(
        rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.5, rng.integers(0, 9, shape).astype(np.int32)
    )


def result(rng, questions, branches=4, layers=3, looks=True, generated=True):
    answers = [Answer(tuple(rng.integers(0, 9, 2).tolist()), f"ä {number}\n") for number in range(questions)]
    return UnitResult(
        BlockScores(
            scores(rng, branches, questions),
            scores(rng, questions),
            scores(rng, layers, questions),
            rng.random((layers, questions, 5)).astype(np.float32),
        ),
        tuple(rng.random((questions, 5, 7)).astype(np.float32)) if looks else (),
        tuple(answers) if generated else (),
        tuple(tuple(answers[::-1]) for _ in range(branches)) if generated else (),
        7 if generated else 0,
    )


@pytest.mark.parametrize(("looks", "generated"), [(False, False), (True, False), (True, True)])
def test_results_come_back_from_their_arrays(looks, generated):
    before = result(np.random.default_rng(0), 3, looks=looks, generated=generated)
    after = from_arrays(to_arrays(before))
    assert (after.clean, after.answers, after.tried) == (before.clean, before.answers, before.tried)
    assert len(after.looks) == len(before.looks)
    for table in ("edited", "clean", "early"):
        for one, other in zip(
            dataclasses.astuple(getattr(after.scores, table)),
            dataclasses.astuple(getattr(before.scores, table)),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
    np.testing.assert_array_equal(after.scores.attention, before.scores.attention)


def test_looks_stand_for_every_question():
    rng = np.random.default_rng(1)
    assert join_looks([result(rng, 2, looks=False), result(rng, 1, looks=False)]) == [None] * 3
    found = join_looks([result(rng, 2), result(rng, 1)])
    assert len(found) == 3 and all(look.shape == (5, 7) for look in found)
