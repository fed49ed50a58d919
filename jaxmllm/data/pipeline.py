"""Batches of a benchmark's questions, opened and processed by threads while the device computes the batch before.

Questions are cut into batches by their place in the source: batch k holds places k B .. k B + B - 1, whatever else is
done or left out. So the batch that a question is computed in, and with it every digit of its result, does not depend on
when a run was interrupted.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from jaxmllm.data.benchmarks.base import Example, Skipped, Source
from jaxmllm.errors import InputError, ProcessorError
from jaxmllm.processing.images import open_image

if TYPE_CHECKING:
    import grain

# Batches that are read at the same time, each by a thread of its own.
AHEAD = 2

# Images and prompts -> what a Hugging Face processor returns.
Prepare = Callable[[Sequence[Any], Sequence[str]], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Ready:
    """A question that can be answered.

    Attributes:
      index: its place in the source.
      prompt: the text that is asked.
    """

    index: int
    example: Example
    prompt: str


@dataclasses.dataclass(frozen=True)
class Broken(Skipped):
    """A question whose picture or prompt cannot be used; index is its place in the source."""

    index: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions that are computed together.

    Attributes:
      ready: the questions, fewer than the batch's rows where the source ends or where some are broken.
      broken: those that cannot be asked.
      inputs: arrays of all rows; rows past the questions repeat the first. ``None`` where there is no question.
      pictures: upright RGB, of all rows likewise.
      row_numbers: for each of the B rows, its question's place in the source.
    """

    ready: tuple[Ready, ...]
    broken: tuple[Broken, ...]
    inputs: Mapping[str, np.ndarray] | None
    pictures: tuple[Image.Image, ...]
    row_numbers: tuple[int, ...]


def batches(
    source: Source,
    prompt: Callable[[Example], str],
    prepare: Prepare,
    batch_size: int,
    done: Container[int] = frozenset(),
    *,
    process_index: int = 0,
    process_count: int = 1,
    ahead: int = AHEAD,
) -> grain.IterDataset:
    """The batches that are still to do, in order, as a grain dataset of ``Batch``.

    A batch of which one question is missing is made whole, and its results are the same as before. Iterators have
    grain's ``get_state`` and ``set_state``.

    Args:
      source: the questions.
      prompt: makes the text that is asked.
      prepare: makes arrays of opened images and texts; called by one thread at a time.
      batch_size: B, rows of every batch.
      done: places of questions that need no answer.
      process_index, process_count: this process takes every ``process_count``-th batch, from ``process_index``.
      ahead: batches that are read at the same time; so many more may wait.

    Raises:
      InputError: a batch size, or numbers of processes, that cannot be.
    """
    import grain

    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index is {process_index} of {process_count}; expected 0..{process_count - 1}")
    places = [range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    own = list(grain.MapDataset.range(len(places))[process_index::process_count])
    to_do = [number for number in own if any(index not in done for index in places[number])]
    lock = threading.Lock()  # tokenizers are not made for several threads at once

    def load(number: int) -> Batch:
        return _load(source, places[number], prompt, prepare, batch_size, lock)

    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    return grain.MapDataset.source(to_do).map(load).to_iter_dataset(options)


def _load(
    source: Source, places: range, prompt: Callable[[Example], str], prepare: Prepare, rows: int, lock: threading.Lock
) -> Batch:
    opened = [_open(index, source[index], prompt) for index in places]
    with lock:
        inputs = None
        while inputs is None and any(isinstance(entry, tuple) for entry in opened):
            pairs = [entry for entry in opened if isinstance(entry, tuple)]
            try:
                inputs = _prepare(pairs, prepare, rows)
            except ProcessorError:
                opened = [_tried(entry, prepare) for entry in opened]
                if len(pairs) == sum(isinstance(entry, tuple) for entry in opened):
                    raise  # each alone is fine
    ready = tuple(entry[0] for entry in opened if isinstance(entry, tuple))
    broken = tuple(entry for entry in opened if isinstance(entry, Broken))
    pictures = tuple(image for _, image in filled([entry for entry in opened if isinstance(entry, tuple)], rows))
    return Batch(ready, broken, inputs, pictures, tuple(one.index for one in filled(ready, rows)))


def _open(index: int, example: Example, prompt: Callable[[Example], str]) -> tuple[Ready, Image.Image] | Broken:
    try:
        return Ready(index, example, prompt(example)), open_image(example.image)
    except ProcessorError as error:
        return Broken(example.where, str(error), index)


def _tried(entry: tuple[Ready, Image.Image] | Broken, prepare: Prepare) -> tuple[Ready, Image.Image] | Broken:
    """The entry itself, unless the processor refuses it even when it is alone."""
    if isinstance(entry, Broken):
        return entry
    try:
        _prepare([entry], prepare, 1)
    except ProcessorError as error:
        return Broken(entry[0].example.where, str(error), entry[0].index)
    return entry


def _prepare(pairs: Sequence[tuple[Ready, Image.Image]], prepare: Prepare, rows: int) -> Mapping[str, np.ndarray]:
    whole = filled(pairs, rows)
    return prepare([image for _, image in whole], [one.prompt for one, _ in whole])


def filled(entries: Sequence[Any], rows: int) -> list[Any]:
    """Entries followed by as many copies of the first as are missing to ``rows``; nothing stays nothing."""
    return [*entries, *[entries[0]] * (rows - len(entries))] if entries else []
