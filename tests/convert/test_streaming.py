"""Conversions that stop at any moment and go on: killed, out of disk, interrupted, spoilt on the disk, run twice."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmllm.convert import journal, pieces, store, streaming
from jaxmllm.convert.streaming import partial_folder, verify_store
from jaxmllm.errors import CheckpointError, InputError
from jaxmllm.model import convert_checkpoint
from tests.support.stores import everything_in, same_stores

SMALL = 256  # bytes of leaves that are not cut, so that a tiny model has hundreds of pieces


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "WHOLE", SMALL)


@pytest.fixture(scope="module")
def source(plain_pair, tmp_path_factory):
    folder = Path(shutil.copytree(plain_pair.folder, tmp_path_factory.mktemp("source") / "checkpoint"))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A store that was written without a stop."""
    destination = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pieces, "WHOLE", SMALL)
        convert_checkpoint(source, destination)
    return destination


class StopError(Exception):
    """Not an error that the code under test knows."""


def stop_after(count, error=StopError):
    """A report of progress that stops the conversion after so many calls."""
    calls = []

    def on_progress(done, total):
        calls.append(done)
        if len(calls) == count:
            raise error

    return on_progress


def records_in(destination) -> list[journal.Record]:
    lines = (partial_folder(destination) / journal.JOURNAL).read_text().splitlines()[1:]
    return [journal.read_record(line) for line in lines]


def counted(monkeypatch) -> list[pieces.Piece]:
    """The pieces that are made from now on."""
    made, make = [], streaming._make
    monkeypatch.setattr(streaming, "_make", lambda piece, *rest: made.append(piece) or make(piece, *rest))
    return made


# --- killed -----------------------------------------------------------------------------------------------------------

CONVERT = """
import os, signal, sys
from jaxmllm.convert import journal, pieces, store, streaming
from jaxmllm.model import convert_checkpoint
pieces.WHOLE = int(sys.argv[3])

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_tree(folder, skeleton, write=store.write_tree):
    write(folder, skeleton)
    (folder / "_METADATA").write_text("{")
    die()

def half_a_line(descriptor, text, calls=[]):
    calls.append(text)
    data = text.encode()
    if len(calls) == 40:
        os.write(descriptor, data[: len(data) // 2])
        die()
    os.write(descriptor, data)

def written_but_not_on_record(descriptor, calls=[]):
    calls.append(descriptor)
    if len(calls) == 60:
        die()

match sys.argv[4]:
    case "tree":
        store.write_tree = half_a_tree
    case "line":
        journal._write = half_a_line
    case "piece":
        streaming.forget = written_but_not_on_record
    case "marker":
        streaming._sync = die
    case "renamed":
        streaming.shutil.rmtree = lambda path, *rest, real=streaming.shutil.rmtree, **options: (
            die() if str(path).endswith(".partial") else real(path, *rest, **options)
        )
convert_checkpoint(sys.argv[1], sys.argv[2])
"""


def start(source, destination, point="nowhere"):
    command = [sys.executable, "-c", CONVERT, source, destination, SMALL, point]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_conversion_killed_at_its_worst_moments_goes_on_to_the_same_store(source, whole, tmp_path):
    destination = tmp_path / "store"
    for point in ("tree", "line", "piece", "marker"):
        process = start(source, destination, point)
        _, errors = process.communicate(timeout=180)
        assert process.returncode == -signal.SIGKILL, (point, errors[-6000:])
        assert not destination.exists()
        assert partial_folder(destination).is_dir()
    convert_checkpoint(source, destination)
    assert_whole(destination, whole)


def test_a_kill_between_the_appearance_of_the_store_and_the_end_leaves_a_whole_store(source, whole, tmp_path):
    destination = tmp_path / "store"
    process = start(source, destination, "renamed")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == -signal.SIGKILL, errors[-6000:]
    same_stores(destination, whole)
    shutil.rmtree(destination)  # what is left beside it does not stand in the way of another
    convert_checkpoint(source, destination)
    assert_whole(destination, whole)


@pytest.mark.slow
def test_a_conversion_killed_at_random_moments_goes_on_to_the_same_store(source, whole, tmp_path):
    destination, rng = tmp_path / "store", np.random.default_rng()
    kills = 0
    for _ in range(8):
        process = start(source, destination)
        before = journal_size(destination)
        while process.poll() is None and journal_size(destination) == before:
            time.sleep(0.01)  # the interpreter starts, and Orbax writes its part
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if destination.exists():
            break
    assert kills >= 2
    if not destination.exists():
        convert_checkpoint(source, destination)
    same_stores(destination, whole)


