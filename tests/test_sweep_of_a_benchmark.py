"""``jaxmllm sweep --benchmark``: generated answers at every layer, each as generation under its edit gives it."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxmllm
from jaxmllm.analysis import blind_image, erase_image
from jaxmllm.analysis.generated import of_one_structure
from jaxmllm.data.questions import read_questions
from tests.support import tiny
from tests.support.commands import run
from tests.support.demo import DEMO

LIMIT, NEW_TOKENS = 16, 6


def test_answers_by_layer(monkeypatch, tmp_path, capsys):
    logdir = tmp_path / "run"
    code = run(
        monkeypatch, "sweep", DEMO / "model", "--benchmark", "scenes", "--logdir", logdir, "--limit", LIMIT,
        "--edits", "erase", "--max-new-tokens", NEW_TOKENS, "--examples", 0,
    )  # fmt: skip
    assert code == 0
    assert "were found by trying known ones" in capsys.readouterr().out
    model = jaxmllm.load(DEMO / "model")
    questions = read_questions(DEMO / "questions" / "questions.jsonl", DEMO / "questions" / "images")[:LIMIT]
    found: dict[int, list[str]] = {}
    for row in pq.read_table(logdir / "answers.parquet").to_pylist():
        assert row["curve"] == ("clean" if row["layer"] == -1 else "erase")
        found.setdefault(row["layer"], []).append(row["prediction"])
    assert set(found) == {-1, *range(model.num_layers)}
    assert len({tuple(texts) for texts in found.values()}) >= 3, "hardly an edit changes an answer"

    # every one of them is what generation under the edit gives
    inputs = model.prepare([question.image for question in questions], [question.text for question in questions])
    for layer, texts in found.items():
        edits = erase_image(max(layer, 0), strength=float(layer >= 0))
        generated = jaxmllm.generate(model, inputs, max_new_tokens=NEW_TOKENS, edits=edits)
        assert list(generated.texts) == texts, layer

    # the curves are the scores of these answers, in the table and in TensorBoard
    table = pq.read_table(logdir / "results.parquet").to_pylist()
    rows = [row for row in table if (row["metric"], row["curve"], row["category"]) == ("generated", "erase", "all")]
    right = [
        np.mean([text == question.answer for text, question in zip(found[layer], questions, strict=True)])
        for layer in range(model.num_layers)
    ]
    np.testing.assert_allclose([row["value"] for row in rows], right)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    shown = EventAccumulator(str(logdir / "erase")).Reload().Scalars("generated_answers/image_hidden_at_layer")
    np.testing.assert_allclose([event.value for event in shown], right, rtol=1e-6)


def test_one_structure_changes_no_bit(plain_pair):
    model = plain_pair.jax
    inputs = model.as_inputs(tiny.make_inputs(plain_pair, [[3, 5]]), bucketed=True)
    branches = [erase_image(1), blind_image(2), erase_image(3)]
    alike, idle = of_one_structure(branches)

    def logits(edits):
        return np.asarray(model.forward(model.params, inputs, edits=edits, logits_at="last").logits)

    np.testing.assert_array_equal(logits(idle), logits(None))
    for edits, same in zip(branches, alike, strict=True):
        np.testing.assert_array_equal(logits(edits), logits(same))


def test_what_cannot_be_swept_is_refused(monkeypatch, tmp_path, capsys):
    def message(*args):
        assert run(monkeypatch, "sweep", DEMO / "model", "--logdir", tmp_path / "run", *args) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "either a question file" in message()
    assert "either a question file" in message("--benchmark", "scenes", "--questions", "q.jsonl")
    assert "vqav2" in message("--benchmark", "vqa")
    unanswered = tmp_path / "unanswered"
    shutil.copytree(DEMO / "questions" / "images", unanswered / "images")
    line = {"question_id": 1, "image": "0000.png", "text": "what digit is white ?"}
    (unanswered / "questions.jsonl").write_text(json.dumps(line))
    assert "no question of this split has a reference answer" in message("--benchmark", "llava", "--data", unanswered)
