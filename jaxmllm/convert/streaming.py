"""Writing a store piece by piece: what stops goes on, and nothing counts that was not read back.

Work lies in a folder beside the destination until it is whole::

    .NAME.partial/journal.jsonl   pieces on record (``jaxmllm.convert.journal``); locked while a process works
    .NAME.partial/tree/           Orbax's own files, being made
    .NAME.partial/store/          the store, renamed to NAME at the end

A piece is read, cast and laid out, written, brought to the disk, read back from there, compared, and put on record.
After a kill the pieces on record are read once more, and those that do not have their checksum are made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxmllm.convert import journal, store
from jaxmllm.convert.journal import Journal, Record
from jaxmllm.convert.names import NameTable
from jaxmllm.convert.pieces import WORKERS, Layout, Piece, lay_out
from jaxmllm.convert.weights import Weights, open_weights
from jaxmllm.errors import CheckpointError, InputError, JaxmllmError
from jaxmllm.memory import gigabytes

Item = TypeVar("Item")
Result = TypeVar("Result")
# (bytes done, bytes in all)
Progress = Callable[[int, int], None]

PARTIAL, TREE, STORE = ".{}.partial", "tree", "store"
AHEAD = 2  # pieces a worker that wait for it
BLOCK = 2**20  # bytes that are read back at once
SHOWN_FILES = 6


def crc32(array: np.ndarray, before: int = 0) -> int:
    """The checksum of an array's bytes in C order, or of those that follow others with checksum ``before``."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, before)


def partial_folder(destination: Path) -> Path:
    """Where the unfinished work of a destination lies."""
    return destination.with_name(PARTIAL.format(destination.name))


def write_store(
    source: Path,
    destination: Path,
    table: NameTable,
    skeleton: Mapping[str, Any],
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Writes a checkpoint as a store. A conversion that was stopped, even by a kill, goes on where it was.

    Args:
      source: a Hugging Face folder, or a store.
      destination: a folder that does not exist yet; it appears whole or not at all.
      table: the family's names.
      skeleton: nested dict of leaves with ``shape`` and ``dtype``, the dtype to store.
      on_progress: told of bytes done, and of all bytes, as pieces are finished or found finished.

    Raises:
      CheckpointError: the source is broken, or something reads back unlike it was written.
      InputError: the destination exists or cannot be written, another process writes it, or the work that lies there is
        of another source or other options. Work is kept, for the same call to go on with.
    """
    refuse_existing(destination)
    weights = open_weights(source, table, skeleton)
    layouts = lay_out(table, skeleton)
    partial = partial_folder(destination)
    try:
        settings = _settings(source, weights, layouts)
        with journal.locked(partial, settings) as record:
            refuse_existing(destination)  # by a process that had the lock before
            _refuse_small_disk(partial, record, layouts)
            _write_tree(partial, skeleton)
            _write_pieces(record, weights, layouts, on_progress)
            if _settings(source, weights, layouts) != settings:
                raise CheckpointError(f"{source} changed while it was converted; remove {partial} and convert again")
            _write_rest(source, partial / STORE, record, layouts)
            (partial / STORE).rename(destination)
            _sync(destination.parent)
            shutil.rmtree(partial)
    except JaxmllmError:
        raise
    except (OSError, ValueError) as error:  # Orbax and TensorStore report a full disk as ValueError
        first = str(error).strip().splitlines()[0]
        message = f"{destination}: cannot be written ({first})"
        if _has_journal(partial):
            message += f"; the work so far is kept in {partial}. Make room, and give the same command again to go on"
        raise InputError(message) from error


def refuse_existing(destination: Path) -> None:
    """Raises InputError where a destination exists."""
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination} exists already; name a new folder or remove it")


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[list[Result], None, None]:
    """Results of a function over items by a few threads, as they come; few items are taken ahead."""
    left = iter(items)
    running: set[Future[Result]] = set()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            while True:
                running |= {pool.submit(function, item) for item in islice(left, AHEAD * WORKERS - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield [future.result() for future in done]
        finally:
            for future in running:
                future.cancel()


def _has_journal(partial: Path) -> bool:
    return (partial / journal.JOURNAL).is_file()


def _settings(source: Path, weights: Weights, layouts: list[Layout]) -> dict[str, Any]:
    """What tells this conversion from others: the source's files as they are now, and what is made of them."""

    def state(path: Path) -> str:
        found = path.stat()
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found.st_mtime))
        return f"{found.st_size} bytes of {when}.{found.st_mtime_ns % 10**9:09d} UTC"

    files = (source / "config.json", *weights.files)
    return {
        "format": store.FORMAT,
        "param_dtype": _dtypes(layouts),
        **{f"source {path.relative_to(source)}": state(path) for path in files},
    }


def _dtypes(layouts: list[Layout]) -> list[str]:
    return sorted({layout.dtype.name for layout in layouts})


def _refuse_small_disk(partial: Path, record: Journal, layouts: list[Layout]) -> None:
    left = sum(layout.nbytes for layout in layouts) - sum(done.bytes for done in record.done.values())
    free = shutil.disk_usage(partial).free
    if left > free:
        raise InputError(
            f"{partial}: the store takes {gigabytes(left)} more, and the disk has {gigabytes(free)}; make room, or "
            "name a folder on another disk"
        )


