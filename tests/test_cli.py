"""The command line, run in-process on a few held-out questions of the embedded model."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxmllm
from jaxmllm import cli
from tests.support.commands import run
from tests.support.demo import DEMO

QUESTIONS, IMAGES = DEMO / "questions" / "questions.jsonl", DEMO / "questions" / "images"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A log folder written by ``jaxmllm sweep`` on 24 questions, and what the command printed."""
    logdir = tmp_path_factory.mktemp("runs") / "sweep"
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = ["--limit", 24, "--examples", 2, "--batch-size", 16, "--edits", "erase", "--edits", "blind:from"]
        code = run(monkeypatch, "sweep", DEMO / "model", "--questions", QUESTIONS, "--images", IMAGES,
                   "--logdir", logdir, *options)  # fmt: skip
    assert code == 0
    return logdir


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def table(log):
    return pq.read_table(log / "results.parquet").to_pylist()


def values(rows, **wanted):
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row["value"] for row in sorted(found, key=lambda row: row["layer"])]


def test_tensorboard_and_parquet_hold_the_same_numbers(log):
    rows = table(log)
    for curve, folder in (("erase", "erase"), ("blind:from", "blind_from"), ("early", "early")):
        shown = events(log / folder)
        for metric, tag in (
            ("accuracy", "accuracy/image_hidden_at_layer"),
            ("log_probability", "answer_log_probability/image_hidden_at_layer"),
        ):
            scalars = shown.Scalars(tag)
            assert [scalar.step for scalar in scalars] == list(range(8))
            expected = values(rows, metric=metric, curve=curve, category="all")
            np.testing.assert_allclose([scalar.value for scalar in scalars], expected, rtol=1e-5)
    hellinger = [s.value for s in events(log / "summary").Scalars("attention/hellinger_to_last_layer")]
    np.testing.assert_allclose(hellinger, values(rows, metric="hellinger", category="all"), rtol=1e-5, atol=1e-7)
    assert hellinger[-1] == 0.0


def test_related_curves_share_a_chart(log):
    """One tag in several runs is one chart in TensorBoard."""
    for folder in ("erase", "blind_from", "early", "clean"):
        assert "accuracy/image_hidden_at_layer" in events(log / folder).Tags()["scalars"]
    kinds = sorted(path.name for path in log.glob("kind_*"))
    assert len(kinds) > 3
    for folder in kinds:
        assert "accuracy_by_kind/erase" in events(log / folder).Tags()["scalars"]


def test_heatmaps_step_through_the_layers(log):
    summary = events(log / "summary")
    tags = [tag for tag in summary.Tags()["images"] if tag.startswith("attention_map/")]
    assert len(tags) == 2
    for tag in tags:
        images = summary.Images(tag)
        assert [image.step for image in images] == list(range(8))
        assert len({image.encoded_image_string for image in images}) == 8
    assert "summary" in summary.Tags()["images"]
    assert any("accuracy_by_layer" in tag for tag in summary.Tags()["tensors"])


def test_aggregates_follow_from_the_table_of_questions(log):
    rows = pq.read_table(log / "questions.parquet").to_pylist()
    assert {row["curve"] for row in rows} == {"clean", "early", "erase", "blind:from"}
    for layer in (0, 5):
        correct = [row["correct"] for row in rows if row["curve"] == "erase" and row["layer"] == layer]
        assert len(correct) == 24
        expected = values(table(log), metric="accuracy", curve="erase", category="all")[layer]
        assert np.mean(correct) == pytest.approx(expected)


def test_nothing_temporary_is_left_beside_the_log(log):
    assert [path.name for path in log.parent.iterdir()] == ["sweep"]