def journal_size(destination) -> int:
    path = partial_folder(destination) / journal.JOURNAL
    return path.stat().st_size if path.exists() else 0


def assert_whole(destination, whole):
    same_stores(destination, whole)
    verify_store(destination)
    assert [path.name for path in destination.parent.iterdir()] == [destination.name]


# --- stopped otherwise ------------------------------------------------------------------------------------------------


def test_progress_counts_every_byte_once(source, whole, tmp_path):
    reports = []
    convert_checkpoint(source, tmp_path / "store", on_progress=lambda done, total: reports.append((done, total)))
    total = sum(journal.read_record(line).bytes for line in (whole / store.CHECKSUMS).read_text().splitlines())
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_an_interrupted_conversion_makes_only_what_is_not_on_record(source, whole, tmp_path, monkeypatch, error):
    destination = tmp_path / "store"
    with pytest.raises(error):
        convert_checkpoint(source, destination, on_progress=stop_after(30, error))
    assert not destination.exists()
    kept = {record.file for record in records_in(destination)}
    assert len(kept) >= 25
    made = counted(monkeypatch)
    convert_checkpoint(source, destination)
    assert not kept & {piece.file for piece in made}
    assert_whole(destination, whole)


def test_pieces_that_changed_or_went_after_they_were_put_on_record_are_made_again(source, whole, tmp_path, monkeypatch):
    destination = tmp_path / "store"
    with pytest.raises(StopError):
        convert_checkpoint(source, destination, on_progress=stop_after(30))
    params = partial_folder(destination) / streaming.STORE / store.PARAMS
    files = sorted(path for path in params.glob("*/*") if path.name[0].isdigit())
    spoil(files[3])
    files[5].unlink()
    files[7].write_bytes(files[7].read_bytes()[:-2])
    made = counted(monkeypatch)
    convert_checkpoint(source, destination)
    assert {str(files[number].relative_to(params)) for number in (3, 5, 7)} <= {piece.file for piece in made}
    assert_whole(destination, whole)


def test_what_reads_back_unlike_it_was_written_is_found_at_once(source, whole, tmp_path, monkeypatch):
    forget, written = streaming.forget, []

    def forget_and_spoil(descriptor):
        written.append(descriptor)
        if len(written) == 20:
            os.pwrite(descriptor, bytes([os.pread(descriptor, 1, 5)[0] ^ 1]), 5)
        forget(descriptor)

    monkeypatch.setattr(streaming, "forget", forget_and_spoil)
    with pytest.raises(CheckpointError, match="reads back unlike it was written; the disk or the memory"):
        convert_checkpoint(source, tmp_path / "store")
    monkeypatch.setattr(streaming, "forget", forget)
    convert_checkpoint(source, tmp_path / "store")
    assert_whole(tmp_path / "store", whole)


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_another_source_or_other_options_do_not_go_on_with_unfinished_work(source, tmp_path):
    source = Path(shutil.copytree(source, tmp_path / "source"))
    destination = tmp_path / "store"
    with pytest.raises(StopError):
        convert_checkpoint(source, destination, on_progress=stop_after(10))
    with pytest.raises(InputError) as error:
        convert_checkpoint(source, destination, param_dtype="bfloat16")
    partial = partial_folder(destination)
    assert str(error.value) == (
        f"{partial} holds an unfinished conversion of something else (param_dtype: ['float32'], now ['bfloat16']). "
        f"Give the same source and options to go on with it, or remove {partial} to begin anew"
    )
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(InputError, match=r"\(source model\.safetensors: \d+ bytes of .*, now .*1970-01-01"):
        convert_checkpoint(source, destination)
    before = everything_in(partial)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields, indent=7))
    with pytest.raises(InputError, match=r"source config\.json: .*; source model\.safetensors: "):
        convert_checkpoint(source, destination)
    assert everything_in(partial) == before


def test_a_source_that_changes_meanwhile_is_an_error(source, tmp_path):
    source = Path(shutil.copytree(source, tmp_path / "source"))

    def on_progress(done, total):
        if done == total:
            os.utime(source / "model.safetensors", (1, 1))

    with pytest.raises(CheckpointError, match=r"source changed while it was converted; remove .*partial and convert"):
        convert_checkpoint(source, tmp_path / "store", on_progress=on_progress)
    assert not (tmp_path / "store").exists()


