"""The folder of a run that is done unit by unit and reported on when all are done.

While units are computed the folder holds what the run is (``run.json``, ``versions.json``, ``cut.json``), and
``parts/``. The report is written beside them and moved into place; then ``run.json`` says that the run is finished, and
the parts go. A kill between any two of these steps leaves a folder that the same command goes on with.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.files import lock, write_json
from jaxmllm.parallel.job import Job
from jaxmllm.parallel.parts import PARTS, Parts
from jaxmllm.parallel.record import (
    BUSY,
    CUT,
    MADE_BY,
    NOT_SHARED,
    SETTINGS,
    check_same,
    note_versions,
    read_record,
)

REPORT = ".report"
KEPT = {SETTINGS, MADE_BY, CUT, PARTS}
FINISHED = "finished"
# Told, but without a say in the results: folders may move.
SHOWN = (FINISHED, "model", "questions", "images", "data")


@dataclasses.dataclass(frozen=True)
class UnitRun:
    """A run that this process takes part in.

    Attributes:
      job: its processes and its folder.
      parts: the results of units.
    """

    job: Job
    parts: Parts

    @property
    def folder(self) -> Path:
        return self.job.folder

    def read_cut(self) -> dict[str, Any] | None:
        """How the run's questions are cut; ``None`` where that is not settled yet."""
        return read_record(self.folder, CUT)

    def settle_cut(self, cut: Mapping[str, Any], **noted: Any) -> dict[str, Any]:
        """Settles how questions are cut: as the first process has it.

        Args:
          cut: what this process proposes.
          noted: what ``versions.json`` is to hold besides versions.
        """
        if self.job.is_first:
            write_json(self.folder / CUT, cut)
            note_versions(self.folder, **noted)
        self.job.meet("cut")
        settled = self.read_cut()
        if settled is None:
            raise InputError(NOT_SHARED.format(self.job.place))
        return settled

    def finish(self, write_report: Callable[[Path], None]) -> None:
        """Ends the run: writes its report, and says that it is finished.

        Args:
          write_report: writes it into the folder it is given.
        """
        for left in self.folder.iterdir():  # of an end that was cut short
            if left.name not in KEPT:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        building = self.folder / REPORT
        building.mkdir()
        write_report(building)
        for path in building.iterdir():
            path.rename(self.folder / path.name)
        building.rmdir()
        write_json(self.folder / SETTINGS, (read_record(self.folder) or {}) | {FINISHED: True})
        self.parts.remove()


@contextmanager
def open_unit_run(job: Job, settings: Mapping[str, Any]) -> Iterator[UnitRun]:
    """Makes the folder of a run, or takes one up again, and locks it while the block lasts.

    What is new goes again where the block fails before its first part.

    Args:
      job: its processes and its folder.
      settings: what decides the results.

    Raises:
      InputError: the folder holds something else, a finished run, or one with other settings; another process writes
        it, or it cannot be written.
    """
    run = UnitRun(job, Parts(job.folder, job.saved))
    if not job.is_first:
        job.meet("opened")
        if not (job.folder / SETTINGS).is_file():
            raise InputError(NOT_SHARED.format(job.place))
        yield run
        return
    was_there = job.folder.exists()
    is_new = _make(job)
    with _locked(job):
        try:
            if is_new:
                write_json(job.folder / SETTINGS, settings)
            else:
                _check(job, settings)
            job.meet("opened")
            yield run
        except BaseException:
            if is_new and not run.parts.done():
                for name in (SETTINGS, MADE_BY, CUT):
                    (job.folder / name).unlink(missing_ok=True)
                run.parts.remove()
                job.mirror.push()
                if not was_there:
                    with suppress(OSError):  # other processes may still be there
                        job.folder.rmdir()
            raise


def _make(job: Job) -> bool:
    """Makes the folder of a run that is new; whether it is.

    Raises:
      InputError: it holds something else than a run, or cannot be made.
    """
    folder = job.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise InputError(f"{job.place}: cannot be written ({error.strerror})") from error
    if inside and SETTINGS not in inside:
        raise InputError(f"{job.place} exists already and is not empty; name a new folder")
    return SETTINGS not in inside


def _check(job: Job, settings: Mapping[str, Any]) -> None:
    """Raises InputError where a folder's run is another one, or is finished."""
    there = read_record(job.folder) or {}
    check_same(Path(job.place), there, settings, SHOWN)
    if there.get(FINISHED):
        raise InputError(f"{job.place} exists already and holds this very run, finished; name a new folder")


@contextmanager
def _locked(job: Job) -> Iterator[None]:
    """Locks the folder itself while the block lasts."""
    descriptor = os.open(job.folder, os.O_RDONLY)
    try:
        lock(descriptor, job.place, BUSY)
        yield
    finally:
        os.close(descriptor)