@pytest.mark.slow
def test_batch_size_changes_no_number(log, tmp_path, monkeypatch):
    options = ["--limit", 24, "--examples", 0, "--batch-size", 7, "--edits", "erase", "--edits", "blind:from"]
    code = run(monkeypatch, "sweep", DEMO / "model", "--questions", QUESTIONS, "--images", IMAGES,
               "--logdir", tmp_path / "again", *options)  # fmt: skip
    assert code == 0
    one, other = (
        [row["log_probability"] for row in pq.read_table(folder / "questions.parquet").to_pylist()]
        for folder in (log, tmp_path / "again")
    )
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_converted_models_sweep_alike(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "convert", DEMO / "model", tmp_path / "store") == 0
    assert "wrote" in capsys.readouterr().out
    ours, again = jaxmllm.load(DEMO / "model"), jaxmllm.load(tmp_path / "store")
    inputs = again.prepare([next(IMAGES.glob("*.png"))], ["what colour is the ring ?"])
    np.testing.assert_array_equal(ours.forward(ours.params, inputs).logits, again.forward(again.params, inputs).logits)


def fault(tmp_path, **changes):
    """Arguments of a sweep with one thing wrong."""
    arguments = {
        "model": DEMO / "model", "questions": QUESTIONS, "images": IMAGES, "logdir": tmp_path / "log",
    } | changes  # fmt: skip
    model = arguments.pop("model")
    options = [text for name, value in arguments.items() for text in (f"--{name}", value)]
    return ["sweep", model, *options]


def written(path, text):
    path.write_text(text)
    return path


def without_weights(folder):
    shutil.copytree(DEMO / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def cut(folder):
    shutil.copytree(DEMO / "model", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return folder


def of_another_family(folder):
    shutil.copytree(DEMO / "model", folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "blip"}))
    return folder


LINE = json.dumps({"question_id": 1, "image": "x.png", "text": "what ?", "answer": "red"})

