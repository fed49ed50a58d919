"""Runs of several processes, and runs that are stopped: in the end every table is that of an uninterrupted run."""

import json
import random
import signal
import sys
import time

import pyarrow.parquet as pq
import pytest

from tests.support.demo import DEMO
from tests.support.processes import Started, run

MODEL = DEMO / "model"
QUESTIONS = ["--questions", DEMO / "questions" / "questions.jsonl", "--images", DEMO / "questions" / "images"]


def evaluation(folder, limit=48, *more):
    options = ["--benchmark", "scenes", "--limit", limit, "--batch-size", 4, "--examples", 0, "--logdir", folder]
    return ["evaluate", MODEL, *options, *more]


def sweep(folder, limit=24, *more):
    options = ["--limit", limit, "--batch-size", 4, "--edits", "erase", "--examples", 1, "--logdir", folder]
    return ["sweep", MODEL, *QUESTIONS, *options, *more]


def answers(folder):
    return pq.read_table(folder / "results.parquet").to_pylist()


def tables(folder):
    return [pq.read_table(folder / name).to_pylist() for name in ("results.parquet", "questions.parquet")]


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "evaluation"
    run(evaluation(folder))
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "sweep"
    run(sweep(folder))
    return folder


def progress(folder):
    """What a run has on the disk: lines of answers, or parts."""
    lines = sum(path.read_bytes().count(b"\n") for path in folder.glob("results*.jsonl"))
    return lines + len(list(folder.glob("parts/*.npz")))


def test_two_processes_answer_what_one_answers(evaluated, tmp_path):
    folder = tmp_path / "run"
    started = run(evaluation(folder), count=2, devices=2)
    assert answers(folder) == answers(evaluated)
    assert sorted(path.name for path in folder.glob("results*")) == ["results.jsonl", "results.parquet"]
    assert "48 questions" in started.said(0) and "questions answered" not in started.said(1)
    (start,) = json.loads((folder / "versions.json").read_text())["starts"]
    assert (start["processes"], start["groups"], start["devices"]) == (2, 2, "4 x cpu")


@pytest.mark.slow
def test_four_processes_sweep_what_one_sweeps(swept, tmp_path):
    folder = tmp_path / "run"
    run(sweep(folder), count=4, devices=2, seconds=600)
    assert tables(folder) == tables(swept)
    assert not (folder / "parts").exists() and (folder / "summary").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "mesh"), [(2, 2, "data=1,model=4"), (4, 1, "data=2,model=2")])
def test_a_copy_of_the_model_over_several_processes(evaluated, tmp_path, count, devices, mesh):
    folder = tmp_path / "run"
    run(evaluation(folder, 48, "--mesh", mesh), count=count, devices=devices, seconds=600)
    found, expected = answers(folder), answers(evaluated)
    assert without(found, "log_probability") == without(expected, "log_probability")
    for row, other in zip(found, expected, strict=True):
        assert row["log_probability"] == pytest.approx(other["log_probability"], abs=1e-4)


@pytest.mark.slow
def test_a_sweep_over_a_copy_in_several_processes(swept, tmp_path):
    folder = tmp_path / "run"
    run(sweep(folder, 24, "--mesh", "data=1,model=4"), count=2, devices=2, seconds=600)
    for found, expected in zip(tables(folder), tables(swept), strict=True):
        for row, other in zip(found, expected, strict=True):
            assert row == {name: pytest.approx(value, abs=1e-4) for name, value in other.items()} or row == other


def starts(folder):
    """How often a run was begun."""
    path = folder / "versions.json"
    return len(json.loads(path.read_text())["starts"]) if path.exists() else 0


def kill_again_and_again(command, folder, times, layouts, rng, longest):
    """Kills a job at moments after it has begun, up to so many seconds later; how often it was killed at work."""
    killed = 0
    for number in range(times):
        count, devices, more = layouts[number % len(layouts)]
        before = starts(folder)
        started = Started([*command, *more], count, devices)
        assert started.wait_until(lambda before=before: starts(folder) > before), started.said()
        time.sleep(rng.uniform(0.0, longest))
        killed += any(process.poll() is None for process in started.processes)
        for process in started.processes:
            process.send_signal(signal.SIGKILL)
        started.wait()
        if (folder / "results.parquet").exists():
            break
    return killed


ALONE, TWO = (1, 1, ()), (2, 1, ())


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_three_times_ends_as_if_it_had_not_been(evaluated, tmp_path, seed):
    folder = tmp_path / "run"
    command = evaluation(folder)
    assert kill_again_and_again(command, folder, 3, [ALONE, TWO, (1, 2, ())], random.Random(seed), 2.0) == 3
    run(command)
    assert answers(folder) == answers(evaluated)


LAYOUTS = [ALONE, TWO, (1, 2, ()), ALONE, (2, 2, ())]


