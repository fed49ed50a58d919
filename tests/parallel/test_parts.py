"""Parts of a run, what its folder says of itself, and folders in buckets."""

import json
import shutil

import fsspec
import numpy as np
import pytest

from jaxmllm.errors import InputError
from jaxmllm.parallel import record
from jaxmllm.parallel.parts import Parts
from jaxmllm.parallel.remote import Mirror, mirrored
from tests.parallel.test_runs import answers, evaluation, sweep, tables
from tests.support.processes import run


def test_parts_come_back_as_they_were(tmp_path):
    told = []
    parts = Parts(tmp_path, lambda: told.append(1))
    arrays = {"a": np.arange(6.0).reshape(2, 3), "text": np.array('{"b": "ä"}'), "none": np.zeros((2, 0), bool)}
    assert parts.done() == set()
    parts.write(12, arrays)
    assert parts.done() == {12} and told == [1]
    found = parts.read(12)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["unit-000012.npz"]


@pytest.mark.parametrize("damage", [lambda whole: whole[:100], lambda whole: b"", lambda whole: bytes(len(whole))])
def test_a_damaged_part_is_told(damage, tmp_path):
    parts = Parts(tmp_path)
    parts.write(3, {"a": np.arange(1000)})
    parts.path(3).write_bytes(damage(parts.path(3).read_bytes()))
    with pytest.raises(InputError, match=r"unit-000003\.npz: damaged or missing"):
        parts.read(3)


def test_nothing_half_written_counts_as_a_part(tmp_path, monkeypatch):
    parts = Parts(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".unit-000001.npz-x").write_bytes(b"half")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left"):
        parts.write(1, {"a": np.zeros(1)})
    assert parts.done() == set()


def test_differences_are_shown_and_what_does_not_matter_is_not(tmp_path):
    there = {"dtype": "float32", "edits": ["erase"], "model": "a"}
    record.check_same(tmp_path, there, {"dtype": "float32", "edits": ("erase",), "model": "b"}, ("model",))
    with pytest.raises(InputError, match=r"edits is \['erase'\] there and \['blind'\] now"):
        record.check_same(tmp_path, there, {"dtype": "float32", "edits": ["blind"], "model": "a"})
    with pytest.raises(InputError, match="plain is None there and True now"):
        record.check_same(tmp_path, there, {**there, "plain": True})


def test_a_run_says_by_what_it_was_made(tmp_path):
    record.note_versions(tmp_path, mesh="data=2")
    record.note_versions(tmp_path)
    first, second = json.loads((tmp_path / record.MADE_BY).read_text())["starts"]
    assert first["mesh"] == "data=2" and "mesh" not in second
    assert first["packages"]["jax"] and first["packages"]["jaxmllm"] and first["devices"].endswith("x cpu")


def test_the_revision_is_read_from_a_checkout(tmp_path):
    assert record.git_revision(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert record.git_revision(tmp_path) is None
    (git / "packed-refs").write_text("# pack-refs\n0123 refs/heads/other\n4567 refs/heads/main\n")
    assert record.git_revision(tmp_path) == "4567"
    (git / "refs/heads/main").write_text("89ab\n")
    assert record.git_revision(tmp_path) == "89ab"
    (git / "HEAD").write_text("cdef\n")
    assert record.git_revision(tmp_path) == "cdef"


def bucket(name):
    return fsspec.filesystem("memory"), f"memory://{name}"


def test_a_mirror_sends_and_fetches_what_changed(tmp_path):
    store, url = bucket("mirror")
    with mirrored(url) as one:
        one.folder.mkdir()
        (one.folder / "parts").mkdir()
        (one.folder / "parts" / "a").write_text("1")
        (one.folder / ".hidden").write_text("x")
        one.push()
        with mirrored(url + "/") as other:
            assert (other.folder / "parts" / "a").read_text() == "1" and not (other.folder / ".hidden").exists()
            (other.folder / "b").write_text("22")
            other.push()
            one.pull()
            assert (one.folder / "b").read_text() == "22"
            (one.folder / "b").unlink()
            (one.folder / "parts" / "a").write_text("333")
            one.push()
            other.pull()
            assert (other.folder / "parts" / "a").read_text() == "333"
        assert store.find("/mirror") == ["/mirror/parts/a"]


def test_a_local_folder_is_its_own_mirror(tmp_path):
    with mirrored(tmp_path / "run") as mirror:
        assert mirror == Mirror(tmp_path / "run")
        mirror.push()
        mirror.pull()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("url", ["nosuch://bucket/run"])
def test_a_store_that_nobody_knows_is_told(url):
    with pytest.raises(InputError, match="nosuch"), mirrored(url):
        pass


def test_a_store_that_fails_is_told(monkeypatch):
    store, url = bucket("failing")
    with mirrored(url) as mirror:
        mirror.folder.mkdir()
        (mirror.folder / "a").write_text("1")

        def refuse(*args, **options):
            raise PermissionError("403 Forbidden")

        monkeypatch.setattr(type(store), "put_file", refuse)
        with pytest.raises(InputError, match=r"memory://failing: cannot be written \(403 Forbidden\)"):
            mirror.push()


@pytest.mark.slow
def test_runs_in_a_bucket_are_as_anywhere(tmp_path):
    """``file://`` stands for a bucket: it goes through fsspec like any other."""
    local, far = tmp_path / "local", tmp_path / "far"
    run(evaluation(local, 12))
    shutil.copytree(local, far)
    kept = (far / "results.jsonl").read_text().splitlines(keepends=True)[:8]
    (far / "results.jsonl").write_text("".join(kept))
    run(evaluation(f"file://{far}", 12), count=2)
    assert answers(far) == answers(local)
    assert not list(far.glob("results-*.jsonl"))


@pytest.mark.slow
def test_a_sweep_in_a_bucket(tmp_path):
    local, far = tmp_path / "local", tmp_path / "far"
    run(sweep(local, 8))
    run(sweep(f"file://{far}", 8), count=2)
    assert tables(far) == tables(local)
    assert not list(far.glob("parts/*")) and (far / "summary").is_dir()  # a bucket has no empty folders
