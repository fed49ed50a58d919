"""Two runs side by side, by hand."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmllm.analysis.bootstrap import mean_interval
from jaxmllm.errors import InputError
from jaxmllm.evaluation.compare import compare
from jaxmllm.evaluation.results import RESULTS
from jaxmllm.evaluation.settings import Settings
from jaxmllm.files import write_json
from tests.evaluation.cases import make_row

SETTINGS = Settings(
    model="m", family="llava", weights="w", benchmark="llava", split=None, data="d", files="f", prompt="{question}",
    edits=None, temperature=None, top_k=None, top_p=None, seed=None, dtype="float32", max_new_tokens=16, limit=None,
)  # fmt: skip


def write_run(folder, rows, **changes):
    folder.mkdir()
    write_json(folder / "run.json", dataclasses.asdict(dataclasses.replace(SETTINGS, **changes)))
    (folder / RESULTS.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(scores, images="abcdefgh", kinds="xxyyxxyy"):
    return [
        make_row(place, score, image=images[place], categories={"kind": kinds[place]}, prediction=f"says {score}")
        for place, score in enumerate(scores)
    ]


def test_numbers_by_hand(tmp_path):
    first = write_run(tmp_path / "a", rows_of([1.0, 0.0, 0.5, 0.0, 1.0], images="ppqqr"))
    second = write_run(tmp_path / "b", rows_of([1.0, 1.0, 0.2, 0.3, 0.0], images="ppqqr"), edits="erase:3")
    found = compare(first, second)
    assert found.settings == {"edits": (None, "erase:3")}
    assert (found.benchmark, found.metric, found.questions) == ("llava", "accuracy", 5)
    assert found.first.value == pytest.approx(0.5) and found.second.value == pytest.approx(0.5)
    difference = found.difference
    assert difference.value == pytest.approx(0.0)
    assert (difference.won, difference.lost, difference.tied) == (2, 2, 1)
    low, high = mean_interval(np.array([0.0, 1.0, 0.2 - 0.5, 0.3, -1.0]), list("ppqqr"))
    assert (difference.low, difference.high) == (pytest.approx(low), pytest.approx(high))
    assert {name: one.value for name, one in found.categories["kind"].items()} == {
        "x": pytest.approx(0.0), "y": pytest.approx(0.0),
    }  # fmt: skip
    assert [one.question_id for one in found.won] == ["q1", "q3"]
    assert [one.question_id for one in found.lost] == ["q4", "q2"]  # the largest change first
    assert found.won[0].predictions == ("says 0.0", "says 1.0") and found.won[0].scores == (0.0, 1.0)
    assert found.won[0].references == ["red"]


def test_pairing_sees_what_two_intervals_hide(tmp_path):
    """A gain on every fourth question, on scores that vary by themselves far more."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2, 200).astype(float)
    after = np.where(np.arange(200) % 4 == 0, 1.0, before)
    runs = [
        write_run(tmp_path / name, [make_row(place, float(score)) for place, score in enumerate(scores)])
        for name, scores in (("a", before), ("b", after))
    ]
    found = compare(*runs)
    assert found.difference.low > 0 and found.difference.lost == 0
    assert found.second.low < found.first.high  # the two intervals by themselves overlap
    back = compare(*reversed(runs))
    assert back.difference.value == -found.difference.value
    assert (back.difference.low, back.difference.high) == (-found.difference.high, -found.difference.low)
    assert (back.difference.won, back.difference.lost) == (found.difference.lost, found.difference.won)


def test_a_run_against_itself_is_a_tie(tmp_path):
    run = write_run(tmp_path / "a", rows_of([1.0, 0.0, 0.5]))
    found = compare(run, run)
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
    assert found.difference.tied == 3 and not found.won and not found.lost and not found.settings


def test_questions_of_one_run_alone_are_named_and_do_not_count(tmp_path):
    rows = rows_of([1.0, 0.0, 0.0, 1.0])
    first, second = write_run(tmp_path / "a", rows[:3]), write_run(tmp_path / "b", rows[1:])
    found = compare(first, second)
    assert (found.only_first, found.only_second, found.questions) == (("q0",), ("q3",), 2)
    assert found.first.value == found.second.value == 0.0


def test_a_group_that_one_run_has_in_part_is_compared_over_what_both_have(tmp_path):
    rows = [make_row(place, score, question_id=str(number), answers=["A"])
            for place, (number, score) in enumerate([(1, 1.0), (1_000_001, 0.0), (2, 1.0)])]  # fmt: skip
    first = write_run(tmp_path / "a", rows, benchmark="mmbench")
    second = write_run(tmp_path / "b", [rows[0], rows[2]], benchmark="mmbench")
    found = compare(first, second)
    assert found.metric == "circular_accuracy" and found.only_first == ("1000001",)
    assert found.difference.tied == 2


FAULTS = {
    "no run": (lambda p: p / "none", "no run of `jaxmllm evaluate` is here"),
    "another benchmark": (
        lambda p: write_run(p / "b", rows_of([1.0]), benchmark="gqa"),
        "is a run over benchmark 'llava', .* over 'gqa'",
    ),
    "another split": (
        lambda p: write_run(p / "b", rows_of([1.0]), split="test"),
        "is a run over split 'val', .* over 'test'",
    ),
    "nothing in common": (
        lambda p: write_run(p / "b", [make_row(0, question_id="other")]),
        "have no question in common",
    ),
    "another question": (
        lambda p: write_run(p / "b", [make_row(0, question="who ?")]),
        "question q0 is 'what .*and 'who .*over the same data",
    ),
    "no scores": (lambda p: write_run(p / "b", [make_row(0, None)]), "have no scores"),
    "damaged": (lambda p: write_run(p / "b", [{"index": 0}]), "results.jsonl, line 1: field 'question_id' is missing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_compared_is_told(name, tmp_path):
    make, message = FAULTS[name]
    first = write_run(tmp_path / "a", rows_of([1.0]), split="val")
    with pytest.raises(InputError, match=message):
        compare(first, make(tmp_path))
