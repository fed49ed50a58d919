"""Times sweeps and forward passes on more and more devices and processes, all on the same cores.

    python scripts/bench_scaling.py                       # about ten minutes on two idle cores
    python scripts/bench_scaling.py --rounds 3 --devices 1,2 --processes 1,2
    python scripts/bench_scaling.py --plan config.json    # estimates for TPU slices instead (libtpu, no TPU)

Devices of the CPU are slices of the same cores, so more of them cannot be faster; what is measured is what dividing the
work costs. *Efficiency* is the throughput on so many devices or processes over that of one device on the same cores: 1
is no cost at all. *Strong*: always the same questions. *Weak*: as many questions for each device.

Every configuration is a fresh set of processes; all compile and warm up, meet, and are timed from that meeting until
the last of them is done. Configurations take turns, round by round; medians are reported. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.table import Table

import jaxmllm
from jaxmllm.analysis.running import InMemory, prepare_study, run_units
from jaxmllm.convert.checkpoint import read_json
from jaxmllm.data.questions import read_questions
from jaxmllm.model import make_skeleton
from jaxmllm.models.registry import family_of
from jaxmllm.parallel import processes
from jaxmllm.parallel.loading import load_over
from jaxmllm.parallel.mesh import choose_mesh
from jaxmllm.planning.chips import CHIPS
from jaxmllm.planning.plan import plan_job
from jaxmllm.planning.work import Work

DEMO = Path(jaxmllm.__file__).parent / "demo"
QUESTIONS = 128  # strong scaling, and weak scaling on one device
ROWS = 8  # questions that a device computes together
JOBS = ("sweep", "forward")
SLICES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
CHIPS_A_HOST = 4  # of v5e slices of several hosts


@dataclasses.dataclass(frozen=True)
class Setting:
    """So many processes with so many devices each, that answer so many questions."""

    processes: int
    devices: int
    questions: int

    @property
    def total(self) -> int:
        return self.processes * self.devices


def work(job: str, questions: int) -> None:
    """One of the processes: prints the seconds of the slowest of three timed passes' median, if it is the first."""
    processes.start()
    model, group = load_over(DEMO / "model")
    known = read_questions(DEMO / "questions" / "questions.jsonl", DEMO / "questions" / "images")
    asked = [known[number % len(known)] for number in range(questions)]
    if job == "sweep":
        # questions that are asked again need names of their own
        asked = [dataclasses.replace(one, question_id=str(number)) for number, one in enumerate(asked)]
        study = prepare_study(model, asked, ["erase"], ROWS)
        units = range(group.index, len(study.setup.units), group.count)

        def once() -> None:
            run_units(study, InMemory(), units)
    else:
        own = asked[group.index :: group.count]
        rows = ROWS * group.data
        batches = [own[start : start + rows] for start in range(0, len(own), rows)]
        batches = [batch for batch in batches if len(batch) == rows] or [[*own, *own * rows][:rows]]
        inputs = [model.prepare([one.image for one in batch], [one.text for one in batch]) for batch in batches]

        def once() -> None:
            for batch in inputs:
                model.forward(model.params, batch, logits_at="last").logits.block_until_ready()

    once()
    seconds = []
    for number in range(3):
        processes.wait_for_all(f"begin {number}")
        began = time.monotonic()
        once()
        processes.wait_for_all(f"end {number}")
        seconds.append(time.monotonic() - began)
    if processes.index() == 0:
        print(json.dumps({"seconds": statistics.median(seconds)}), flush=True)