def _write_tree(partial: Path, skeleton: Mapping[str, Any]) -> None:
    """Orbax's own files, made apart and put in place, so that nothing half-made is ever in the store."""
    made, params = partial / TREE, partial / STORE / store.PARAMS
    shutil.rmtree(made, ignore_errors=True)
    store.write_tree(made / store.PARAMS, skeleton)
    params.mkdir(parents=True, exist_ok=True)
    for path in (made / store.PARAMS).iterdir():
        path.replace(params / path.name)
    shutil.rmtree(made)


def _write_pieces(record: Journal, weights: Weights, layouts: list[Layout], on_progress: Progress) -> None:
    params = record.folder / STORE / store.PARAMS
    store.create_arrays(params, layouts)
    total, done = sum(layout.nbytes for layout in layouts), 0

    def finish(job: tuple[Layout, Piece]) -> Record:
        layout, piece = job
        found = record.done.get(piece.file)
        if found is not None and _holds(params, found):
            return found
        return _make(piece, layout, weights, params / piece.file)

    on_progress(0, total)
    jobs = ((layout, piece) for layout in layouts for piece in layout.pieces())
    with contextlib.closing(in_parallel(finish, jobs)) as results:  # workers end before the lock does
        for finished in results:
            new = [made for made in finished if record.done.get(made.file) is not made]
            if new:
                record.append(new)
            done += sum(made.bytes for made in finished)
            on_progress(done, total)


def _holds(params: Path, record: Record) -> bool:
    """Whether a file of the store holds what is on record."""
    checksum, size = 0, 0
    try:
        with (params / record.file).open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                checksum, size = zlib.crc32(block, checksum), size + len(block)
    except FileNotFoundError:
        return False
    return (size, checksum) == (record.bytes, record.crc32)


def _make(piece: Piece, layout: Layout, weights: Weights, path: Path) -> Record:
    """Writes a piece, brings it to the disk and compares what the disk then holds."""
    read = 0

    def seen(part: np.ndarray) -> None:
        nonlocal read
        read = crc32(part, read)

    values = weights.read(piece.leaf, piece.region, layout.dtype, seen)
    if values.shape != layout.chunk:  # at the end of an axis; zarr's files are all of one size
        whole = np.zeros(layout.chunk, layout.dtype)
        whole[tuple(map(slice, values.shape))] = values
        values = whole
    data = values.reshape(-1).view(np.uint8)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:].data)
        os.fsync(descriptor)
        forget(descriptor)
        if not _reads_as(descriptor, data):
            raise CheckpointError(
                f"{path}: reads back unlike it was written; the disk or the memory of this machine is at fault. "
                "Convert again, to another disk if this comes again"
            )
    finally:
        os.close(descriptor)
    return Record(piece.file, piece.nbytes, zlib.crc32(data.data), read)


def _reads_as(descriptor: int, data: np.ndarray) -> bool:
    """Whether a file holds these bytes and no others."""
    block = np.empty(BLOCK, np.uint8)
    at = 0
    while count := os.preadv(descriptor, [block.data], at):
        if not np.array_equal(block[:count], data[at : at + count]):
            return False
        at += count
    return at == len(data)


def forget(descriptor: int) -> None:
    """Drops a file from the page cache: the next read is from the disk, and the cache is left to others."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_rest(source: Path, building: Path, record: Journal, layouts: list[Layout]) -> None:
    """Everything but the params; then all of it is brought to the disk."""
    for name in ("config.json", *store.PROCESSOR_FILES):
        if (source / name).is_file():
            (building / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, building / name)
    records = [record.done[piece.file] for layout in layouts for piece in layout.pieces()]
    (building / store.CHECKSUMS).write_text("".join(finished.line() for finished in records))
    marker = {"format": store.FORMAT, "param_dtype": _dtypes(layouts)}
    (building / store.MARKER).write_text(json.dumps(marker, indent=2) + "\n")
    for path in [*building.rglob("*"), building]:
        if f"{path.parent.name}/{path.name}" not in record.done:  # pieces are on the disk
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_store(folder: Path, on_progress: Progress = lambda done, total: None) -> None:
    """Reads a whole store and compares it with the checksums that were taken when it was written.

    Args:
      folder: the store.
      on_progress: told of bytes done, and of all bytes.

    Raises:
      CheckpointError: the pieces that are missing or changed; or the store has no checksums.
    """
    if store.read_marker(folder) == 1:
        raise CheckpointError(f"{folder}: a store of format 1 holds no checksums; convert the checkpoint again")
    params = folder / store.PARAMS
    try:
        lines = (folder / store.CHECKSUMS).read_text().splitlines()
        records = [journal.read_record(line) for line in lines]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / store.CHECKSUMS}: cannot be read ({error}); convert the checkpoint again"
        ) from None
    total, done = sum(record.bytes for record in records), 0
    folders = sorted({record.file.split("/")[0] for record in records})
    bad = [f"{name}/.zarray" for name in folders if not (params / name / ".zarray").is_file()]
    with contextlib.closing(in_parallel(lambda record: (record, _holds(params, record)), records)) as results:
        for checked in results:
            bad += [record.file for record, same in checked if not same]
            done += sum(record.bytes for record, _ in checked)
            on_progress(done, total)
    if bad:
        shown = "; ".join(sorted(bad)[:SHOWN_FILES])
        raise CheckpointError(
            f"{params}: {len(bad)} of {len(records)} pieces are not as they were written: {shown}. "
            "Convert the checkpoint again"
        )
