"""An evaluation in TensorBoard, read back; cards; the two commands."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxmllm.report.cards import CARD_WIDTH, _font, draw_card, references_text, verdict, wrap
from jaxmllm.report.evaluation import pick_rows, write_report
from tests.evaluation.cases import BATCH, MODEL, ask, make_row, write_scenes
from tests.support.commands import run

COUNT = 20
EDITS = "blind:0-2"  # edits of one kind share programs; every evaluation here has one


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """An evaluation whose image is hidden in the first layers, so that some answers are wrong; and its events."""
    evaluation = ask(tmp_path_factory.mktemp("runs") / "run", limit=COUNT, edits=EDITS)
    folder = write_report(evaluation, examples=8)
    return evaluation, folder, events(folder)


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_scalars_are_those_of_the_summary(shown):
    evaluation, _, found = shown
    (accuracy,) = found.Scalars("metrics/accuracy")
    assert accuracy.value == pytest.approx(evaluation.summary.score.value) and accuracy.step == COUNT
    running = found.Scalars("running_score/accuracy")
    scores = [row["score"] for row in evaluation.rows]
    expected = np.cumsum(scores) / np.arange(1, COUNT + 1)
    assert [point.step for point in running] == list(range(1, COUNT + 1))
    np.testing.assert_allclose([point.value for point in running], expected, rtol=1e-6)
    assert 0 < evaluation.summary.score.value < 1
    for category, score in evaluation.summary.categories["category"].items():
        last = found.Scalars(f"running_score_by_category/{category}")[-1]
        assert last.value == pytest.approx(score.value)


def test_examples_are_shown_with_right_and_wrong_answers(shown):
    evaluation, _, found = shown
    tags = [tag for tag in found.Tags()["images"] if tag.split("/")[0] in ("right", "wrong")]
    assert len(tags) == 8 and {tag.split("/")[0] for tag in tags} == {"right", "wrong"}
    by_id = {row["question_id"]: row for row in evaluation.rows}
    for tag in tags:
        kind, name = tag.split("/")
        row = by_id[name.rsplit("_", 1)[1]]
        assert verdict(row["score"]) == kind and row["categories"]["category"] in name
        (image,) = found.Images(tag)
        picture = Image.open(io.BytesIO(image.encoded_image_string))
        expected = draw_card(Image.open(row["image"]), row)
        np.testing.assert_array_equal(np.asarray(picture), expected)
    assert "score_by_category/category" in found.Tags()["images"]


def test_tables_and_settings_are_there(shown):
    evaluation, folder, found = shown
    texts = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }
    assert f"{100 * evaluation.summary.score.value:.1f}" in texts["1_summary/text_summary"]
    for category in evaluation.summary.categories["category"]:
        assert f"| {category} |" in texts["2_by_category/text_summary"]
    assert texts["3_examples/text_summary"].count("\n") == 8 + 1
    hparams = events(folder / "hparams")
    assert hparams.Scalars("hparam/score")[0].value == pytest.approx(evaluation.summary.score.value)
    assert "_hparams_/session_start_info" in hparams.PluginTagToContent("hparams")


def test_writing_again_replaces_everything(shown):
    evaluation, folder, _ = shown
    assert write_report(evaluation, examples=3) == folder
    found = events(folder)
    assert len(found.Scalars("metrics/accuracy")) == 1
    assert len([tag for tag in found.Tags()["images"] if tag.split("/")[0] in ("right", "wrong")]) == 3
    assert [path.name for path in evaluation.folder.glob("*tensorboard*")] == ["tensorboard"]


def test_a_picture_that_is_gone_is_left_out(tmp_path):
    data = write_scenes(tmp_path / "data", 4)
    evaluation = ask(tmp_path / "run", data=data, edits=EDITS)
    (data / "images" / "1.png").write_bytes(b"gone")
    found = events(write_report(evaluation))
    assert len([tag for tag in found.Tags()["images"] if tag.split("/")[0] in ("right", "wrong")]) == 3


def test_examples_are_spread_over_categories_and_verdicts():
    rows = [make_row(place, 1.0, categories={"kind": "frequent"}) for place in range(50)]
    rows[7] = make_row(7, 0.0, categories={"kind": "frequent"})
    rows[31] = make_row(31, 0.5, categories={"kind": "rare"})
    picked = pick_rows(rows, 4)
    assert {7, 31} < set(picked) and len(picked) == 4 and picked == sorted(picked)
    assert pick_rows(rows, 0) == [] and len(pick_rows(rows, 99)) == 50


def test_cards_are_wide_coloured_and_grow_with_their_text():
    image = Image.new("RGB", (30, 20), "blue")
    short = draw_card(image, make_row(0))
    long = draw_card(image, make_row(0, prediction="very " * 60))
    wrong = draw_card(image, make_row(0, 0.0))
    assert short.shape[1] == CARD_WIDTH >= 400
    assert long.shape[0] > short.shape[0]
    assert short.shape == wrong.shape and (short != wrong).any()
    odd = make_row(0, None, answers=None, prediction="", question="ünï 漢字 | \n<b>", stopped=False)
    draw_card(Image.new("L", (1, 900)), odd)
    chosen = draw_card(image, make_row(0, parsed="B"), {"A": "blue", "B": "red"})
    assert chosen.shape[0] > draw_card(image, make_row(0, parsed="B")).shape[0]


def test_wrapped_lines_fit_and_lose_no_letter():
    font = _font(False)
    for text in ("a few words that do not fit into one line", "x" * 90, "one\ntwo", ""):
        lines = wrap(text, font, 150, 99)
        assert all(font.getlength(line) <= 150 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert wrap("x " * 200, font, 100, 3)[-1] == "..." and len(wrap("x " * 200, font, 100, 3)) == 3


def test_references_are_counted():
    assert references_text(["red", "red", "blue"]) == "red (2x), blue"
    assert references_text([{"answer": "red", "answer_id": 1}, {"answer": "red", "answer_id": 2}]) == "red (2x)"
    assert references_text(None) == "none"


def evaluate(monkeypatch, logdir, *options):
    return run(monkeypatch, "evaluate", MODEL, "--benchmark", "scenes", "--logdir", logdir, "--batch-size", BATCH,
               "--examples", 2, *options)  # fmt: skip


def test_commands_evaluate_and_compare(tmp_path, monkeypatch, capsys):
    data = write_scenes(tmp_path / "data", 9, broken=(3,))
    shared = ["--data", data, "--skip-bad", "--edits"]
    assert evaluate(monkeypatch, tmp_path / "a", *shared, "blind:7") == 0
    printed = capsys.readouterr().out
    for words in ("accuracy %", "By category", "1 questions were skipped", "line 4: ", "answers.jsonl",
                  "8 questions answered in", f"tensorboard --logdir {tmp_path / 'a'}"):  # fmt: skip
        assert words in printed
    assert evaluate(monkeypatch, tmp_path / "a", *shared, "blind:7-7") == 0
    assert "Every question had been answered before." in capsys.readouterr().out
    assert evaluate(monkeypatch, tmp_path / "b", *shared, EDITS) == 0
    capsys.readouterr()
    assert run(monkeypatch, "compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c.json") == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "c.json").read_text())
    assert "edits: 'blind:7' first, 'blind:0-2' second" in printed
    assert f"{written['difference']['lost']} questions lost:" in printed and written["difference"]["lost"] > 0
    assert f"{100 * written['difference']['value']:+.1f}" in printed
    assert len(written["lost"]) == written["difference"]["lost"]


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from jaxmllm.evaluation import answering

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "answer_by", interrupt)
    assert evaluate(monkeypatch, tmp_path / "run", "--limit", 4) == 130
    assert "the same command goes on from there" in capsys.readouterr().out


FAULTS = {
    "no benchmark": (["--benchmark", "vqa9"], "no benchmark is called 'vqa9'"),
    "no data": (["--benchmark", "pope"], "data"),
    "edits": (["--edits", "erase:12"], "no layer 12: the model has decoder layers 0..7"),
    "edits in words": (["--edits", "smudge:1"], "no edit 'smudge'"),
    "dtype": (["--dtype", "float8"], "dtype is 'float8'"),
    "temperature": (["--temperature", "0"], "temperature is 0.0; expected a number above 0"),
    "top_p": (["--top-p", "1.5"], "top_p is 1.5"),
    "prompt": (["--prompt", "{question} {colour}"], "has the field {colour}"),
    "budget": (["--limit", "1", "--budget", "0.001"], "raise the budget"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_options_are_one_line_and_leave_nothing(name, tmp_path, monkeypatch, capsys):
    options, message = FAULTS[name]
    arguments = ["--benchmark", "scenes", "--logdir", tmp_path / "log", *options]
    assert run(monkeypatch, "evaluate", MODEL, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir()), "something was written"


def test_a_broken_model_leaves_nothing(tmp_path, monkeypatch, capsys):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    code = run(monkeypatch, "evaluate", tmp_path / "model", "--benchmark", "scenes", "--logdir", tmp_path / "log")
    assert code == 2 and "model.safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_where_the_folder_should_be(tmp_path, monkeypatch, capsys):
    (tmp_path / "log").write_text("mine")
    assert evaluate(monkeypatch, tmp_path / "log", "--limit", 4) == 2
    assert "log holds something else than a run" in capsys.readouterr().err and (tmp_path / "log").read_text() == "mine"


def test_the_default_folder_is_named_after_what_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--benchmark", "scenes", "--limit", 4, "--batch-size", BATCH, "--examples", 0, "--edits", EDITS]
    assert run(monkeypatch, "evaluate", MODEL, *options) == 0
    assert (tmp_path / "runs" / "evaluate-model-scenes-blind_0-2" / "summary.json").is_file()
