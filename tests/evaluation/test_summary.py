"""Summaries by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.analysis.bootstrap import mean_interval
from jaxmllm.data.benchmarks import benchmark_named
from jaxmllm.evaluation.summary import summarise
from tests.evaluation.cases import llava, make_row


def test_numbers_by_hand():
    rows = [
        make_row(0, 1.0, categories={"kind": "a", "size": "big"}, image="x", tokens=2, log_probability=-1.0),
        make_row(1, 0.0, categories={"kind": "b", "size": "big"}, image="x", tokens=4, stopped=False),
        make_row(2, 0.5, categories={"kind": "b"}, image="y", tokens=3, log_probability=-3.0),
        make_row(3, 1.0, categories={"kind": "b"}, image="z", tokens=3, log_probability=-0.5),
    ]
    summary = summarise(llava(), rows, skipped=2)
    assert (summary.questions, summary.skipped, summary.metric) == (4, 2, "accuracy")
    assert summary.score.value == 0.625 and summary.score.count == 4
    low, high = mean_interval(np.array([1.0, 0.0, 0.5, 1.0]), ["x", "x", "y", "z"])
    assert (summary.score.low, summary.score.high) == (low, high)
    assert list(summary.categories) == ["kind", "size"]
    assert list(summary.categories["kind"]) == ["b", "a"]  # the most frequent first
    assert summary.categories["kind"]["b"].value == 0.5 and summary.categories["kind"]["b"].count == 3
    assert summary.categories["size"]["big"].value == 0.5 and summary.categories["size"]["big"].count == 2
    assert (summary.stopped, summary.mean_tokens, summary.mean_log_probability) == (0.75, 3.0, -1.25)


def test_questions_of_one_image_are_drawn_together():
    """The interval of many questions on two images is that of two images."""
    spread = [make_row(place, float(place % 2), image=f"{place}") for place in range(40)]
    crowded = [make_row(place, float(place % 2), image=f"{place % 2}") for place in range(40)]
    one, other = summarise(llava(), spread).score, summarise(llava(), crowded).score
    assert one.value == other.value == 0.5
    assert one.high - one.low < 0.4 < other.high - other.low == 1.0


@given(scores=st.lists(st.sampled_from([0.0, 0.3, 1.0, None]), min_size=1, max_size=12))
def test_no_number_is_undefined(scores):
    rows = [make_row(place, score, image=f"{place % 3}") for place, score in enumerate(scores)]
    summary = summarise(llava(), rows)
    scored = [score for score in scores if score is not None]
    json.dumps(summary.metrics, allow_nan=False)
    if not scored:
        assert summary.score is None and summary.metric is None and summary.categories == {}
        return
    assert summary.score.value == pytest.approx(np.mean(scored)) and summary.score.count == len(scored)
    assert 0 <= summary.score.low <= summary.score.high <= 1


def test_items_of_a_circular_benchmark_are_its_groups():
    """Two base questions, four rotations: one group is right throughout."""
    rows = [
        make_row(place, score, question_id=str(base + turn * 1_000_000), categories={"category": f"c{base}"})
        for place, (base, turn, score) in enumerate([(1, 0, 1.0), (1, 1, 1.0), (2, 0, 1.0), (2, 1, 0.0)])
    ]
    summary = summarise(benchmark_named("mmbench"), rows)
    assert summary.metric == "circular_accuracy" and summary.metrics["circular_accuracy"] == 0.5
    assert summary.score.value == 0.5 and summary.score.count == 2 and summary.questions == 4
    assert {name: score.value for name, score in summary.categories["category"].items()} == {"c1": 1.0, "c2": 0.0}


def test_the_headline_is_the_mean_of_the_items():
    """Of every benchmark whose items are its rows."""
    rows = [make_row(place, place % 3 / 2, categories={"kind": "open", "subset": "random"}, answers=["yes"],
                     prediction="yes" if place % 3 == 2 else "no") for place in range(9)]  # fmt: skip
    for name in ("gqa", "vqav2", "okvqa", "vizwiz", "textvqa", "docvqa", "llava"):
        summary = summarise(benchmark_named(name), rows)
        assert summary.metrics[summary.metric] == pytest.approx(summary.score.value), name
    whole = [row | {"score": float(row["prediction"] == "yes")} for row in rows]
    summary = summarise(benchmark_named("pope"), whole)
    assert summary.metric == "accuracy" and summary.metrics["accuracy"] == pytest.approx(summary.score.value)
