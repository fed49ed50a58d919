"""``jaxmllm validate``: its exit codes and the files it leaves."""

import json

import pytest

from jaxmllm.validation.recording import HEADER
from tests.support import commands, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command") / "model"
    tiny.make_torch(tiny.config_fields("grouped_queries")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("command") / "reference"
    with pytest.MonkeyPatch.context() as patch:
        phases = "tensors,embedding,logits"
        assert commands.run(patch, "validate", folder, "--save", destination, "--phases", phases) == 0
    return destination


def test_a_sound_port(folder, reference, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = ("--reference", reference, "--phases", "tensors,embedding", "--logdir", run)
    assert commands.run(monkeypatch, "validate", folder, *arguments) == 0
    said = capsys.readouterr().out
    assert "PASSES" in said and "exit code 0" in said
    report = json.loads((run / "report.json").read_text())
    assert (report["verdict"], report["exit_code"], report["first"]) == ("passes", 0, None)
    assert report["command"].startswith(f"jaxmllm validate {folder}")
    assert report["versions"]["torch (reference)"]
    for name in ("report.html", "report.md"):
        assert "passes" in (run / name).read_text().lower()
    assert list(run.rglob("events.out.tfevents.*"))


def test_a_port_that_differs(folder, reference, tmp_path, monkeypatch, capsys):
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["rope_parameters"]["rope_theta"] = 5e5
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps(fields))
    arguments = ("--reference", reference, "--phases", "embedding", "--logdir", tmp_path / "run")
    assert commands.run(monkeypatch, "validate", other, *arguments) == 1
    said = capsys.readouterr().out
    assert "DIFFERS" in said and "rotary" in said and "exit code 1" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["first"] == "rotary"
    assert "base" in report["phases"][0]["causes"][0]["name"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reference", "nowhere"), "nowhere/recording.json: no such file"),
        (("--phases", "decoders"), "phases are decoders; expected some of"),
        (("--save", "a", "--reference", "b"), "--save only records"),
        (("--reference", "a", "--against", "b"), "give one of them"),
        (("--image", "a.png"), "1 image(s) for 0 question(s)"),
    ],
)
def test_what_cannot_be_run(folder, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert commands.run(monkeypatch, "validate", folder, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_verdict(folder, reference, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    arguments = ("--reference", reference, "--phases", "tensors")
    for logdir, message in ((file, "is not a folder"), (file / "below", "cannot be made")):
        assert commands.run(monkeypatch, "validate", folder, *arguments, "--logdir", logdir) == 2
        assert message in capsys.readouterr().err


def test_a_bug_of_our_own_is_no_verdict(folder, reference, tmp_path, monkeypatch, capsys):
    from jaxmllm.validation import run

    def fail(*_, **__):
        raise KeyError("bug")

    monkeypatch.setattr(run, "compare", fail)
    assert commands.run(monkeypatch, "validate", folder, "--reference", reference, "--logdir", tmp_path / "run") == 2
    assert "KeyError" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_recording_says_what_made_it(reference):
    header = json.loads((reference / HEADER).read_text())
    assert header["format"] == 1
    assert header["versions"]["torch"] and header["versions"]["transformers"]
    assert (header["model_type"], header["dtype"], header["streamed"]) == ("llava", "float32", False)