@pytest.mark.slow
def test_an_evaluation_killed_at_twenty_moments(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(evaluation(whole, 384))
    command = evaluation(folder, 384)
    assert kill_again_and_again(command, folder, 20, LAYOUTS, random.Random(1), 0.8) == 20
    run(command)
    assert answers(folder) == answers(whole)


@pytest.mark.slow
def test_a_sweep_killed_at_twenty_moments(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    command = sweep(folder, 384)
    run(sweep(whole, 384))
    assert kill_again_and_again(command, folder, 20, LAYOUTS, random.Random(2), 2.0) == 20
    run(command, seconds=600)
    assert tables(folder) == tables(whole)


def test_a_sweep_goes_on_where_it_was_killed(swept, tmp_path):
    folder = tmp_path / "run"
    started = Started(sweep(folder))
    assert started.wait_until(lambda: progress(folder) >= 2)
    started.kill()
    parts = {path.name: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.npz")}
    assert 2 <= len(parts) < 6 and not (folder / "results.parquet").exists()
    going_on = Started(sweep(folder), devices=2)
    assert going_on.wait_until(lambda: progress(folder) > len(parts))
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.npz")}
    assert kept.items() >= parts.items(), "what was finished was computed again"
    assert going_on.wait() == [0]
    assert tables(folder) == tables(swept)


@pytest.mark.parametrize("make", [evaluation, pytest.param(sweep, marks=pytest.mark.slow)])
def test_sigterm_ends_a_run_well_and_it_goes_on(make, evaluated, swept, tmp_path):
    folder = tmp_path / "run"
    started = Started(make(folder))
    assert started.wait_until(lambda: folder.exists() and progress(folder) > 0)
    before = time.monotonic()
    started.processes[0].send_signal(signal.SIGTERM)
    assert started.wait(40) == [0] and time.monotonic() - before < 30
    assert not (folder / "results.parquet").exists(), "it ran to its end"
    assert "the same command goes on" in started.said()
    run(make(folder))
    if make is evaluation:
        assert answers(folder) == answers(evaluated)
    else:
        assert tables(folder) == tables(swept)


@pytest.mark.slow
def test_sigterm_while_nothing_is_done_yet(tmp_path):
    """A process that compiles, or loads, cannot run Python's signal handlers."""
    folder = tmp_path / "run"
    started = Started(evaluation(folder))
    assert started.wait_until(lambda: (folder / "run.json").exists())
    started.processes[0].send_signal(signal.SIGTERM)
    before = time.monotonic()
    assert started.wait(40) == [0] and time.monotonic() - before < 30
    run(evaluation(folder, 4))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_dead_process_ends_the_others_within_a_minute(victim, tmp_path):
    folder = tmp_path / "run"
    started = Started(evaluation(folder, 4000), count=2)
    assert started.wait_until(lambda: folder.exists() and progress(folder) > 0)
    started.processes[victim].send_signal(signal.SIGKILL)
    before = time.monotonic()
    codes = started.wait(70)
    assert time.monotonic() - before < 60 and codes[1 - victim] == 3, codes
    (line,) = [line for line in started.said(1 - victim).splitlines()[-2:] if line.startswith("error: ")]
    assert "another process of this run has ended" in line and "same command" in line


def test_a_process_that_cannot_go_on_says_why_and_ends_the_others(tmp_path):
    folder = tmp_path / "run"
    started = Started(evaluation(folder, 8, "--mesh", "data=3,model=2"), count=2)
    assert started.wait(120) in ([2, 2], [2, 3], [3, 2])
    said = started.said(0) + started.said(1)
    assert "mesh data=3,model=2 takes 6 devices and there are 2" in said and "Traceback" not in said
    assert not folder.exists()


@pytest.mark.parametrize("make", [evaluation, sweep])
def test_processes_that_share_no_folder_are_told(make, tmp_path, monkeypatch):
    """One process runs where a relative path names another folder."""
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setattr("tests.support.processes.COMMAND", (sys.executable, "-c", ELSEWHERE))
    started = Started(make("run"), count=2)
    codes = started.wait(120)
    assert codes[1] == 2 and codes[0] == 3, (codes, started.said(0), started.said(1))
    assert "give all processes a folder on a disk that they share" in " ".join(started.said(1).split())


ELSEWHERE = """
import os
os.chdir("../one" if os.environ["JAX_PROCESS_ID"] == "1" else ".")
from jaxmllm.cli import main
main()
"""


@pytest.mark.slow
def test_a_sweep_with_other_settings_is_refused_and_shown(swept, tmp_path):
    folder = tmp_path / "run"
    started = Started(sweep(folder))
    assert started.wait_until(lambda: progress(folder) > 0)
    started.kill()
    other = Started([*sweep(folder), "--dtype", "bfloat16"])
    assert other.wait() == [2]
    assert "dtype is 'float32' there and 'bfloat16' now" in other.said().replace("\n", " ")
    again = Started(sweep(swept))
    assert again.wait() == [2] and "finished" in again.said()


def test_environment_that_is_half_set_is_told(monkeypatch):
    from jaxmllm.errors import InputError
    from jaxmllm.parallel import processes

    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not"):
        processes.start()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 2 of 2 processes; expected 0 to 1"):
        processes.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    processes.start()  # alone, whatever else is set
    assert (processes.index(), processes.count()) == (0, 1)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'first'"):
        processes.start()
