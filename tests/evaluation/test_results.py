"""The file of results: whatever is cut off is found, and what was whole stays."""

import json
import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.errors import InputError
from jaxmllm.evaluation.results import RESULTS, SKIPPED, appending, of_process, read_lines, read_results, take_in
from tests.evaluation.cases import make_row

TEXTS = st.text(max_size=20)


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6), data=st.data())
def test_a_file_cut_anywhere_is_gone_on_with_to_the_same_rows(texts, data, tmp_path_factory):
    """As a kill in the middle of a write leaves it: whole lines count, the rest is written again."""
    folder = tmp_path_factory.mktemp("cut")
    rows = [make_row(index, prediction=text) for index, text in enumerate(texts)]
    whole = lines(rows)
    cut = data.draw(st.integers(0, len(whole)))
    (folder / RESULTS.name).write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert read_results(folder) == rows[:kept]
    with appending(folder, RESULTS) as file:
        assert file.present == set(range(kept))
        file.append(rows[kept:])
    assert (folder / RESULTS.name).read_bytes() == whole
    assert read_results(folder) == rows


def test_rows_come_back_in_the_order_of_the_questions(tmp_path):
    (tmp_path / RESULTS.name).write_bytes(lines([make_row(2), make_row(0), make_row(1)]))
    assert [row["index"] for row in read_results(tmp_path)] == [0, 1, 2]


def test_no_file_holds_no_rows(tmp_path):
    assert read_results(tmp_path) == []
    assert not list(tmp_path.iterdir())


DAMAGE = {
    "no json": (b'{"index": 1, \n', "line 2: damaged, not valid JSON"),
    "bytes": (b"\x00\xff\x00\n", "line 2: damaged, not valid JSON"),
    "empty": (b"\n", "line 2: damaged, not valid JSON"),
    "no object": (b"[1]\n", "line 2: expected a JSON object, found list"),
    "no field": (lines([{"index": 1}]), "line 2: field 'question_id' is missing"),
    "key of another type": (lines([make_row(1, index="1")]), "line 2: field 'index' is '1'; expected int"),
    "key that is a truth value": (lines([make_row(1, index=True)]), "line 2: field 'index' is True; expected int"),
    "twice": (lines([make_row(0)]), "line 2: index 0 is already on line 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_in_the_middle_names_the_line_and_changes_nothing(name, tmp_path):
    damaged, message = DAMAGE[name]
    content = lines([make_row(0)]) + damaged + lines([make_row(5)]) + b'{"cut'
    (tmp_path / RESULTS.name).write_bytes(content)
    for read in (read_results, lambda folder: appending(folder, RESULTS).__enter__()):
        with pytest.raises(InputError, match=message) as error:
            read(tmp_path)
        assert str(tmp_path / RESULTS.name) in str(error.value)
    assert (tmp_path / RESULTS.name).read_bytes() == content


def test_a_row_is_not_written_twice(tmp_path):
    with appending(tmp_path, RESULTS) as file:
        file.append([make_row(0)])
        for rows in ([make_row(0)], [make_row(1), make_row(1)]):
            with pytest.raises(InputError, match=r"index . is written already"):
                file.append(rows)
    assert len(read_results(tmp_path)) == 1


def test_two_processes_cannot_write_one_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from jaxmllm.evaluation.results import *\n"
        "with appending(Path(sys.argv[1]), SKIPPED): print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="another process is writing this run"), appending(tmp_path, SKIPPED):
            pass
        other.kill()
    with appending(tmp_path, SKIPPED):  # a killed process holds no lock
        pass


def test_a_disk_that_takes_no_more_leaves_whole_lines(tmp_path):
    """A limit on the size of files stands in for a full disk: a write stops in the middle."""
    with appending(tmp_path, RESULTS) as file:
        file.append([make_row(0)])
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(file.path) + 100, before[1]))
        try:
            with pytest.raises(InputError, match=r"results.jsonl: cannot be written .*the 1 lines before are kept"):
                file.append([make_row(1)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert file.path.read_bytes() == lines([make_row(0)])
        file.append([make_row(1)])
    assert read_results(tmp_path) == [make_row(0), make_row(1)]


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with appending(tmp_path, RESULTS) as file, pytest.raises(ValueError, match="not JSON compliant"):
        file.append([make_row(0, score=float("nan"))])
    assert read_lines(tmp_path, RESULTS) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(InputError, match=r"none/results\.jsonl: cannot be written"),
        appending(tmp_path / "none", RESULTS),
    ):
        pass


def test_lines_of_other_processes_are_taken_in_once(tmp_path):
    """Also where a kill between taking them in and removing their file has left them in both."""
    rows = [make_row(index) for index in range(5)]
    (tmp_path / RESULTS.name).write_bytes(lines(rows[:2]))
    (tmp_path / of_process(RESULTS, 1).name).write_bytes(lines(rows[1:4]) + b'{"index": 9, "que')
    (tmp_path / of_process(RESULTS, 12).name).write_bytes(lines(rows[4:]))
    (tmp_path / "results-old.jsonl").write_bytes(b"somebody's own")
    with appending(tmp_path, RESULTS) as file:
        take_in(file, tmp_path)
    assert read_results(tmp_path) == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results-old.jsonl", "results.jsonl"]
