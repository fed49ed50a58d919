"""The commands convert, verify and export, as they are typed."""

import re
import shutil
import sys
from pathlib import Path

import pytest

import jaxmllm
from jaxmllm import cli
from jaxmllm.commands import conversion
from jaxmllm.convert import store
from jaxmllm.convert.streaming import partial_folder
from tests.convert.test_store import assert_same_params


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments) -> tuple[int, str]:
        """The exit code, and what was printed, on one line."""
        monkeypatch.setattr(sys, "argv", ["jaxmllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        printed = capsys.readouterr()
        return stop.value.code or 0, re.sub(r"\s+", " ", printed.out + printed.err)

    return command


def test_a_checkpoint_goes_into_a_store_and_back(run, plain_pair, tmp_path):
    code, printed = run("convert", plain_pair.folder, tmp_path / "store")
    assert code == 0
    assert re.search(r"0\.47 MB in \d+ pieces of up to 0\.\d+ MB; about 0\.60 GB of memory", printed), printed
    assert re.search(rf"wrote {tmp_path / 'store'} \(0\.47 MB in \d+ s, \d+ MB/s\)", printed), printed

    code, printed = run("verify", tmp_path / "store")
    assert code == 0
    assert f"{tmp_path / 'store'}: every piece is as it was written" in printed

    code, printed = run("export", tmp_path / "store", tmp_path / "folder", "--dtype", "float32")
    assert code == 0
    assert "none of them changes a logit" in printed
    assert "vision_tower.vision_model.post_layernorm..*: comes after the layer that is read" in printed
    assert_same_params(jaxmllm.load(tmp_path / "folder").params, plain_pair.jax.params)

    code, printed = run("export", plain_pair.folder, tmp_path / "copy")
    assert code == 0
    assert "changes a logit" not in printed


def test_an_interrupted_conversion_says_how_to_go_on(run, plain_pair, tmp_path, monkeypatch):
    convert = conversion.convert_checkpoint

    def interrupted(source, destination, param_dtype, on_progress):
        def stop(done, total):
            raise KeyboardInterrupt

        convert(source, destination, param_dtype, stop)

    monkeypatch.setattr(conversion, "convert_checkpoint", interrupted)
    code, printed = run("convert", plain_pair.folder, tmp_path / "store")
    partial = partial_folder(tmp_path / "store")
    assert code == 130
    assert f"stopped; the work so far is kept in {partial}; the same command goes on" in printed
    monkeypatch.setattr(conversion, "convert_checkpoint", convert)
    code, printed = run("convert", plain_pair.folder, tmp_path / "store")
    assert code == 0
    assert f"going on with {partial}" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_spoilt_store_is_an_error_of_one_line(run, plain_pair, tmp_path):
    assert run("convert", plain_pair.folder, tmp_path / "store")[0] == 0
    next((tmp_path / "store" / store.PARAMS).glob("decoder.head.kernel/0*")).write_bytes(b"")
    code, printed = run("verify", Path(shutil.copytree(tmp_path / "store", tmp_path / "copy")))
    assert code == 2
    assert "1 of" in printed
    assert "pieces are not as they were written: decoder.head.kernel/0" in printed
