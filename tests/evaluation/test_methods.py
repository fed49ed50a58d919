"""Evaluations by a method: asked, stored, resumed and compared as any other."""

import json

import numpy as np
import pytest

import jaxmllm
from jaxmllm.analysis.fusion import fusion_record, read_fusion_layers
from jaxmllm.errors import InputError
from jaxmllm.evaluation.compare import compare
from jaxmllm.evaluation.evaluate import evaluate
from jaxmllm.evaluation.request import Request
from jaxmllm.methods import ContrastiveReinput, parse_method
from tests.support import demo

LIMIT = 12


@pytest.fixture(scope="module")
def model():
    return jaxmllm.load(demo.DEMO / "model")


def request(**options):
    return Request(model=demo.DEMO / "model", benchmark="scenes", limit=LIMIT, **options)


def run(folder, model, **options):
    return evaluate(request(**options), folder, model=model, batch_size=4)


def test_a_run_by_a_method(tmp_path, model):
    """The rows are what ``answer`` gives; the settings say how, and two runs are compared by it."""
    found = run(tmp_path / "method", model, method="contrastive:threshold=0.4", fusion_layers="0+1")
    settings = json.loads((tmp_path / "method" / "run.json").read_text())
    assert settings["method"] == "contrastive:fusion_layers=0+1,threshold=0.4"
    assert parse_method(settings["method"]) == ContrastiveReinput(fusion_layers=(0, 1), threshold=0.4)
    asked = demo.questions()[:LIMIT]
    answers = jaxmllm.answer(
        model,
        [question.image for question in asked],
        [row["prompt"] for row in found.rows],
        method=parse_method(settings["method"]),
        max_new_tokens=settings["max_new_tokens"],
    )
    assert [row["prediction"] for row in found.rows] == list(answers)
    assert [row["crop"] for row in found.rows] == [list(box) for box in answers.details.boxes]
    run(tmp_path / "plain", model)
    comparison = compare(tmp_path / "plain", tmp_path / "method")
    assert comparison.settings["method"] == (None, settings["method"])
    with pytest.raises(InputError, match="method is"):
        run(tmp_path / "method", model, method="second-look")


def test_a_run_goes_on(tmp_path, model):
    whole = run(tmp_path / "whole", model, method="random-crop")
    path = tmp_path / "whole" / "results.jsonl"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "run.json").write_text((tmp_path / "whole" / "run.json").read_text())
    (tmp_path / "cut" / "results.jsonl").write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    again = run(tmp_path / "cut", model, method="random-crop")
    assert again.answered == LIMIT - 5 and again.rows == whole.rows


def test_questions_with_evidence_and_a_general_prompt(tmp_path, model):
    """The general prompt goes through the benchmark's template, and known boxes reach the method."""
    crops = run(tmp_path / "evidence", model, method="evidence-crop:share=0.2")
    for row, question in zip(crops.rows, demo.questions(), strict=False):
        for box in question.boxes or ():
            assert row["crop"][0] <= box[0] + 1 and row["crop"][3] >= box[3] - 1
    assert run(tmp_path / "general", model, method="vicrop:general=how many objects are there ?").rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "no method 'magic'"),
        ({"method": "contrastive"}, "--fusion-layers"),
        ({"method": "contrastive", "fusion_layers": "9"}, "no layers"),
        ({"method": "knockout:layer=8"}, "no layer 8"),
        ({"fusion_layers": "1"}, "without a method"),
        ({"method": "opera", "sampling": jaxmllm.Sampling()}, "draws no tokens"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_loaded(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(request(**options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fusion_layers_by_hand_and_from_a_file(tmp_path):
    assert read_fusion_layers("2+4+8") == read_fusion_layers("2,4,8") == (2, 4, 8)
    record = fusion_record(np.array([0.2, 0.5, 0.55, 0.9]), 0.95)
    assert record["layers"] == [0, 2] and record["num_layers"] == 4
    (tmp_path / "fusion.json").write_text(json.dumps(record))
    assert read_fusion_layers(tmp_path) == read_fusion_layers(str(tmp_path / "fusion.json")) == (0, 2)
    (tmp_path / "fusion.json").write_text(json.dumps(record | {"layers": []}))
    with pytest.raises(InputError, match="at least one"):
        read_fusion_layers(tmp_path)
    with pytest.raises(InputError, match="no fusion layers"):
        read_fusion_layers("nowhere.json")
