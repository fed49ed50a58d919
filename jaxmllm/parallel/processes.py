"""Several processes that do one job: how they find each other, wait for each other, and end.

Processes are those of ``jax.distributed``. What they share is the folder of the run; they wait for each other at the
run's begin and end and nowhere between, unless one copy of the model lies on several of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jaxmllm.errors import InputError
from jaxmllm.parallel import libtpu

# A process that gives no sign of life for so many seconds is taken for dead, and the others end.
HEARTBEAT_SECONDS = 20
# How long processes wait for each other to start; hosts of a pod do not boot at once.
START_SECONDS = 600
# How long a process may finish the batch in hand after it was told to end (cloud providers give it 30 seconds).
GRACE_SECONDS = 20
# Exit code of a process that ended because another one did.
PEER_ENDED = 3
# Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Each says that there may be a cluster which JAX itself can ask: Slurm, Open MPI, several TPU slices, Kubernetes.
CLUSTER_VARIABLES = (
    ADDRESS, COUNT, INDEX, "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "PMIX_NAMESPACE", "MEGASCALE_COORDINATOR_ADDRESS",
    "KUBERNETES_SERVICE_HOST",
)  # fmt: skip
# Names the hosts of a TPU slice on GKE; elsewhere its chips show.
TPU_HOSTS = "TPU_WORKER_HOSTNAMES"

_PEER_MESSAGE = (
    b"error: another process of this run has ended, or cannot be reached; this one ends too. What was finished is in "
    b"the run's folder: start all processes again with the same command to go on.\n"
)


class Preempted(BaseException):
    """The process was told to end (SIGTERM) and stopped between two batches."""


def start() -> None:
    """Joins the processes of this job, where the environment says that there are several; to be called first of all.

    Either the three variables ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` are set, or JAX
    finds out by itself, as on Cloud TPU, GKE, Slurm and Open MPI. Else there is one process, as there is with
    ``JAX_NUM_PROCESSES=1``.

    Raises:
      InputError: variables that are missing or no numbers, or processes that do not find each other.
    """
    if os.environ.get(COUNT) == "1":
        return
    settings = _settings()
    of_a_cluster = any(name in os.environ for name in CLUSTER_VARIABLES) or "," in os.environ.get(TPU_HOSTS, "")
    if not of_a_cluster and not libtpu.has_tpu():
        return
    import jax

    if jax.distributed.is_initialized():
        return
    # its handler of SIGTERM would stand in the way of ours
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **settings, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=START_SECONDS
        )
    except ValueError as error:
        if settings:
            raise InputError(f"several processes: {error}") from error
        return  # no cluster that JAX knows
    except Exception as error:  # of a cluster's own service as well
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"several processes: they did not find each other ({first}); check that all were started, and that "
            f"{ADDRESS} can be reached from each of them. {COUNT}=1 runs this one alone"
        ) from error
    if count() > 1:
        _explain_abort()


def _settings() -> dict[str, Any]:
    """What the environment says of the processes; nothing where it leaves that to JAX.

    Raises:
      InputError: a variable is missing beside the others, or is no number.
    """
    named = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    if named[COUNT] is None and named[INDEX] is None:
        return {}
    missing = [name for name, value in named.items() if not value]
    if missing:
        given = ", ".join(name for name in named if name not in missing)
        raise InputError(f"{given} set and {', '.join(missing)} not; set all three, on every process")
    numbers = []
    for name in (COUNT, INDEX):
        if not str(named[name]).isdigit():
            raise InputError(f"{name} is {named[name]!r}; expected a whole number")
        numbers.append(int(str(named[name])))
    if numbers[1] >= numbers[0]:
        raise InputError(f"{INDEX} is {numbers[1]} of {numbers[0]} processes; expected 0 to {numbers[0] - 1}")
    return {"coordinator_address": named[ADDRESS], "num_processes": numbers[0], "process_id": numbers[1]}


def count() -> int:
    """How many processes there are."""
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Number of this process, from 0."""
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; where one has died, this one ends (``PEER_ENDED``).

    Args:
      name: of the place, each used once.
    """
    if count() == 1:
        return
    from jax._src import distributed  # the client has no public name; Orbax takes it from here too

    a_week = 7 * 24 * 3600 * 1000
    try:
        distributed.global_state.client.wait_at_barrier(f"jaxmllm/{name}", a_week)  # type: ignore[union-attr]
    except Exception as error:  # whatever it is, the others are not there
        sys.stderr.write(f"{error}\n{_PEER_MESSAGE.decode()}")
        leave(PEER_ENDED)


def leave(code: int) -> NoReturn:
    """Ends this process. One of several does not wait for the others, who would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if count() > 1:
        os._exit(code)
    sys.exit(code)


_told_to_end = threading.Event()


@contextmanager
def ending_on_sigterm(grace: float | int = GRACE_SECONDS) -> Iterator[Callable[[], None]]:
    """In this block SIGTERM ends the process with exit code 0, after the batch in hand or after ``grace`` seconds.

    What is finished is on the disk at any moment, so an end within a batch loses that batch and nothing else. The
    signal is noticed by a thread of its own: Python's handlers wait for the main thread, which may be compiling.

    Yields:
      A function to be called between batches; it raises ``Preempted`` once the signal has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    told = _told_to_end
    told.clear()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        for number in iter(lambda: os.read(reading, 1), b""):
            if number == bytes([signal.SIGTERM]):
                told.set()
                timer = threading.Timer(grace, os._exit, (0,))
                timer.daemon = True
                timer.start()
                timers.append(timer)

    timers: list[threading.Timer] = []
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def check() -> None:
        if told.is_set():
            raise Preempted

    try:
        yield check
    finally:
        signal.set_wakeup_fd(before_fd)
        signal.signal(signal.SIGTERM, before)
        os.close(writing)
        thread.join()
        os.close(reading)
        for timer in timers:
            timer.cancel()


def _explain_abort() -> None:
    """Has the abort by which JAX's distributed service ends a process say what happened, and how to go on.

    The service aborts from a thread of its own as soon as another process is lost. There is no way to be asked first,
    so the signal is met by a C function: Python's own handlers would come too late.
    """

    def on_abort(_: int) -> None:
        if _told_to_end.is_set():
            os._exit(0)  # all processes were told to end, and one of them was quicker
        os.write(2, _PEER_MESSAGE + b"(Or this one crashed: then the lines above say of what.)\n")
        os._exit(PEER_ENDED)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    _kept.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


_kept: list[Any] = []  # C holds no reference
