"""``jaxmllm convert``, ``export`` and ``verify``: weights from one form into the other."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxmllm.convert.streaming import Progress as OnProgress
from jaxmllm.convert.streaming import partial_folder, verify_store
from jaxmllm.memory import gigabytes
from jaxmllm.model import convert_checkpoint, export_checkpoint, plan_conversion
from jaxmllm.parallel import processes


def convert_and_report(source: str, destination: Path, param_dtype: str | None) -> None:
    """Converts a checkpoint into a store, and says what it will take and how far it is.

    Raises:
      JaxmllmError: as ``convert_checkpoint``.
    """
    console = Console()
    plan = plan_conversion(source, param_dtype)
    console.print(
        f"{gigabytes(plan.bytes)} in {plan.pieces:,} pieces of up to {gigabytes(plan.largest_piece)}; "
        f"about {gigabytes(plan.peak_memory)} of memory",
        highlight=False,
    )
    unfinished = partial_folder(destination)
    if unfinished.exists():
        console.print(f"going on with {unfinished}", highlight=False, soft_wrap=True)
    began = time.monotonic()
    try:
        with _bar(console, "converting") as on_progress:
            convert_checkpoint(source, destination, param_dtype, on_progress)
    except KeyboardInterrupt:
        kept = f"the work so far is kept in {unfinished}; the same command goes on" if unfinished.exists() else ""
        Console(stderr=True, soft_wrap=True).print(f"stopped; {kept or 'nothing was written'}", highlight=False)
        sys.exit(processes.INTERRUPTED)
    _wrote(console, destination, plan.bytes, began)


def export_and_report(source: str, destination: Path, dtype: str | None) -> None:
    """Exports weights as a Hugging Face folder, and says what the folder lacks.

    Raises:
      JaxmllmError: as ``export_checkpoint``.
    """
    console = Console()
    began = time.monotonic()
    with _bar(console, "exporting") as on_progress:
        lacks = export_checkpoint(source, destination, dtype, on_progress)
    size = sum(path.stat().st_size for path in destination.glob("*.safetensors"))
    _wrote(console, destination, size, began)
    if lacks:
        console.print(
            "A store holds what the model computes with. If its checkpoint had more, this folder lacks it, and "
            "transformers will say that it made up tensors; none of them changes a logit:",
            highlight=False,
            soft_wrap=True,
        )
        for reason in lacks:
            console.print(f"  {reason}", highlight=False, markup=False, soft_wrap=True)


def verify_and_report(folder: Path) -> None:
    """Compares a store with its checksums.

    Raises:
      JaxmllmError: as ``verify_store``.
    """
    console = Console()
    with _bar(console, "verifying") as on_progress:
        verify_store(folder, on_progress)
    console.print(f"{folder}: every piece is as it was written", highlight=False, soft_wrap=True)


def _wrote(console: Console, destination: Path, size: int, began: float) -> None:
    spent = time.monotonic() - began
    rate = f"{size / spent / 1e6:.0f} MB/s"
    console.print(f"wrote {destination} ({gigabytes(size)} in {spent:.0f} s, {rate})", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _bar(console: Console, label: str) -> Iterator[OnProgress]:
    """A bar in bytes, and the function that moves it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