def test_two_conversions_at_once_into_one_destination_are_refused(source, tmp_path):
    refused = []

    def on_progress(done, total):
        if not refused:
            with pytest.raises(InputError, match="another process is converting into it; wait for it") as error:
                convert_checkpoint(source, tmp_path / "store")
            refused.append(error)

    convert_checkpoint(source, tmp_path / "store", on_progress=on_progress)
    assert refused
    verify_store(tmp_path / "store")


def test_a_destination_that_appears_meanwhile_is_left_alone(source, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_write_tree", lambda *_: (tmp_path / "store").mkdir())
    monkeypatch.setattr(streaming, "_write_pieces", lambda *_: None)
    monkeypatch.setattr(streaming, "_write_rest", lambda *_: (tmp_path / "store" / "mine").write_text("mine"))
    with pytest.raises(InputError, match="store: cannot be written"):
        convert_checkpoint(source, tmp_path / "store")
    assert everything_in(tmp_path / "store") == {"mine": b"mine"}


@pytest.mark.parametrize("content", [b"[]\n", b"{\n", b'{}\n{"file": "a"}\n', b'{}\nnull\n{"file": "a"}\n', b"\xff\n"])
def test_a_damaged_journal_is_an_error_that_says_what_to_remove(source, tmp_path, content):
    partial = partial_folder(tmp_path / "store")
    partial.mkdir()
    (partial / journal.JOURNAL).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{journal.JOURNAL}: damaged \(.*\); remove {partial} to begin anew"):
        convert_checkpoint(source, tmp_path / "store")


# --- no room ----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"the store takes 0\.\d+ MB more, and the disk has 0\.00 MB; make room"):
        convert_checkpoint(source, tmp_path / "store")
    assert [path.name for path in partial_folder(tmp_path / "store").iterdir()] == [journal.JOURNAL]


def test_a_disk_that_fills_up_while_files_are_copied_keeps_the_work(source, whole, tmp_path, monkeypatch):
    copyfile = shutil.copyfile

    def fail(source, destination):
        if Path(source).name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(destination))
        copyfile(source, destination)

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(
        InputError, match=r"No space left on device.*the work so far is kept in .*\. Make room, and give"
    ):
        convert_checkpoint(source, tmp_path / "store")
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    made = counted(monkeypatch)
    convert_checkpoint(source, tmp_path / "store")
    assert made == []
    assert_whole(tmp_path / "store", whole)


# --- checking a store that is there -----------------------------------------------------------------------------------


def test_a_store_is_verified_against_its_checksums(whole, tmp_path):
    reports = []
    verify_store(whole, lambda done, total: reports.append((done, total)))
    assert reports[-1][0] == reports[-1][1] > 0
    folder = Path(shutil.copytree(whole, tmp_path / "store"))
    query = folder / store.PARAMS / "decoder.layers.attention.query.kernel"
    files = sorted(path for path in query.iterdir() if path.name != ".zarray")
    spoil(files[0])
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"3 of \d+ pieces are not as they were written: decoder\.layers\.attention"
    ):
        verify_store(folder)
    (query / ".zarray").unlink()
    with pytest.raises(CheckpointError, match=r"4 of \d+ pieces.*kernel/\.zarray"):
        verify_store(folder)
    (folder / store.CHECKSUMS).write_text("{}\n")
    with pytest.raises(CheckpointError, match=rf"{store.CHECKSUMS}: cannot be read \(not a record of a piece"):
        verify_store(folder)
    (folder / store.CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match=rf"{store.CHECKSUMS}: cannot be read"):
        verify_store(folder)


def test_a_folder_that_is_no_store_is_not_verified(source):
    with pytest.raises(CheckpointError, match="not a store; expected a folder that jaxmllm convert wrote"):
        verify_store(source)


def test_checksums_are_of_what_the_source_and_the_store_hold(whole, source):
    lines = (whole / store.CHECKSUMS).read_text().splitlines()
    records = {record.file: record for record in map(journal.read_record, lines)}
    norm = records["decoder.norm.scale/0"]  # one piece, neither cast nor transposed
    file = whole / store.PARAMS / norm.file
    assert norm.crc32 == norm.source_crc32 == zlib.crc32(file.read_bytes())
    theirs = load_file(source / "model.safetensors")["language_model.model.norm.weight"]
    assert file.read_bytes() == theirs.tobytes()
