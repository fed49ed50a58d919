"""Times `jaxmllm convert` against `cp` of the same bytes, and weighs its memory.

    python scripts/bench_convert.py /somewhere/new --quick            # 3 decoder layers, about 2 GB; some minutes
    python scripts/bench_convert.py /somewhere/new --full --rounds 1  # LLaVA-1.5-7B, 14 GB; needs 30 GB of disk

A checkpoint of LLaVA-1.5-7B's shapes is generated in a new folder: bfloat16, shards of a gigabyte with an index; no two
tensors are alike. In each round `cp` and `convert` take turns. Before either, what was written is brought to the disk
and the source is dropped from the page cache, so both read it from the disk. `convert` ends when everything is on the
disk and was read back from there; `cp` ends when the kernel has taken the bytes, so `cp` with a `sync` stands beside
it. Each conversion is a process of its own, whose peak resident size (`ru_maxrss`, pages of mapped files counted) is
reported.

The folder is removed at the end. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxmllm.convert.export import tensors_of_leaves, write_shards
from jaxmllm.convert.pieces import Region, shape_of
from jaxmllm.convert.tables import NAME_TABLES
from jaxmllm.errors import InputError
from jaxmllm.model import make_skeleton, plan_conversion
from jaxmllm.models.registry import family_of

CONFIG = Path(__file__).parents[1] / "tests" / "fixtures" / "llava-1.5-7b-hf" / "config.json"
QUICK_LAYERS = 3
RATIO_TARGET = 0.5  # of cp's throughput
MEMORY_TARGET = 4e9
log = Console(stderr=True)

CONVERT = """
import json, resource, sys, time
from jaxmllm.model import convert_checkpoint
began = time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - began
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": seconds, "peak": 1024 * usage.ru_maxrss, "cpu": usage.ru_utime + usage.ru_stime}))
"""


@dataclasses.dataclass(frozen=True)
class RandomWeights:
    """Stands for weights that are read: a block of random bytes, begun at another place for every part."""

    block: np.ndarray
    files: tuple[Path, ...] = ()

    def dtype(self, leaf: str) -> np.dtype:
        """Bfloat16, of every leaf."""
        return np.dtype(ml_dtypes.bfloat16)

    def read(
        self, leaf: str, region: Region, dtype: np.dtype, seen: Callable[[np.ndarray], None] | None = None
    ) -> np.ndarray:
        """So many random numbers."""
        start = hash((leaf, region)) % 2**20
        return np.resize(self.block[start:], math.prod(shape_of(region))).view(dtype).reshape(shape_of(region))


def generate(folder: Path, layers: int | None) -> int:
    """Writes the checkpoint; gives its bytes."""
    fields = json.loads(CONFIG.read_text())
    fields["torch_dtype"] = "bfloat16"  # as the weights, so that nothing is cast
    if layers is not None:
        fields["text_config"]["num_hidden_layers"] = layers
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    family = family_of(fields)
    config = family.read_config(fields)
    _, skeleton = make_skeleton(family.module, config, "bfloat16", "bfloat16")
    block = np.random.default_rng(0).integers(0, 2**16, 2**25, np.uint16)
    tensors = list(tensors_of_leaves(NAME_TABLES[fields["model_type"]](config), skeleton, RandomWeights(block), None))
    with Progress(console=log) as bars:
        task = bars.add_task("generating")
        write_shards(folder, tensors, lambda done, total: bars.update(task, completed=done, total=total))
    return sum(path.stat().st_size for path in folder.iterdir())


def forget(folder: Path) -> None:
    """Brings all to the disk and drops a folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_copy(source: Path, destination: Path) -> dict[str, float]:
    """Seconds of `cp`, and until its bytes are on the disk."""
    forget(source)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    copied = time.perf_counter() - began
    os.sync()
    synced = time.perf_counter() - began
    shutil.rmtree(destination)
    return {"cp": copied, "cp + sync": synced}


def time_conversion(source: Path, destination: Path) -> dict[str, float]:
    """Seconds of `convert`, without the start of the interpreter; peak bytes; seconds of CPU."""
    forget(source)
    command = [sys.executable, "-c", CONVERT, str(source), str(destination)]
    on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=on_cpu)
    shutil.rmtree(destination)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    folder: Annotated[Path, typer.Argument(help="New folder, on the disk to be measured.")],
    full: Annotated[bool, typer.Option("--full/--quick", help="All of LLaVA-1.5-7B, or three decoder layers.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Runs the benchmark."""
    if folder.exists():
        raise InputError(f"{folder} exists already; name a new folder")
    try:
        size = generate(folder / "source", None if full else QUICK_LAYERS)
        plan = plan_conversion(folder / "source")
        results: list[dict[str, Any]] = []
        for number in range(rounds):
            copy = time_copy(folder / "source", folder / "copy")
            conversion = time_conversion(folder / "source", folder / "store")
            results.append(copy | conversion)
            log.print(f"round {number + 1} of {rounds}: {results[-1]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    median = {name: statistics.median(result[name] for result in results) for name in results[0]}
    ratio = statistics.median(result["cp"] / result["seconds"] for result in results)
    table = Table(title=f"{size / 1e9:.1f} GB, {plan.pieces} pieces; medians of {rounds}")
    for head in ("", "seconds", "GB/s", "peak GB"):
        table.add_column(head, justify="left" if not head else "right")
    for name, key in (("cp", "cp"), ("cp + sync", "cp + sync"), ("convert", "seconds")):
        peak = f"{median['peak'] / 1e9:.2f}" if name == "convert" else ""
        table.add_row(name, f"{median[key]:.1f}", f"{size / median[key] / 1e9:.2f}", peak)
    Console().print(table)
    verdict = {
        "bytes": size,
        "median": median,
        "throughput_of_cp": ratio,
        "ratio_met": ratio >= RATIO_TARGET,
        "memory_met": median["peak"] < MEMORY_TARGET,
        "planned_peak": plan.peak_memory,
    }
    print(json.dumps(verdict))


if __name__ == "__main__":
    typer.run(main)
