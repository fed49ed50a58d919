"""The loop of an evaluation: batches in, lines of results out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmllm.analysis.edit_specs import parse_edits
from jaxmllm.data.benchmarks.base import Benchmark, Example, Row, Source, judged_row
from jaxmllm.data.pipeline import Ready, batches, filled
from jaxmllm.data.prompts import fill_prompt
from jaxmllm.decoding import batch_that_fits
from jaxmllm.decoding.fit import MOST_ROWS
from jaxmllm.errors import InputError, ProcessorError
from jaxmllm.evaluation.request import Opened
from jaxmllm.evaluation.run import Run, nobody
from jaxmllm.files import write_json
from jaxmllm.methods import Method, parse_method
from jaxmllm.methods.answering import Answered, answer_by
from jaxmllm.methods.first import AskIn
from jaxmllm.model import Model
from jaxmllm.parallel.mesh import Group
from jaxmllm.parallel.record import CUT, read_record
from jaxmllm.processing import ImageLike, image_size, prepare

# Questions that are looked at to find a large image and a long prompt.
SAMPLED = 64


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: questions done of all, and questions a second in this process."""

    done: int
    questions: int
    speed: float


def answer_questions(
    model: Model,
    opened: Opened,
    run: Run,
    *,
    skip_bad: bool = False,
    batch_size: int | None = None,
    budget: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    group: Group = Group(),
    meet: Callable[[str], None] = nobody,
) -> None:
    """Answers the questions that a run has no answer to yet, and writes the answers batch by batch.

    Args:
      model: the loaded model.
      opened: the benchmark.
      run: what is answered already, and where answers go.
      skip_bad: note and leave out questions that cannot be asked, rather than to stop at the first.
      batch_size: questions computed together; by default as many as fit.
      budget: bytes of device memory that may be taken, weights included; by default what the device grants.
      on_progress: called after every batch.
      group: the processes that answer together; it takes every ``group.count``-th batch.
      meet: waits for the other processes, at the place named.

    Raises:
      InputError: a picture or a prompt cannot be used (unless it is skipped), answers cannot be written, or the model's
        probabilities are not numbers.
    """
    settings, source = opened.settings, opened.source
    # The threads that prepare batches have a processor of their own: tokenizers must not be used by two at once.
    processor = copy.deepcopy(model.processor)

    def prompt(example: Example) -> str:
        return fill_prompt(settings.prompt, example, processor.image_token)

    def prepared(images: Sequence[ImageLike], texts: Sequence[str]) -> Mapping[str, np.ndarray]:
        return prepare(processor, images, texts)

    method = Method() if settings.method is None else parse_method(settings.method)
    how: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "sampling": settings.sampling(),
        "edits": None if settings.edits is None else parse_edits(settings.edits),
    }
    cut = read_record(run.folder, CUT) or {}
    if batch_size is None:
        batch_size = cut.get("batch_size")
    if batch_size is None:
        batch_size = min(MOST_ROWS * group.data, len(source))
        one = heaviest_inputs(source, prompt, prepared)
        if one is not None:
            batch_size = max(1, batch_that_fits(model, one, most=batch_size, budget=budget, **how) // method.weight)
    # one size for all processes, and for those that go on with the run: every digit then stays as it is
    if group.index == 0 and group.leader:
        write_json(run.folder / CUT, {"batch_size": batch_size})
    meet("cut")
    batch_size = int((read_record(run.folder, CUT) or {})["batch_size"])
    key = None if settings.seed is None else jax.random.key(settings.seed)
    rows_a_batch = min(batch_size, len(source))
    own = {place for place in range(len(source)) if place // rows_a_batch % group.count == group.index}
    iterator = iter(
        batches(
            source,
            prompt,
            prepared,
            rows_a_batch,
            run.done(),
            process_index=group.index,
            process_count=group.count,
        )
    )
    marks = [(time.monotonic(), 0)]
    with contextlib.closing(iterator):
        for batch in iterator:
            if batch.broken and not skip_bad:
                raise InputError(f"{batch.broken[0].where}: {batch.broken[0].problem}")
            if group.leader:
                run.skip(batch.broken)
            new = []
            if batch.inputs is not None:
                rows_asked = filled(batch.ready, len(batch.row_numbers))
                answered = answer_by(
                    model,
                    batch.inputs,
                    [[picture] for picture in batch.pictures],
                    [one.prompt for one in rows_asked],
                    method,
                    ask_in=_asking(prompt, rows_asked),
                    evidence=[one.example.boxes for one in rows_asked],
                    key=key,
                    row_numbers=batch.row_numbers,
                    **how,
                )
                rows = [row_of(opened.benchmark, one, answered, place) for place, one in enumerate(batch.ready)]
                new = [row for row in rows if row["index"] not in run.results.present]
                if group.leader:
                    run.results.append(new)
            marks.append((time.monotonic(), marks[-1][1] + len(new)))
            on_progress(Progress(len(own & run.done()), len(own), _speed(marks)))


def _asking(prompt: Callable[[Example], str], rows: Sequence[Ready]) -> AskIn:
    """Makes the prompt of another question about an example of a batch, all else being as in its own."""

    def ask(question: str, row: int) -> str:
        return prompt(dataclasses.replace(rows[row].example, text=question))

    return ask


def _speed(marks: Sequence[tuple[float, int]]) -> float:
    """Questions a second from (time, questions so far) after each batch; without the first one, which compiles."""
    (began, before), (now, answered) = marks[min(1, len(marks) - 2)], marks[-1]
    return (answered - before) / max(now - began, 1e-9)


def row_of(benchmark: Benchmark, asked: Ready, answered: Answered, place: int) -> Row:
    """One line of results.

    Args:
      asked: the question.
      answered: its batch, in which it has ``place``.

    Raises:
      InputError: the model's probabilities are not numbers.
    """
    example, generated = asked.example, answered.generated
    log_probability = math.fsum(generated.log_probabilities[place].tolist())
    if not math.isfinite(log_probability):
        raise InputError(
            f"{example.where}: the model's probabilities are not finite numbers; it may overflow in this dtype "
            "(bfloat16 and float32 reach further than float16), or its weights may be broken"
        )
    prediction = (generated.texts or ())[place]
    row = judged_row(benchmark, asked.index, example, asked.prompt, prediction) | {
        "log_probability": log_probability,
        "tokens": int(generated.lengths[place]),
        "stopped": bool(generated.stopped[place]),
    }
    return row if answered.boxes is None else row | {"crop": list(answered.boxes[place])}


def heaviest_inputs(
    source: Source,
    prompt: Callable[[Example], str],
    prepared: Callable[[Sequence[ImageLike], Sequence[str]], Mapping[str, np.ndarray]],
) -> Mapping[str, np.ndarray] | None:
    """Inputs to plan memory by: of up to 64 examples the largest image that can be read, with the longest prompt.

    ``None`` where none can be prepared; what is wrong with each is told when its turn comes.
    """
    places = np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int))
    examples = [source[place] for place in places]
    longest = max(map(prompt, examples), key=len)
    for example in sorted(examples, key=_pixels, reverse=True):
        with contextlib.suppress(ProcessorError):
            return prepared([example.image], [longest])
    return None


def _pixels(example: Example) -> int:
    try:
        return math.prod(image_size(example.image))
    except ProcessorError:
        return 0
