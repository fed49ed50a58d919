"""A job of the command line: its processes, the folder of its run, and how it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxmllm.parallel import processes
from jaxmllm.parallel.remote import Mirror, mirrored


@dataclasses.dataclass(frozen=True)
class Job:
    """A job in the process that runs it.

    Attributes:
      place: the folder of the run as it was named, a path or a URL.
      mirror: the local folder, and how it is kept equal to that place.
      check: to be called between batches; raises ``Preempted`` once the process was told to end.
    """

    place: str
    mirror: Mirror
    check: Callable[[], None]

    @property
    def folder(self) -> Path:
        """The folder of the run on this machine."""
        return self.mirror.folder

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return processes.index() == 0

    def meet(self, name: str) -> None:
        """Waits for all processes; what each has written before is then seen by all of them.

        Args:
          name: of the place, each used once.
        """
        self.mirror.push()
        processes.wait_for_all(name)
        self.mirror.pull()

    def saved(self) -> None:
        """To be called when a batch is on the disk: sends it where it belongs, and ends if that was asked for."""
        self.mirror.push()
        self.check()


@contextmanager
def running(place: str | Path) -> Iterator[Job]:
    """Runs a job; SIGTERM ends it with exit code 0 (see ``processes.ending_on_sigterm``).

    Args:
      place: folder of the run, a path or a URL that fsspec knows.

    Raises:
      InputError: the place cannot be read.
    """
    with mirrored(place) as mirror, processes.ending_on_sigterm() as check:
        yield Job(str(place), mirror, check)
