"""Evaluations of the embedded model: what is written, gone on with after a kill, refused, skipped."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxmllm.decoding import Sampling, generate
from jaxmllm.errors import InputError
from jaxmllm.evaluation import evaluate as evaluating
from jaxmllm.evaluation.evaluate import table_rows
from jaxmllm.evaluation.results import RESULTS, SKIPPED, read_results
from jaxmllm.processing import open_image
from tests.evaluation.cases import BATCH, MODEL, ask, make_row, model, write_scenes

COUNT = 22


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 22 questions, its folder and the progress it told."""
    told = []
    evaluation = ask(tmp_path_factory.mktemp("runs") / "whole", limit=COUNT, on_progress=told.append)
    return evaluation, told


def stripped(rows, *without):
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def test_rows_are_what_the_model_generates(whole):
    evaluation, _ = whole
    assert [row["index"] for row in evaluation.rows] == list(range(COUNT))
    for place in (0, 5, 21):
        row, example = evaluation.rows[place], evaluation.opened.source[place]
        assert tuple(row) == RESULTS.fields
        alone = generate(model(), model().prepare([example.image] * BATCH, [example.text] * BATCH), max_new_tokens=16)
        assert row["prediction"] == alone.texts[0]
        assert row["log_probability"] == pytest.approx(float(alone.log_probabilities[0].sum()), abs=1e-4)
        assert row["tokens"] == alone.lengths[0] and row["stopped"] == alone.stopped[0]
        assert (row["question_id"], row["question"], row["where"]) == (
            example.question_id, example.text, example.where
        )  # fmt: skip
        assert row["answers"] == list(example.answers) and row["reference"] == example.answers[0]
        assert row["score"] == float(row["prediction"] == example.answers[0])
        assert row["image"] == str(example.image) and row["categories"] == dict(example.categories)


def test_files_say_the_same(whole):
    evaluation, _ = whole
    folder = evaluation.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.jsonl", "cut.json", "results.jsonl", "results.parquet", "run.json", "skipped.jsonl", "summary.json",
        "versions.json",
    ]  # fmt: skip
    table = pq.read_table(folder / "results.parquet").to_pylist()
    assert [row["prediction"] for row in table] == [row["prediction"] for row in evaluation.rows]
    assert [row["category_category"] for row in table] == [row["categories"]["category"] for row in evaluation.rows]
    assert [json.loads(row["answers"]) for row in table] == [row["answers"] for row in evaluation.rows]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["questions"] == COUNT and summary["skipped"] == 0
    assert summary["score"]["value"] == np.mean([row["score"] for row in evaluation.rows])
    submitted = (folder / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in submitted] == [row["prediction"] for row in evaluation.rows]


def test_a_table_has_the_breakdowns_of_every_row():
    rows = [make_row(0, categories={}), make_row(1, categories={"kind": "a"}, answers=None)]
    first, second = table_rows(rows)
    assert first["category_kind"] is None and second["category_kind"] == "a"
    assert first.keys() == second.keys() and second["answers"] == "null"


