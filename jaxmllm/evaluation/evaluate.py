"""A model answers the questions of a benchmark; what is answered is on the disk before it is counted."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxmllm.data.benchmarks.base import Row, Skipped
from jaxmllm.data.parquet import write_parquet
from jaxmllm.errors import InputError
from jaxmllm.evaluation.answering import Progress, answer_questions
from jaxmllm.evaluation.request import Opened, Request, open_benchmark
from jaxmllm.evaluation.results import SKIPPED, read_lines, read_results
from jaxmllm.evaluation.run import Run, nobody, open_run
from jaxmllm.evaluation.summary import Summary, summarise
from jaxmllm.files import write_json, write_text
from jaxmllm.model import Model
from jaxmllm.parallel import processes
from jaxmllm.parallel.loading import load_over
from jaxmllm.parallel.mesh import Group, check_mesh
from jaxmllm.parallel.record import note_versions

TABLE = "results.parquet"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A finished run.

    Attributes:
      folder: where it is.
      opened: the benchmark and the settings.
      rows: the answers, in the benchmark's order.
      skipped: what was left out.
      summary: scores.
      answered: questions answered by this call; ``seconds`` what it took.
    """

    folder: Path
    opened: Opened
    rows: list[dict[str, Any]]
    skipped: tuple[Skipped, ...]
    summary: Summary
    answered: int
    seconds: float


def evaluate(
    request: Request,
    folder: str | Path,
    *,
    model: Model | None = None,
    batch_size: int | None = None,
    budget: int | None = None,
    mesh: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_answered: Callable[[Evaluation], None] = lambda evaluation: None,
    meet: Callable[[str], None] = nobody,
) -> Evaluation | None:
    """Asks a model a benchmark's questions, and writes answers, scores and their summary into a folder.

    The folder gets ``run.json`` (settings), ``results.jsonl`` (a line a question, written batch by batch),
    ``skipped.jsonl``, and in the end ``summary.json``, ``results.parquet`` and the benchmark's submission file.
    A folder that holds a part of the same run is gone on with; one that holds all of it is only summed up again.

    What is answered does not depend on the batch size, on the devices or on interruptions: question number i draws its
    random tokens with ``fold_in(key, i)``. Of log-probabilities the last digits depend on the batch size, which a run
    therefore keeps (``cut.json``).

    Several processes (``jaxmllm.parallel.processes``) divide the batches between them, and the first one of them writes
    what they come to.

    Args:
      request: what is asked of whom.
      folder: of the run.
      model: the loaded model, where it is at hand; otherwise ``request.model`` is loaded if anything is left to answer.
      batch_size: questions computed together; by default as many as fit.
      budget: bytes of device memory that may be taken, weights included; by default what the device grants.
      mesh: sizes of the mesh (``data=4,model=2``); by default chosen for the model and the devices.
      on_progress: called after every batch.
      on_answered: called last, while the folder is still locked.
      meet: waits for the other processes, at the place named, and brings the folder up to date.

    Returns:
      The finished run; ``None`` in a process that is not the first.

    Raises:
      JaxmllmError: as ``open_benchmark`` and ``open_run``; a picture or prompt that cannot be used, unless bad data is
        skipped; a disk that takes no more.
    """
    folder, began = Path(folder), time.monotonic()
    if model is not None and str(model.dtype) != request.dtype:
        raise InputError(f"the model computes in {model.dtype}, and dtype is {request.dtype!r}; ask for {model.dtype}")
    check_mesh(mesh)
    opened = open_benchmark(request)
    source, skip_bad, process = opened.source, request.skip_bad, processes.index()
    with open_run(folder, opened.settings, source, skip_bad, process, meet) as run:
        before = len(run.results.present)
        if run.count() < len(source):
            if model is None:
                model, group = load_over(request.model, request.dtype, mesh)
            else:
                group = Group(model.mesh)
            if process == 0:
                sizes = None if model.mesh is None else dict(model.mesh.shape)
                note_versions(folder, mesh=mesh, mesh_of_group=sizes, groups=group.count)
            answer_questions(
                model,
                opened,
                run,
                skip_bad=skip_bad,
                batch_size=batch_size,
                budget=budget,
                on_progress=on_progress,
                group=group,
                meet=meet,
            )
        meet("answered")
        if process > 0:
            meet("reported")
            return None
        run.take_in()
        rows = read_results(folder)
        if not rows:
            raise InputError(f"none of {len(source)} questions could be asked; the first: {_first_problem(run)}")
        skipped = tuple(Skipped(row["where"], row["problem"]) for row in read_lines(folder, SKIPPED))
        summary = summarise(opened.benchmark, rows, len(skipped))
        evaluation = Evaluation(folder, opened, rows, skipped, summary, len(rows) - before, time.monotonic() - began)
        write_evaluation(evaluation)
        on_answered(evaluation)
        meet("reported")
    return evaluation


def _first_problem(run: Run) -> str:
    row = read_lines(run.folder, SKIPPED)[0]
    return f"{row['where']}: {row['problem']}"


def write_evaluation(evaluation: Evaluation) -> None:
    """Writes the summary, the table of questions and the submission file, each whole or not at all.

    Raises:
      InputError: they cannot be written.
    """
    folder, benchmark = evaluation.folder, evaluation.opened.benchmark
    write_json(folder / "summary.json", dataclasses.asdict(evaluation.summary))
    temporary = folder / f".{TABLE}"
    try:
        write_parquet(table_rows(evaluation.rows), temporary)
        temporary.replace(folder / TABLE)
    except OSError as error:
        raise InputError(f"{folder / TABLE}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    if benchmark.submission is not None:
        submission = benchmark.submission(evaluation.rows)
        write_text(folder / submission.filename, submission.text)


def table_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for a table: a column a breakdown, references as JSON."""
    breakdowns = dict.fromkeys(name for row in rows for name in row["categories"])
    return [
        {name: value for name, value in row.items() if name not in ("categories", "answers")}
        | {"answers": json.dumps(row["answers"])}
        | {f"category_{name}": row["categories"].get(name) for name in breakdowns}
        for row in rows
    ]