def measure(job: str, setting: Setting) -> float:
    """Seconds of one setting."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        address = f"localhost:{listening.getsockname()[1]}"
    started = []
    for index in range(setting.processes):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={setting.devices}",
        }
        if setting.processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(setting.processes),
                "JAX_PROCESS_ID": str(index),
            }
        command = [sys.executable, __file__, "--worker", f"{job}:{setting.questions}"]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(b"\n".join(error for _, error in outputs).decode())
    lines = [line for line in outputs[0][0].decode().splitlines() if line.startswith("{")]
    return json.loads(lines[-1])["seconds"]


def settings(devices: list[int], many: list[int]) -> dict[str, list[Setting]]:
    """What is measured: devices of one process, then processes of one device each."""
    totals = [(1, size) for size in devices] + [(count, 1) for count in many if count > 1]
    return {
        "strong": [Setting(count, size, QUESTIONS) for count, size in totals],
        "weak": [Setting(count, size, QUESTIONS * count * size) for count, size in totals],
    }


def main(
    devices: Annotated[str, typer.Option(help="Devices of one process.")] = "1,2,4,8",
    many: Annotated[str, typer.Option("--processes", help="Processes with one device each.")] = "1,2,4",
    rounds: Annotated[int, typer.Option(min=1, help="How often each setting is measured.")] = 3,
    plan: Annotated[Path | None, typer.Option(help="A config.json to plan for TPU slices instead.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures, and prints a table and a line of JSON."""
    if worker is not None:
        job, questions = worker.split(":")
        work(job, int(questions))
        return
    if plan is not None:
        plan_slices(plan)
        return
    asked = settings([int(size) for size in devices.split(",")], [int(count) for count in many.split(",")])
    seconds: dict[tuple[str, str, Setting], list[float]] = {}
    for _ in range(rounds):
        for job in JOBS:
            for kind, wanted in asked.items():
                for setting in wanted:
                    seconds.setdefault((job, kind, setting), []).append(measure(job, setting))
    rows = report({key: statistics.median(found) for key, found in seconds.items()})
    print(json.dumps({"cores": len(os.sched_getaffinity(0)), "rounds": rounds, "jax": jax.__version__, "rows": rows}))


def report(medians: dict[tuple[str, str, Setting], float]) -> list[dict[str, object]]:
    """Prints efficiencies, and gives them as rows."""
    rows: list[dict[str, object]] = []
    for job in JOBS:
        table = Table(title=f"{job}: efficiency on the same cores (1 = dividing costs nothing)")
        for column in ("processes x devices", "strong", "weak"):
            table.add_column(column, justify="right")
        of_job = {(kind, setting): value for (name, kind, setting), value in medians.items() if name == job}
        base = next(s.questions / value for (_, s), value in of_job.items() if s.total == 1)
        totals = dict.fromkeys((setting.processes, setting.devices) for _, setting in of_job)
        for count, size in totals:
            found = {
                kind: setting.questions / value / base
                for (kind, setting), value in of_job.items()
                if (setting.processes, setting.devices) == (count, size)
            }
            table.add_row(f"{count} x {size}", f"{found['strong']:.2f}", f"{found['weak']:.2f}")
            rows.append({"job": job, "processes": count, "devices": size, **found})
        Console().print(table)
    return rows


def plan_slices(config: Path) -> None:
    """Questions a second and efficiency on v5e slices, by the planner's estimates.

    The mesh is the one that a run would choose by itself.
    """
    fields = read_json(config)
    read = family_of(fields).read_config(fields)
    table = Table(title=f"{config}: estimated sweep of GQA (12,578 questions, all layers)")
    for column in ("slice", "mesh", "hosts", "questions/s", "a chip", "efficiency"):
        table.add_column(column, justify="right")
    rows: list[dict[str, object]] = []
    _, skeleton = make_skeleton(family_of(fields).module, read, "bfloat16", "bfloat16")
    for name in SLICES:
        chips = math.prod(map(int, name.partition(":")[2].split("x")))
        mesh = choose_mesh(skeleton, read, chips, CHIPS["v5e"].memory)
        plan = plan_job(read, Work("sweep", rows=8), name, mesh)
        rate = plan.rate(plan.best)
        rows.append({"slice": name, "mesh": plan.best.name, "questions_a_second": rate, "a_chip": rate / chips})
        efficiency = rate / chips / float(str(rows[0]["a_chip"]))
        hosts = max(1, chips // CHIPS_A_HOST)
        table.add_row(name, plan.best.name, str(hosts), f"{rate:.1f}", f"{rate / chips:.2f}", f"{efficiency:.2f}")
    Console().print(table)
    print(json.dumps({"config": str(config), "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
