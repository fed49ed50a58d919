"""Small question files over the embedded model's scenes, rows made by hand, and evaluations of one shape."""

import functools
import json
import shutil
from pathlib import Path

import jaxmllm
from jaxmllm.data.benchmarks import benchmark_named
from jaxmllm.data.benchmarks.llava import SCENES
from jaxmllm.evaluation.evaluate import evaluate
from jaxmllm.evaluation.request import Request

MODEL = Path(jaxmllm.__file__).parent / "demo" / "model"
# One size for all, so that few programs are compiled.
BATCH = 4


@functools.cache
def model():
    return jaxmllm.load(MODEL)


def write_scenes(folder: Path, count: int, broken: tuple[int, ...] = (), first: int = 0) -> Path:
    """The first held-out questions as a benchmark in LLaVA's form; the images of some cannot be read."""
    (folder / "images").mkdir(parents=True)
    lines = (SCENES / "questions.jsonl").read_text().splitlines()[first : first + count]
    records = [json.loads(line) for line in lines]
    for place, record in enumerate(records):
        name = f"{place}.png"
        shutil.copyfile(SCENES / "images" / record["image"], folder / "images" / name)
        if place in broken:
            (folder / "images" / name).write_bytes(b"\x89PNG\r\n\x1a\n broken")
        record["image"] = name
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def ask(folder: Path, batch_size: int | None = BATCH, at_hand=model, on_progress=lambda progress: None, **changes):
    """An evaluation of the embedded model."""
    request = Request(**{"model": MODEL, "benchmark": "scenes", "limit": 12} | changes)
    return evaluate(request, folder, model=at_hand(), batch_size=batch_size, on_progress=on_progress)


def make_row(place: int, score: float | None = 1.0, **changes) -> dict:
    """A line of results."""
    row = {
        "index": place, "question_id": f"q{place}", "where": f"questions.jsonl, line {place + 1}", "question": "what ?",
        "prompt": "what ?", "prediction": "red", "parsed": "red", "score": score, "answers": ["red"],
        "reference": "red", "categories": {"category": "colour"}, "image": f"{place}.png", "log_probability": -0.5,
        "tokens": 2, "stopped": True,
    }  # fmt: skip
    return row | changes


def llava():
    return benchmark_named("llava")
