"""Submissions: the forms that test servers and evaluators take."""

import json

import pytest

from jaxmllm.data.benchmarks import benchmark_named
from tests.support.benchmarks import rows_of, write_benchmark


@pytest.fixture
def opened(tmp_path):
    def open_benchmark(name):
        write_benchmark(name, tmp_path)
        return benchmark_named(name).open(tmp_path)

    return open_benchmark


SUBMITTED = {
    "gqa": {"questionId": "00020131", "prediction": "It's “red”"},
    "vqav2": {"question_id": 42000, "answer": "It's “red”"},
    "okvqa": {"question_id": 42000, "answer": "It's “red”"},
    "vizwiz": {"image": "VizWiz_val_00000000.jpg", "answer": "It's “red”"},
    "textvqa": {"question_id": 34602, "answer": "It's “red”"},
    "textvqa-ocr": {"question_id": 34602, "answer": "It's “red”"},
    "docvqa": {"questionId": 49153, "answer": "It's “red”"},
}


@pytest.mark.parametrize("name", SUBMITTED)
def test_submissions_are_in_the_official_form(opened, name):
    source, benchmark = opened(name), benchmark_named(name)
    submission = benchmark.submission(rows_of(name, source, ["It's “red”", "", "x\ny", "z"]))
    entries = json.loads(submission.text)
    assert entries[0] == SUBMITTED[name]
    assert len(entries) == 4
    assert submission.filename.endswith(".json")


def test_llavas_answer_file(opened):
    source, benchmark = opened("llava"), benchmark_named("llava")
    rows = rows_of("llava", source, ["red", "x\ny", "", "z"])
    rows[1]["question_id"] = "007"
    text = benchmark.submission(rows).text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["question_id"] for line in lines] == [0, "007", 2, 3]
    assert lines[0] | {"answer_id": ""} == {
        "question_id": 0, "prompt": "what colour is shape 0 ?", "text": "red", "answer_id": "", "model_id": "jaxmllm",
        "metadata": {},
    }  # fmt: skip
    assert len({line["answer_id"] for line in lines}) == 4
    assert benchmark.submission(rows).text == text