def test_progress_counts_what_is_on_the_disk(whole):
    _, told = whole
    assert [progress.done for progress in told] == [4, 8, 12, 16, 20, 22]
    assert {progress.questions for progress in told} == {COUNT}
    assert all(progress.speed > 0 for progress in told)


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be loaded."""
    monkeypatch.setattr(evaluating, "load_over", lambda *args, **options: pytest.fail("the model was loaded"))
    return lambda: None


def test_a_finished_run_is_summed_up_again_without_the_model(whole, tmp_path, no_model):
    folder = tmp_path / "again"
    shutil.copytree(whole[0].folder, folder)
    again = ask(folder, limit=COUNT, at_hand=no_model, on_progress=pytest.fail)
    assert again.answered == 0 and again.rows == whole[0].rows and again.summary == whole[0].summary


def test_a_killed_run_goes_on_to_the_same_lines(whole, tmp_path):
    """Killed by signal 9 while it answers, at a moment that is not chosen."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", "from jaxmllm.cli import main; main()", "evaluate", str(MODEL)]
    options = ["--benchmark", "scenes", "--limit", str(COUNT), "--batch-size", str(BATCH), "--logdir", str(folder)]
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    with subprocess.Popen([*command, *options], env=environment, stdout=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 120
        while not (folder / RESULTS.name).exists() or not (folder / RESULTS.name).stat().st_size:
            assert process.poll() is None and time.monotonic() < ends, "it answered nothing"
        time.sleep(np.random.default_rng().uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
    # what a kill in the middle of a line leaves
    with open(folder / RESULTS.name, "ab") as file:
        file.write(b'{"index": 21, "question_')
    before = len(read_results(folder))
    assert before
    evaluation = ask(folder, limit=COUNT)
    assert evaluation.answered == COUNT - before
    assert evaluation.rows == whole[0].rows == read_results(folder)


def test_a_batch_that_was_half_written_is_completed(whole, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(whole[0].folder, folder)
    lines = (folder / RESULTS.name).read_text().splitlines(keepends=True)
    (folder / RESULTS.name).write_text("".join(lines[:6] + lines[9:17]))
    evaluation = ask(folder, limit=COUNT)
    assert evaluation.answered == 3 + 5 and evaluation.rows == whole[0].rows


def test_the_limit_may_grow_and_not_shrink(whole, tmp_path):
    folder = tmp_path / "grown"
    ask(folder, limit=6)
    assert ask(folder, limit=COUNT).answered == COUNT - 6
    assert stripped(read_results(folder), "log_probability") == stripped(whole[0].rows, "log_probability")
    with pytest.raises(InputError, match="holds answers up to question 22, and only 6 are asked now"):
        ask(folder, limit=6)
    assert json.loads((folder / "run.json").read_text())["limit"] == COUNT


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else(tmp_path):
    sampling = {"sampling": Sampling(8.0, top_k=20), "seed": 5, "max_new_tokens": 8, "limit": 8}
    first = ask(tmp_path / "first", **sampling)
    odd = ask(tmp_path / "odd", batch_size=3, **sampling)
    other = ask(tmp_path / "other", **sampling | {"seed": 6})
    for row, same, unlike in zip(first.rows, odd.rows, other.rows, strict=True):
        assert row["prediction"] == same["prediction"] != unlike["prediction"]
        assert row["log_probability"] == pytest.approx(same["log_probability"], abs=1e-3)


def test_edits_hold_while_answers_are_generated(whole, tmp_path):
    evaluation = ask(tmp_path / "blind", limit=8, edits="blind:0-")
    assert evaluation.opened.settings.edits == "blind:0-"
    assert evaluation.summary.score.value < np.mean([row["score"] for row in whole[0].rows[:8]])


SETTINGS = {
    "edits": ({"edits": "erase:2"}, "edits is None there and 'erase:2' now"),
    "prompt": ({"prompt": "{question} Briefly."}, r"prompt is '{question}' there and '{question} Briefly.' now"),
    "tokens": ({"max_new_tokens": 5}, "max_new_tokens is 16 there and 5 now"),
    "sampling": ({"sampling": Sampling(1.0), "seed": 3}, "temperature is None there and 1.0 now; seed is None"),
    "benchmark": ({"benchmark": "llava", "data": MODEL.parent / "questions"}, "benchmark is 'scenes' there"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_with_other_settings_is_refused(whole, name):
    changes, message = SETTINGS[name]
    before = {path.name: path.read_bytes() for path in whole[0].folder.iterdir()}
    with pytest.raises(InputError, match="holds a run with other settings") as error:
        ask(whole[0].folder, **{"limit": COUNT} | changes)
    assert message in str(error.value) and "Name another folder" in str(error.value)
    assert {path.name: path.read_bytes() for path in whole[0].folder.iterdir()} == before


def test_a_seed_that_draws_nothing_makes_no_other_run(whole):
    assert ask(whole[0].folder, limit=COUNT, seed=9).answered == 0


def test_a_moved_model_is_the_same_and_a_changed_one_is_not(whole, tmp_path):
    moved = tmp_path / "model"
    shutil.copytree(MODEL, moved)
    assert ask(whole[0].folder, limit=COUNT, model=moved).answered == 0
    with open(moved / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(InputError, match="weights is"):
        ask(whole[0].folder, limit=COUNT, model=moved)


def test_changed_data_is_found(whole, tmp_path):
    data = write_scenes(tmp_path / "data", 12)
    folder = tmp_path / "run"
    ask(folder, data=data, limit=8)
    text = (data / "questions.jsonl").read_text()
    (data / "questions.jsonl").write_text(text.replace("what", "that"))  # as long as before
    with pytest.raises(InputError, match="the data has changed since"):
        ask(folder, data=data, limit=12)
    (data / "questions.jsonl").write_text(text + "\n\n")
    with pytest.raises(InputError, match="files is"):
        ask(folder, data=data, limit=12)


def test_a_broken_picture_stops_the_run_or_is_skipped(tmp_path, no_model):
    data = write_scenes(tmp_path / "data", 10, broken=(5,))
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=r"questions.jsonl, line 6: .*5.png: broken, or not an image"):
        ask(folder, data=data, limit=10)
    assert len(read_results(folder)) == 4  # the batch before is kept
    evaluation = ask(folder, data=data, limit=10, skip_bad=True)
    assert [row["index"] for row in evaluation.rows] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert evaluation.summary.skipped == 1 and evaluation.summary.questions == 9
    (line,) = (folder / SKIPPED.name).read_text().splitlines()
    assert json.loads(line)["index"] == 5 and "line 6" in json.loads(line)["where"]
    assert ask(folder, data=data, limit=10, skip_bad=True, at_hand=no_model).answered == 0
    # mended, it is asked; what stood beside it in its batch is not asked again
    shutil.copyfile(data / "images" / "4.png", data / "images" / "5.png")
    mended = ask(folder, data=data, limit=10)
    assert mended.answered == 1 and mended.summary.skipped == 0 and len(mended.rows) == 10


def test_records_that_cannot_be_read_are_listed(tmp_path):
    data = write_scenes(tmp_path / "data", 6)
    (data / "images" / "1.png").unlink()
    with pytest.raises(InputError, match="line 2: no image"):
        ask(tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()
    evaluation = ask(tmp_path / "run", data=data, skip_bad=True)
    assert evaluation.summary.skipped == 1 and len(evaluation.rows) == 5
    assert "no image" in evaluation.skipped[0].problem


def test_nothing_but_broken_pictures_is_an_error_and_leaves_nothing(tmp_path):
    data = write_scenes(tmp_path / "data", 2, broken=(0, 1))
    with pytest.raises(InputError, match=r"none of 2 questions could be asked; the first: .*line 1"):
        ask(tmp_path / "run", data=data, batch_size=None, skip_bad=True)
    assert not (tmp_path / "run").exists()


def test_a_split_without_references_has_answers_and_no_score(tmp_path):
    data = write_scenes(tmp_path / "data", 4)
    records = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    bare = [{name: value for name, value in record.items() if name != "answer"} for record in records]
    (data / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
    evaluation = ask(tmp_path / "run", data=data)
    assert evaluation.summary.score is None and evaluation.summary.metrics == {}
    assert all(row["score"] is None and row["answers"] is None and row["prediction"] for row in evaluation.rows)
    assert len((tmp_path / "run" / "answers.jsonl").read_text().splitlines()) == 4


def test_weights_that_overflow_are_told_rather_than_written(tmp_path):
    broken = jax.tree.map(lambda leaf: leaf * np.inf, model().params)
    with pytest.raises(InputError, match=r"line 1: the model's probabilities are not finite numbers"):
        ask(tmp_path / "run", limit=4, at_hand=lambda: dataclasses.replace(model(), params=broken))
    assert not (tmp_path / "run").exists()


def test_a_model_that_computes_in_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="the model computes in float32, and dtype is 'bfloat16'"):
        ask(tmp_path / "run", dtype="bfloat16")
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_before_its_first_answer_binds_nobody(whole, tmp_path):
    shutil.copyfile(whole[0].folder / "run.json", tmp_path / "run.json")
    (tmp_path / RESULTS.name).write_bytes(b'{"index": 0, "quest')
    assert ask(tmp_path, limit=4, max_new_tokens=5).opened.settings.max_new_tokens == 5


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else than a run"):
        ask(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_answers_without_settings_are_left_alone(whole, tmp_path):
    shutil.copyfile(whole[0].folder / RESULTS.name, tmp_path / RESULTS.name)
    with pytest.raises(InputError, match=r"run\.json is missing beside results\.jsonl"):
        ask(tmp_path, limit=COUNT)
    (tmp_path / "run.json").write_text('{"model": 1')
    with pytest.raises(InputError, match="not the settings of a run"):
        ask(tmp_path, limit=COUNT)
    assert (tmp_path / RESULTS.name).read_bytes() == (whole[0].folder / RESULTS.name).read_bytes()


def test_pictures_are_those_of_the_questions(whole):
    """A batch filled with copies, or read by threads, must not mix pictures up."""
    source = whole[0].opened.source
    assert len({open_image(source[place].image).tobytes() for place in range(COUNT)}) > 1
    assert whole[0].summary.score.value > 0.9  # far above chance, so each answer is to its own picture
