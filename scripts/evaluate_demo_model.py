"""Scores the embedded model on freshly generated scenes with held-out digits.

    python scripts/evaluate_demo_model.py                       # 4,000 questions, a table by kind
    python scripts/evaluate_demo_model.py runs/demo-model/model --questions 1000

Neither these scenes nor their digits occur in training, and they are not the scenes that ship with the package. Greedy
decoding is scored: the answer counts when its word is the most probable token; "with end" also asks for the end token
behind it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from PIL import Image

import jaxmllm
from jaxmllm.data.digits import load_digit_bitmaps
from jaxmllm.data.scene_questions import EVEN_MIX, QUESTION_KINDS, Question, ask_all, majority_baseline
from jaxmllm.data.scenes import render, sample_scene
from jaxmllm.processing import append_answers, encode_answers
from jaxmllm.report.tables import markdown, percent

EMBEDDED = Path(jaxmllm.__file__).parent / "demo" / "model"
A_SCENE = 8  # questions asked of each scene
BATCH = 64


def score(model: jaxmllm.Model, images: list[Image.Image], asked: list[Question]) -> np.ndarray:
    """Whether answer and end token are right, ``[Q, 2]``."""
    end = model.processor.tokenizer.eos_token_id
    answers = [[*ids, end] for ids in encode_answers(model.processor, [question.answer for question in asked])]
    inputs = append_answers(
        model.prepare(images, [question.text for question in asked]), answers, answer_length=2, bucket=32
    )
    logits = model.forward(model.params, inputs, logits_at="answer").logits
    return np.asarray(logits.argmax(-1)) == inputs["answer_ids"]


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder.")] = EMBEDDED,
    questions: Annotated[int, typer.Option(help="Questions to ask.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 7,
) -> None:
    """Prints accuracy by kind of question as a Markdown table, then one JSON line."""
    model = jaxmllm.load(folder)
    rng, digits = np.random.default_rng([seed, 20260111]), load_digit_bitmaps("test")
    images: list[Image.Image] = []
    asked: list[Question] = []
    while len(asked) < questions:
        scene = sample_scene(rng, digits)
        images += [Image.fromarray(render(scene, model.config.vision.image_size))] * A_SCENE
        asked += ask_all(rng, scene, A_SCENE, EVEN_MIX)
    batches = range(0, len(asked) - len(asked) % BATCH, BATCH)
    right = np.concatenate([score(model, images[at : at + BATCH], asked[at : at + BATCH]) for at in batches])
    asked = asked[: len(right)]
    kinds = np.array([question.kind for question in asked])
    rows = [["kind", "questions", "accuracy %", "with end %", "most frequent answer %"]]
    for kind in (*QUESTION_KINDS, "all"):
        of_kind = np.ones(len(kinds), bool) if kind == "all" else kinds == kind
        baseline = majority_baseline([question for question, keep in zip(asked, of_kind, strict=True) if keep])
        rows.append(
            [kind, str(of_kind.sum()), percent(right[of_kind, 0].mean()), percent(right[of_kind].all(axis=1).mean()),
             percent(baseline)]
        )  # fmt: skip
    print(markdown(rows))
    accuracy = {row[0]: float(row[2]) for row in rows[1:]}
    print(json.dumps({"questions": len(asked), "seed": seed, "backend": jax.default_backend(), "accuracy": accuracy}))


if __name__ == "__main__":
    typer.run(evaluate)
