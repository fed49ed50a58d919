"""The folder of a run: made for its settings, locked while it is written, taken up again where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.data.benchmarks.base import Skipped, Source
from jaxmllm.data.pipeline import Broken
from jaxmllm.errors import InputError
from jaxmllm.evaluation.results import (
    RESULTS,
    SKIPPED,
    LineFile,
    appending,
    of_process,
    read_lines,
    read_results,
    take_in,
)
from jaxmllm.evaluation.settings import SHOWN, Settings, read_settings
from jaxmllm.files import write_json, write_text
from jaxmllm.parallel.record import CUT, MADE_BY, NOT_SHARED, SETTINGS, check_same

# Answers that are looked up in the data when a run goes on, to see that the data is still the same.
PROBES = 64


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that this process may write.

    Attributes:
      folder: where it is.
      settings: what decides its answers.
      results: the answers.
      skipped: questions that are left out.
      left_out: places in the source of those that were found to be broken when they were opened.
    """

    folder: Path
    settings: Settings
    results: LineFile
    skipped: LineFile
    left_out: set[int]

    def done(self) -> set[int]:
        """Places in the source of the questions that need no answer any more."""
        return self.results.present | self.left_out

    def count(self) -> int:
        """How many questions need no answer any more."""
        return len(self.results.present) + len(self.left_out)

    def skip(self, broken: Sequence[Broken]) -> None:
        """Notes questions that are left out."""
        new = [_line(one) for one in broken if one.where not in self.skipped.present]
        if new:
            self.skipped.append(new)
            self.left_out.update(one.index for one in broken)

    def take_in(self) -> None:
        """Takes in what other processes have written; for process 0, when they are done."""
        take_in(self.results, self.folder)
        take_in(self.skipped, self.folder)


def nobody(place: str) -> None:
    """The meeting of a process that is alone."""


@contextlib.contextmanager
def open_run(
    folder: Path,
    settings: Settings,
    source: Source,
    skip_bad: bool = False,
    process: int = 0,
    meet: Callable[[str], None] = nobody,
) -> Iterator[Run]:
    """Makes the folder of a run, or takes one up again, and locks it while the block lasts.

    What is new goes again where the block fails before the first answer. Of several processes the first one makes the
    folder, and takes in what an earlier run of several left; each then writes files of its own.

    Args:
      folder: of the run.
      settings: what decides its answers.
      source: the questions.
      skip_bad: whether questions that were found to be broken earlier are left out again, rather than tried again.
      process: number of this process.
      meet: waits for the other processes, at the place named.

    Raises:
      InputError: the folder holds something else, a run with other settings, or answers that are not to the source's
        questions; another process writes it; a file of it is damaged or cannot be written.
    """
    if process > 0:
        with _joined_run(folder, settings, process, meet) as run:
            yield run
        return
    known = (SETTINGS, RESULTS.name, SKIPPED.name)
    ours = (*known, CUT, MADE_BY)
    try:
        is_made = not folder.exists()
        is_new = is_made or (folder.is_dir() and not any(folder.iterdir()))
        if not is_new and not any((folder / name).exists() for name in known):
            raise InputError(f"{folder} holds something else than a run; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    with appending(folder, RESULTS) as results:
        try:
            if results.present and not (folder / SETTINGS).exists():
                raise InputError(f"{folder}: {SETTINGS} is missing beside {RESULTS.name}; name another folder")
            if results.present:
                there, now = (dataclasses.asdict(each) for each in (read_settings(folder), settings))
                check_same(folder, there, now, SHOWN)
            take_in(results, folder)
            check_against(folder, source)
            write_json(folder / SETTINGS, dataclasses.asdict(settings))
            earlier = read_lines(folder, SKIPPED) if skip_bad and results.present else []
            left_out = {row["index"]: row for row in earlier if row["index"] not in {None, *results.present}}
            listed = {row["where"]: row for row in (*map(_line, source.skipped), *left_out.values())}
            write_text(folder / SKIPPED.name, "".join(json.dumps(row) + "\n" for row in listed.values()))
            with appending(folder, SKIPPED) as skips:
                take_in(skips, folder)
                meet("opened")
                yield Run(folder, settings, results, skips, set(left_out))
        except BaseException:
            if is_new and not results.present:
                for name in ours:
                    (folder / name).unlink(missing_ok=True)
                if is_made:
                    with contextlib.suppress(OSError):  # other processes may still be there
                        folder.rmdir()
            raise


@contextlib.contextmanager
def _joined_run(folder: Path, settings: Settings, process: int, meet: Callable[[str], None]) -> Iterator[Run]:
    """A run that the first process has opened."""
    meet("opened")
    if not (folder / SETTINGS).is_file():
        raise InputError(NOT_SHARED.format(folder))
    answered = {row[RESULTS.key] for row in read_lines(folder, RESULTS)}
    skipped = read_lines(folder, SKIPPED)
    with (
        appending(folder, of_process(RESULTS, process)) as results,
        appending(folder, of_process(SKIPPED, process)) as skips,
    ):
        results.present.update(answered)
        skips.present.update(row[SKIPPED.key] for row in skipped)
        left_out = {row["index"] for row in skipped} - {None, *results.present}
        yield Run(folder, settings, results, skips, left_out)


def _line(record: Skipped) -> dict[str, Any]:
    """A line of ``skipped.jsonl``; only what was found when it was opened has a place in the source."""
    index = record.index if isinstance(record, Broken) else None
    return {"where": record.where, "problem": record.problem, "index": index}


def check_against(folder: Path, source: Source) -> None:
    """Checks that the answers of a run are answers to a source's questions; some are looked up.

    Raises:
      InputError: the run has more answers than there are questions, or a question has changed.
    """
    rows = read_results(folder)
    if rows and rows[-1]["index"] >= len(source):
        raise InputError(
            f"{folder} holds answers up to question {rows[-1]['index'] + 1}, and only {len(source)} are asked now; "
            "raise the limit, or name another folder"
        )
    for place in np.unique(np.linspace(0, len(rows) - 1, PROBES).astype(int)) if rows else ():
        row = rows[place]
        example = source[row["index"]]
        answers = None if example.answers is None else list(example.answers)
        if [row["question_id"], row["question"], row["answers"]] != [example.question_id, example.text, answers]:
            raise InputError(
                f"{folder / RESULTS.name}: question number {row['index']} is {row['question_id']} "
                f"({row['question']!r}), and now {example.question_id} ({example.text!r}, {example.where}); "
                "the data has changed since, so name another folder"
            )
