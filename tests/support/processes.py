"""Commands of jaxmllm in processes of their own, alone or several together, each with some devices of the CPU."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

COMMAND = (sys.executable, "-c", "from jaxmllm.cli import main; main()")


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process that has so many devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


class Started:
    """Processes of one job.

    Args:
      arguments: of the command.
      count: how many; one is started without a word of others.
      devices: of each.
    """

    def __init__(self, arguments: Sequence[object], count: int = 1, devices: int = 1):
        self.logs = Path(tempfile.mkdtemp())
        self.processes = []
        address = f"localhost:{free_port()}"
        for index in range(count):
            settings = environment(devices)
            if count > 1:
                settings |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(index),
                }
            with open(self.logs / str(index), "wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*COMMAND, *map(str, arguments)], env=settings, stdout=log, stderr=subprocess.STDOUT
                    )
                )

    def said(self, index: int = 0) -> str:
        """What a process has printed."""
        return (self.logs / str(index)).read_text(errors="replace")

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Exit codes; processes that take longer are killed, and the test fails."""
        ends = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, ends - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(f"{i}: {self.said(i)}" for i in range(len(self.processes)))) from None
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_until(self, holds: Callable[[], bool], seconds: float = 240.0) -> bool:
        """Waits until something holds; whether it did before all processes had ended."""
        ends = time.monotonic() + seconds
        while not holds():
            if all(process.poll() is not None for process in self.processes):
                return holds()
            assert time.monotonic() < ends, self.said()
            time.sleep(0.01)
        return True


def run(arguments: Sequence[object], count: int = 1, devices: int = 1, seconds: float = 300.0) -> Started:
    """Runs a job to its end, which has to be a good one."""
    started = Started(arguments, count, devices)
    codes = started.wait(seconds)
    assert codes == [0] * count, "\n".join(started.said(index) for index in range(count))
    return started
