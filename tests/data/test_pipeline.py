"""Batches of questions: in order, sharded, resumed, and whole whatever is missing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.data.benchmarks import benchmark_named
from jaxmllm.data.pipeline import batches
from jaxmllm.errors import InputError, ProcessorError
from tests.evaluation.cases import write_scenes

COUNT = 11


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return benchmark_named("llava").open(write_scenes(tmp_path_factory.mktemp("scenes") / "data", COUNT))


def prepare(images, texts):
    """Stands in for a processor: remembers what it was given."""
    return {"texts": np.array(texts), "first_pixels": np.stack([np.asarray(image)[0, 0] for image in images])}


def made(source, batch_size=4, done=frozenset(), prepare=prepare, **options):
    return batches(source, lambda example: f"Q: {example.text}", prepare, batch_size, done, **options)


def places(batch):
    return [one.index for one in batch.ready]


def test_batches_hold_every_question_once_and_are_filled_to_one_size(source):
    found = list(made(source))
    assert [places(batch) for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for batch in found:
        assert len(batch.row_numbers) == len(batch.inputs["texts"]) == 4
        assert list(batch.row_numbers[: len(batch.ready)]) == places(batch)
        assert batch.inputs["texts"].tolist()[: len(batch.ready)] == [f"Q: {one.example.text}" for one in batch.ready]
        assert [one.prompt for one in batch.ready] == [f"Q: {one.example.text}" for one in batch.ready]
    assert found[-1].row_numbers == (8, 9, 10, 8)
    assert found[-1].inputs["texts"][3] == found[-1].inputs["texts"][0]


@settings(deadline=None, max_examples=40)
@given(done=st.frozensets(st.integers(0, COUNT - 1)), batch_size=st.integers(1, 12), processes=st.integers(1, 4))
def test_what_is_done_moves_no_question_into_another_batch(source, done, batch_size, processes):
    """Over all processes: every question that is left once, in the batch it is in when nothing is done."""
    found = []
    for process in range(processes):
        for batch in made(source, batch_size, done, process_index=process, process_count=processes):
            number = batch.ready[0].index // batch_size
            assert number % processes == process
            assert places(batch) == list(range(number * batch_size, min((number + 1) * batch_size, COUNT)))
            assert not done.issuperset(places(batch))
            found += places(batch)
    assert len(found) == len(set(found))
    assert set(range(COUNT)) - done <= set(found)


@pytest.mark.parametrize("consumed", [0, 1, 2, 3])
def test_an_iterator_resumes_from_its_state(source, consumed):
    dataset = made(source)
    first = iter(dataset)
    for _ in range(consumed):
        next(first)
    state = first.get_state()
    rest = [places(batch) for batch in first]
    again = iter(made(source))
    again.set_state(state)
    assert [places(batch) for batch in again] == rest
    assert len(rest) == 3 - consumed


def test_a_broken_picture_is_told_and_the_others_are_asked(tmp_path):
    source = benchmark_named("llava").open(write_scenes(tmp_path / "data", 6, broken=(0, 2, 4, 5)))
    first, second = made(source)
    assert places(first) == [1, 3] and first.row_numbers == (1, 3, 1, 1)
    file = tmp_path / "data" / "questions.jsonl"
    assert [(one.index, one.where) for one in first.broken] == [(0, f"{file}, line 1"), (2, f"{file}, line 3")]
    assert "0.png: broken, or not an image" in first.broken[0].problem
    assert second.inputs is None and second.ready == () and second.row_numbers == ()
    assert [one.index for one in second.broken] == [4, 5]


def test_what_the_processor_refuses_is_found_among_the_others(source):
    def picky(images, texts):
        if any("digit" in text for text in texts):
            raise ProcessorError("no digits please")
        return prepare(images, texts)

    found = list(made(source, prepare=picky))
    refused = [one.index for batch in found for one in batch.broken]
    assert refused == [place for place in range(COUNT) if "digit" in source[place].text]
    assert 0 < len(refused) < COUNT
    assert sorted(refused + [place for batch in found for place in places(batch)]) == list(range(COUNT))
    assert all(one.problem == "no digits please" for batch in found for one in batch.broken)


def test_what_fails_together_only_is_no_fault_of_a_question(source):
    def crowded(images, texts):
        if len(texts) > 1:
            raise ValueError("too many at once")
        return prepare(images, texts)

    with pytest.raises(ValueError, match="too many at once"):
        list(made(source, prepare=crowded))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"process_index": 2, "process_count": 2}, r"process_index is 2 of 2; expected 0\.\.1"),
        ({"process_index": -1}, r"process_index is -1 of 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(source, options, message):
    with pytest.raises(InputError, match=message):
        made(source, **options)
