"""The embedded model in both frameworks, and its held-out questions."""

import functools
from pathlib import Path

import jaxmllm
from jaxmllm.data.questions import read_questions
from tests.support.tiny import Pair

DEMO = Path(jaxmllm.__file__).parent / "demo"


@functools.cache
def pair() -> Pair:
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        DEMO / "model", dtype=torch.float32, attn_implementation="eager"
    )
    return Pair("embedded", DEMO / "model", model.eval(), jaxmllm.load(DEMO / "model"))


@functools.cache
def questions():
    return read_questions(DEMO / "questions" / "questions.jsonl", DEMO / "questions" / "images")
