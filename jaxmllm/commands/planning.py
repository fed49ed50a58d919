"""``jaxmllm plan``: whether a job fits TPUs that are not there, and what it should cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxmllm.convert.checkpoint import read_json
from jaxmllm.errors import CheckpointError, InputError
from jaxmllm.files import write_json
from jaxmllm.memory import gigabytes
from jaxmllm.models.registry import family_of
from jaxmllm.parallel.mesh import parse_mesh
from jaxmllm.planning.chips import parse_topology
from jaxmllm.planning.plan import JobPlan, MeshPlan, plan_job
from jaxmllm.planning.work import Work
from jaxmllm.report.tables import rich_table

WIDEST = 120  # characters of the widest table


def plan_and_report(source: str, topology: str, work: Work, mesh: str | None, output: Path | None) -> None:
    """Plans a job, prints its tables and, if asked, writes all of it as JSON.

    Args:
      source: checkpoint folder, Orbax store, ``config.json`` or name on the hub; only the config is read.
      topology: such as ``v5e:4x4``.
      work: the job.
      mesh: ``data=4,model=4`` to plan one mesh alone.
      output: file for everything.

    Raises:
      JaxmllmError: as ``read_config`` and ``plan_job``.
    """
    # nothing is computed here, and a platform that is asked for but not there must not stop a plan
    jax.config.update("jax_platforms", "cpu")
    parse_topology(topology)
    config = read_config(source)
    console = Console()
    if console.width < WIDEST:  # a narrow terminal, or none, would cut columns off; lines wrap instead
        console = Console(width=WIDEST)
    with console.status("loading the TPU compiler") as status:
        plan = plan_job(
            config,
            work,
            topology,
            None if mesh is None else parse_mesh(mesh),
            lambda name: status.update(f"compiling for mesh {name}"),
        )
    if output is not None:
        write_json(output, as_record(source, plan))
    print_plan(console, source, plan)


def read_config(source: str) -> Any:
    """The config of a model, by its family.

    Args:
      source: checkpoint folder, Orbax store, ``config.json`` or name on the hub.

    Raises:
      ConfigError: a config that is missing or asks for what is not implemented.
      CheckpointError: no such file or folder, or the hub cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists():
        path = _fetch_config(source)
    fields = read_json(path)
    return family_of(fields).read_config(fields)


def _fetch_config(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such file or folder; expected a checkpoint, a config.json or org/name")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub's client and its transport raise many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: no such folder here, and its config.json cannot be fetched from the hub ({first}). "
            "Check the name and the connection, or give the path of a config.json."
        ) from error


def read_size(text: str) -> tuple[int, int]:
    """``640x480`` as width and height.

    Raises:
      InputError: anything else.
    """
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise InputError(f"image is {text!r}; expected width and height in pixels, such as 640x480")
    return int(width), int(height)


def mesh_table(plan: JobPlan) -> list[list[str]]:
    """One row a mesh, header first."""
    memory, time = ("weights", "kept", "working", "peak a chip"), ("questions/s", "at best", "chip-hours")
    rows = [["mesh", "batch", *memory, *time, "exchanged"]]
    for each in plan.meshes:
        if not each.fits:
            over = gigabytes(each.peak - plan.usable)
            rows.append([each.name, "-", gigabytes(each.parameters), "", "", f"{over} too much", *[""] * 4])
            continue
        sizes = (each.parameters, sum(each.kept.values()), each.working, each.peak)
        rows.append(
            [
                each.name + (" *" if each is plan.best and len(plan.meshes) > 1 else ""),
                str(each.rows),
                *map(gigabytes, sizes),
                f"{plan.rate(each):.3g}",
                f"{plan.work.questions / each.least_seconds:.3g}",
                f"{plan.chip_hours(each):.3g}",
                gigabytes(exchanged(each)),
            ]
        )
    return rows


def exchanged(plan: MeshPlan) -> int:
    """Bytes that a chip holds of what is exchanged in a batch, what runs once for all batches left out."""
    return int(sum(cost.runs * each.size for cost in plan.programs if not cost.once for each in cost.collectives))


def program_table(plan: JobPlan, each: MeshPlan) -> list[list[str]]:
    """One row a program of one mesh, header first."""
    chip, _ = parse_topology(plan.topology)
    rows = [["program", "runs", "memory", "of it temporary", "ms a run", "at best", "TFLOP a chip", "compiled in"]]
    for cost in each.programs:
        rows.append(
            [
                cost.name + ("*" if cost.once else ""),
                f"{cost.runs:g}",
                gigabytes(cost.memory),
                gigabytes(cost.temporary),
                f"{1e3 * cost.seconds(chip):.3g}",
                f"{1e3 * cost.least_seconds(chip):.3g}",
                f"{cost.flops / 1e12:.3g}",
                f"{cost.compile_seconds:.1f} s",
            ]
        )
    return rows


def collective_table(each: MeshPlan) -> list[list[str]]:
    """One row a kind of exchange of each program of one mesh, header first."""
    rows = [["program", "exchange", "chips", "a run", "bytes a chip"]]
    for cost in each.programs:
        for collective in cost.collectives:
            rows.append(
                [cost.name, collective.kind, str(collective.group), str(collective.count), gigabytes(collective.size)]
            )
    return rows


def print_plan(console: Console, source: str, plan: JobPlan) -> None:
    """The tables of a plan and what they mean."""
    best, work = plan.best, plan.work
    title = f"{work.job} of {source} ({work.dtype}) on {plan.topology}, {work.questions} questions"
    console.print(rich_table(mesh_table(plan), f"{title}; a program may use {gigabytes(plan.usable)} of a chip"))
    console.print(rich_table(program_table(plan, best), f"Programs of {best.name}; * once in all, the others a batch"))
    if len(collective_table(best)) > 1:
        console.print(rich_table(collective_table(best), "What chips exchange"))
    if best.kept:
        kept = ", ".join(f"{name} {gigabytes(size)}" for name, size in best.kept.items())
        console.print(f"kept between programs: {kept}", highlight=False, soft_wrap=True)
    console.print(
        f"mesh {best.name}: {work.questions} questions in {best.seconds / 3600:.2f} h, {plan.chip_hours(best):.2f} "
        f"chip-hours by the compiler's estimates; {best.least_seconds / 3600:.2f} h at best, by peak and bandwidth. "
        "Estimates, never measured on a TPU.",
        highlight=False,
        soft_wrap=True,
    )


def as_record(source: str, plan: JobPlan) -> dict[str, Any]:
    """A plan as JSON has it, derived figures included; what is infinite is null."""
    meshes = [
        dataclasses.asdict(each)
        | {"mesh": each.name, "fits": each.fits, "working": each.working}
        | {"seconds": each.seconds if each.fits else None}
        | {"least_seconds": each.least_seconds if each.fits else None}
        | {"questions_a_second": plan.rate(each) if each.fits else None}
        | {"chip_hours": plan.chip_hours(each) if each.fits else None}
        for each in plan.meshes
    ]
    return dataclasses.asdict(plan) | {"model": source, "meshes": meshes, "recommended": plan.best.name}