FAULTS = {
    "no model": lambda p: (fault(p, model=p / "nowhere"), "not a folder"),
    "no weights": lambda p: (fault(p, model=without_weights(p / "m")), "model.safetensors"),
    "cut weights": lambda p: (fault(p, model=cut(p / "m")), "truncated"),
    "unknown family": lambda p: (fault(p, model=of_another_family(p / "m")), "model_type is 'blip'"),
    "no questions file": lambda p: (fault(p, questions=p / "none.jsonl"), "no such question file"),
    "empty questions file": lambda p: (fault(p, questions=written(p / "q", "\n")), "holds no questions"),
    "malformed line": lambda p: (fault(p, questions=written(p / "q", LINE + "\n{")), "line 1: no image"),
    "no image folder": lambda p: (fault(p, images=p / "none"), "no such image folder"),
    "unknown edit": lambda p: (fault(p, edits="smudge"), "unknown edits 'smudge'"),
    "unknown scope": lambda p: (fault(p, edits="erase:4"), "unknown scope"),
    "unknown dtype": lambda p: (fault(p, dtype="float8"), "dtype is 'float8'"),
    "unwritable logdir": lambda p: (fault(p, logdir=written(p / "f", "") / "log"), "cannot be written"),
    "full logdir": lambda p: (fault(p, logdir=DEMO), "not empty"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_input_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    arguments, message = FAULTS[name](tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "something was written"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_a_broken_image_ends_the_sweep_with_nothing_written(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.png").write_bytes(content)
    arguments = fault(tmp_path, questions=written(tmp_path / "q", LINE), images=tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert "x.png: broken, or not an image" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "x.png"]


def test_demo_reads_the_embedded_files(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "demo", "--logdir", tmp_path / "demo", "--limit", 40) == 0
    printed = capsys.readouterr().out
    for words in ("fusion layers", "Pointing game", "chance: random object", "early", "Hellinger", "tensorboard"):
        assert words in printed
    assert (tmp_path / "demo" / "results.parquet").is_file()


def demo_of(folder, methods):
    """A demo folder with the embedded model and other methods."""
    folder.mkdir()
    (folder / "model").symlink_to(DEMO / "model")
    (folder / "methods.toml").write_text(methods)
    return folder


def test_demo_of_methods_prints_and_writes_the_same_numbers(tmp_path, monkeypatch, capsys):
    methods = '[main]\nbase = "base"\n"the middle" = "centre-crop"\n[candidates]\nall = "contrastive:candidates=all"\n'
    monkeypatch.setattr(cli, "DEMO", demo_of(tmp_path / "demo", methods))
    log = tmp_path / "log"
    assert run(monkeypatch, "demo", "--methods", "--limit", 34, "--seed", 3, "--logdir", log) == 0
    printed = capsys.readouterr().out
    for words in ("34 questions about 5 scenes", "95% interval", "above_below", "Pointing game", "Nothing was tuned"):
        assert words in printed
    rows = pq.read_table(log / "results.parquet").to_pylist()
    accuracy = {row["method"]: row["value"] for row in rows if (row["metric"], row["category"]) == ("accuracy", "all")}
    assert list(accuracy) == ["base", "the middle", "all"]
    lines = [line.split() for line in printed.splitlines()]
    for label, value in accuracy.items():
        words = label.split()
        assert any(line[: len(words) + 1] == [*words, f"{100 * value:.1f}"] for line in lines), label
    asked = pq.read_table(log / "questions.parquet").to_pylist()
    assert len(asked) == 3 * 34 and {row["question_id"].split("-")[1] for row in asked} == {"3"}
    assert json.loads((log / "results.json").read_text())["results"] == rows
    assert len([tag for tag in events(log / "summary").Tags()["images"] if tag.startswith("looked_at/")]) == 9


@pytest.mark.slow
def test_demo_of_methods_as_shipped(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "demo", "--methods", "--limit", 8, "--logdir", tmp_path / "log") == 0
    printed = capsys.readouterr().out
    for words in ("contrastive paper", "vicrop pure-grad", "carve", "opera", "i* fusion", "chance: random patch"):
        assert words in printed


def test_the_seed_of_the_held_out_scenes_cannot_be_chosen(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "demo", "--seed", 3, "--logdir", tmp_path / "log") == 2
    assert "--seed draws the scenes of --methods" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_fast_way_the_plain_way_and_a_second_run_from_the_cache_write_the_same_numbers(
    monkeypatch, tmp_path, capsys
):
    options = ["--questions", QUESTIONS, "--images", IMAGES, "--limit", 10, "--examples", 0]
    options += ["--edits", "erase", "--edits", "knockout:3"]
    ways = {"fast": ["--cache", tmp_path / "cache"], "again": ["--cache", tmp_path / "cache"], "plain": ["--plain"]}
    tables = {}
    for way, extra in ways.items():
        assert run(monkeypatch, "sweep", DEMO / "model", "--logdir", tmp_path / way, *options, *extra) == 0
        printed = capsys.readouterr().out
        assert ("shared keys:" in printed) == (way != "plain")
        assert "programs compiled in" in printed
        tables[way] = pq.read_table(tmp_path / way / "questions.parquet").to_pylist()
    # one entry a layer, but for the last, of which no more than keys is computed
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 7
    for way in ("again", "plain"):
        for ours, theirs in zip(tables["fast"], tables[way], strict=True):
            assert (ours["question_id"], ours["curve"], ours["layer"]) == (
                theirs["question_id"], theirs["curve"], theirs["layer"]
            )  # fmt: skip
            assert ours["log_probability"] == pytest.approx(theirs["log_probability"], abs=1e-4)
            assert ours["change"] == pytest.approx(theirs["change"], abs=1e-4)


def test_a_budget_too_small_for_one_question_is_refused(monkeypatch, tmp_path, capsys):
    code = run(monkeypatch, "sweep", DEMO / "model", "--questions", QUESTIONS, "--images", IMAGES,
               "--logdir", tmp_path / "log", "--budget", 0.001)  # fmt: skip
    assert code == 2
    assert "the budget is 1.00 MB; raise the budget" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_intervals_hold_their_means(log):
    rows = [row for row in table(log) if row["low"] is not None]
    assert {row["metric"] for row in rows} == {"accuracy", "log_probability", "change"}
    assert all(row["low"] <= row["value"] + 1e-5 and row["value"] <= row["high"] + 1e-5 for row in rows)
    assert any(row["low"] < row["high"] for row in rows)
