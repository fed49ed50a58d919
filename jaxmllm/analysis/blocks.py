"""The questions of a study, block by block: how blocks are cut, and their walk through the sweep."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxmllm.analysis.geometry import token_boxes
from jaxmllm.analysis.scores import BlockScores, in_order, join_scores
from jaxmllm.analysis.sharing.budget import Lengths, SweepPlan
from jaxmllm.analysis.sharing.shapes import Shapes, choose_shapes
from jaxmllm.analysis.sweeping import Sweeper, plan_for
from jaxmllm.data.questions import Question
from jaxmllm.errors import InputError
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.sharding import rows_of_mesh
from jaxmllm.processing import ImageLike, append_answers, image_size, open_image, prompt_lengths

# Preprocessed images of one block take at most so much of the host's memory.
HOST_BYTES = 1_000_000_000


# Units are as large as this, so that what is done once for all questions of one is little beside the rest, unless there
# would be fewer than so many units: a run that is stopped loses the unit in hand, and processes divide units.
UNIT_ROWS, UNITS = 256, 8


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the questions of a study are cut. A run keeps its cut wherever it is gone on with, and with it every digit.

    Attributes:
      answer_length: tokens that answers are padded to.
      shapes: what blocks are padded to.
      block: questions a block, the unit of work.
      rows: questions that each device computes together.
    """

    answer_length: int
    shapes: Shapes
    block: int
    rows: int

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Cut:
        """The cut that ``dataclasses.asdict`` and JSON made a record of."""
        shapes: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record["shapes"].items()
        }
        return cls(record["answer_length"], Shapes(**shapes), record["block"], record["rows"])


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a study is run.

    Attributes:
      order: the questions' numbers, those of one image side by side, so that they share its clean pass.
      cut: how they are cut.
      plan: how memory is spent; ``None`` runs the plain way.
    """

    order: tuple[int, ...]
    cut: Cut
    plan: SweepPlan | None

    @property
    def units(self) -> list[tuple[int, ...]]:
        """The questions' numbers, block by block."""
        return [self.order[start : start + self.cut.block] for start in range(0, len(self.order), self.cut.block)]

    def of_unit(self, questions: int) -> Setup:
        """The setup of one unit of so many questions."""
        return dataclasses.replace(self, order=tuple(range(questions)))


def set_up(
    model: Any,
    questions: Sequence[Question],
    branches: Sequence[Edits],
    answer_length: int,
    batch_size: int,
    plain: bool = False,
    budget: int | None = None,
    cut: Cut | None = None,
) -> Setup:
    """Plans a study; of the images only the sizes are looked at, and of one the pixels.

    Args:
      model: a loaded model.
      questions: all that will be asked.
      branches: one edit a branch.
      answer_length: tokens of the longest answer.
      batch_size: questions computed together, at most.
      plain: run everything for every branch.
      budget: bytes of device memory that may be taken, weights included; by default what the device grants.
      cut: of the run that is gone on with.

    Raises:
      JaxmllmError: unreadable images, a budget that is too small.
    """
    data = rows_of_mesh(model.mesh)
    prompts = prompt_lengths(model.processor, [question.text for question in questions])
    images = {image: number for number, image in enumerate(dict.fromkeys(question.image for question in questions))}
    heads, tails = (max(lengths) for lengths in zip(*prompts, strict=True))
    bodies = image_tokens(model, list(images))
    largest = list(images)[int(np.argmax(bodies))]
    asked = [tail - 1 for _, tail in prompts]
    most = unit_rows(len(questions), batch_size, data) if cut is None else cut.block
    if plain:
        plan, rows, block, bodies = None, batch_size, batch_size * data, []
    else:
        lengths = Lengths(heads, max(bodies), tails - 1, answer_length)
        a_context = len(questions) / len(images)
        chunk = batch_size if cut is None else cut.rows
        plan = plan_for(model, branches, lengths, len(questions), a_context, chunk, budget, most)
        rows, block = plan.rows, min(most, plan.block * data)
    if cut is not None and plan is not None and rows < min(cut.rows, -(-len(questions) // data)):
        raise InputError(
            f"this run was begun with {cut.rows} questions computed together, and {rows} fit here; raise the budget, "
            "give it more devices, or begin anew in another folder"
        )
    if cut is None:
        room = images_in_memory(model, largest)
        shapes = choose_shapes(asked, answer_length, len(images), rows, bodies if model.family.tokens_vary else [])
        cut = Cut(answer_length, shapes, min(block, room), rows)
    order = sorted(range(len(questions)), key=lambda number: images[questions[number].image])
    return Setup(tuple(order), cut, plan)


def unit_rows(questions: int, rows: int, data: int = 1) -> int:
    """Questions a unit, at most, so that each of ``data`` devices has whole chunks of ``rows`` to compute."""
    together = rows * data
    share = min(UNIT_ROWS, -(-questions // UNITS))
    return -(-share // together) * together


def image_tokens(model: Any, images: Sequence[ImageLike]) -> list[int]:
    """The tokens that each image takes; of models whose images all take equally many only the first is looked at."""
    if not model.family.tokens_vary:
        images = images[:1]
    return [len(token_boxes(model, [image_size(image)])[0].boxes) for image in images]


def images_in_memory(model: Any, largest: ImageLike) -> int:
    """Questions whose preprocessed images fit in the host's share of memory; at least one."""
    images = model.as_inputs(model.prepare([largest], ["?"]), bucketed=True).images
    return max(1, HOST_BYTES // sum(array.nbytes for array in images.arrays.values()))


# Called with the numbers of a block's questions, their opened images, and the model's inputs.
OnBlock = Callable[[list[int], list[Image.Image], Inputs], None]


def run_blocks(
    sweeper: Sweeper,
    setup: Setup,
    questions: Sequence[Question],
    answers: Sequence[Sequence[int]],
    on_progress: Callable[[float], None] = lambda done: None,
    on_block: OnBlock = lambda rows, opened, inputs: None,
) -> BlockScores:
    """Scores of an answer to each question under every branch.

    Args:
      sweeper: the branches.
      setup: of all questions.
      questions: all of them.
      answers: token ids of an answer to each, none longer than ``setup.cut.answer_length``.
      on_progress: called with the number of questions done.
      on_block: called before each block.

    Returns:
      Scores in the order of the questions.
    """
    order, block = setup.order, setup.cut.block
    parts: list[BlockScores] = []

    def report(start: int, size: int, share: float) -> None:
        on_progress(start + share * size)

    for start in range(0, len(order), block):
        rows = list(order[start : start + block])
        opened = [open_image(questions[row].image) for row in rows]
        filled = append_answers(
            sweeper.model.prepare(opened, [questions[row].text for row in rows]),
            [answers[row] for row in rows],
            answer_length=setup.cut.answer_length,
        )
        inputs = sweeper.model.as_inputs(filled, bucketed=True)
        on_block(rows, opened, inputs)
        parts.append(sweeper.run(inputs, filled["answer_ids"], functools.partial(report, start, len(rows))))
        on_progress(start + len(rows))
    return in_order(join_scores(parts), np.argsort(order))
