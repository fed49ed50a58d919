"""Recordings on the disk: what is put in comes out; what is broken is told of; nothing is left half-written."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxmllm.errors import InputError
from jaxmllm.validation.recording import HEADER, Recorder, Recording

INPUTS = {"input_ids": np.arange(10).reshape(2, 5), "attention_mask": np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}
STATE = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
ROWS = (1, 4)


def make(folder, rows=ROWS):
    recorder = Recorder(folder, INPUTS, "float32", rows)
    recorder.add("embedding", STATE)
    recorder.add("decoder.0.resid_pre", STATE, whole=True)
    recorder.flush()
    recorder.add("decoder.0.resid_post", 2 * STATE)
    return recorder


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "recording").finish({"seed": 3})
    return tmp_path / "recording"


def test_what_was_recorded_is_read(folder):
    recording = Recording(folder)
    assert list(recording.names()) == ["embedding", "decoder.0.resid_pre", "decoder.0.resid_post"]
    np.testing.assert_array_equal(recording.read("embedding"), STATE[:, list(ROWS)])
    np.testing.assert_array_equal(recording.read("decoder.0.resid_pre"), STATE)
    np.testing.assert_array_equal(recording.read("decoder.0.resid_post"), 2 * STATE[:, list(ROWS)])
    assert recording.rows("embedding") == ROWS and recording.rows("decoder.0.resid_pre") is None
    assert recording.dtype == "float32" and recording.header["seed"] == 3
    assert "embedding" in recording and "logits" not in recording
    found = recording.inputs()
    assert found.keys() == INPUTS.keys()
    for name, value in INPUTS.items():
        np.testing.assert_array_equal(found[name], value)
    assert [each.name for each in folder.parent.iterdir()] == ["recording"]


def test_arrays_are_copied_because_models_go_on_to_use_them(tmp_path):
    array = STATE.copy()
    recorder = Recorder(tmp_path / "recording", INPUTS, "float32", None)
    recorder.add("embedding", array)
    array[:] = 0
    np.testing.assert_array_equal(recorder.finish({}).read("embedding"), STATE)


@pytest.mark.parametrize("flushed", [True, False])
def test_floors_are_measured_without_padding_and_by_kind_and_way(tmp_path, flushed):
    recorder = make(tmp_path / "recording")
    if flushed:
        recorder.flush()
    other = 2 * STATE
    other[:, 0] = np.nan  # not among the rows
    other[0, 4, 2] += 0.5
    recorder.add_floor("decoder.0.resid_post", "own", "float64", other)
    recorder.add_floor("decoder.0.resid_post", "own", "other order", 2 * STATE)
    recording = recorder.finish({})
    floor = recording.floor("decoder.0.resid_post", "own")
    assert list(floor.of) == ["float64", "other order"]
    assert floor.of["float64"].max == pytest.approx(0.5, rel=1e-6) and floor.of["float64"].worst == (0, 1, 2)
    assert floor.of["other order"].max == 0
    assert recording.floor("decoder.0.resid_post", "run").of == {}


def test_an_array_is_recorded_once_and_only_into_a_new_folder(tmp_path, folder):
    recorder = make(tmp_path / "second")
    with pytest.raises(ValueError, match="embedding is recorded twice"):
        recorder.add("embedding", STATE)
    with pytest.raises(InputError, match="exists already"):
        make(folder)
    recorder.discard()
    assert [each.name for each in tmp_path.iterdir()] == ["recording"]


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        make(tmp_path / "file" / "recording")


def test_a_place_that_is_taken_meanwhile_leaves_nothing_behind(tmp_path):
    recorder = make(tmp_path / "recording")
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording" / "other").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        recorder.finish({})
    assert [each.name for each in tmp_path.rglob("*")] == ["recording", "other"]


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from jaxmllm.errors import InputError
from jaxmllm.validation.recording import Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(Path(sys.argv[1]), {"attention_mask": np.ones((1, 4), int)}, "float32", None)
if sys.argv[2] == "arrays":
    recorder.add("embedding", np.ones((1, 4, 10_000), np.float32))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    recorder.finish({"long": "x" * 40_000})
except InputError as error:
    assert "cannot be written" in str(error), error
    print("told")
"""


@pytest.mark.parametrize("what", ["arrays", "header"])
def test_a_full_disk_is_told_of_and_leaves_nothing_behind(tmp_path, what):
    command = [sys.executable, "-c", FULL, str(tmp_path / "recording"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "told\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_and_a_missing_array_are_told_of(tmp_path, folder):
    with pytest.raises(InputError, match="no such file; expected a folder written by"):
        Recording(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no logits"):
        Recording(folder).read("logits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "format is None"),
        ('{"format": 99}', "format is 99; this version reads format 1"),
        ('{"format": 1, "dtype": "float32"}', "lacks arrays"),
    ],
)
def test_a_broken_header_is_told_of(folder, text, message):
    (folder / HEADER).write_text(text)
    with pytest.raises(InputError, match=message):
        Recording(folder)


def test_a_missing_and_a_cut_file_are_told_of(folder):
    file = folder / json.loads((folder / HEADER).read_text())["arrays"]["embedding"]["file"]
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(InputError, match=f"{file.name}: embedding cannot be read"):
        Recording(folder).read("embedding")
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name} missing"):
        Recording(folder)
