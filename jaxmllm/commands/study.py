"""``jaxmllm demo`` and ``jaxmllm sweep``: a masking study of a question file or a benchmark."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmllm.analysis.blocks import Cut
from jaxmllm.analysis.curves import Curves, curves_of
from jaxmllm.analysis.fusion import FUSION_FILE, fusion_record
from jaxmllm.analysis.generated import Judge
from jaxmllm.analysis.running import DEFAULT_CURVES, Prepared, assemble, prepare_study, run_units
from jaxmllm.analysis.study import PointingTable, Study, parse_curve, pointing_table
from jaxmllm.data.benchmarks.base import Skipped
from jaxmllm.data.parquet import write_parquet
from jaxmllm.data.questions import Question, read_questions
from jaxmllm.evaluation.masking import questions_of
from jaxmllm.evaluation.request import Request, open_benchmark
from jaxmllm.evaluation.settings import model_fingerprint
from jaxmllm.files import write_json
from jaxmllm.model import Model, find_checkpoint
from jaxmllm.parallel import processes
from jaxmllm.parallel.job import running
from jaxmllm.parallel.loading import load_over
from jaxmllm.parallel.mesh import check_mesh
from jaxmllm.parallel.unit_run import UnitRun, open_unit_run
from jaxmllm.report import tables, tensorboard

MOST_SKIPPED = 10  # skipped records that the console lists


@dataclasses.dataclass(frozen=True)
class Options:
    """How a study runs.

    Attributes:
      edits: curves (see ``jaxmllm.analysis.study.parse_curve``); by default the usual ones.
      batch_size: questions computed together, at most.
      dtype: what the model computes in.
      examples: questions whose attention is drawn.
      plain: run everything for every layer.
      budget: GB of device memory to take, weights included; ``None`` for all.
      cache: folder that keeps the erased image's keys; ``cache_limit`` the GB it may take.
      mesh: sizes of the mesh; ``None`` to choose them.
    """

    edits: Sequence[str] = DEFAULT_CURVES
    batch_size: int = 16
    dtype: str = "float32"
    examples: int = 8
    plain: bool = False
    budget: float | None = None
    cache: Path | None = None
    cache_limit: float = 4.0
    mesh: str | None = None


# A loaded model -> its questions, what judges generated answers (if any are wanted), and what was skipped.
Ask = Callable[[Model], tuple[list[Question], Judge | None, tuple[Skipped, ...]]]


def study_file(
    model: str | Path,
    questions: Path,
    images: Path,
    logdir: str | Path,
    options: Options,
    limit: int | None = None,
) -> None:
    """Studies a question file, prints its tables and writes its log folder.

    Raises:
      JaxmllmError: as ``read_questions``, ``load`` and ``prepare_study``; or the folder holds something else.
    """
    _check(options)
    asked = read_questions(questions, images)[:limit]
    digest = hashlib.sha256(questions.read_bytes()).hexdigest()[:16]
    settings = {"questions": str(questions), "images": str(images), "files": digest, "asked": len(asked)}
    _study(model, logdir, options, settings, lambda loaded: (asked, None, ()))


def study_benchmark(request: Request, logdir: str | Path, options: Options) -> None:
    """Studies a benchmark's questions; answers are generated under every edit and scored as the benchmark does.

    Raises:
      JaxmllmError: as ``open_benchmark``, ``load`` and ``prepare_study``; or the folder holds something else.
    """
    _check(options)
    opened = open_benchmark(request)

    def ask(loaded: Model) -> tuple[list[Question], Judge | None, tuple[Skipped, ...]]:
        asked = questions_of(
            opened.benchmark,
            opened.source,
            opened.settings.prompt,
            loaded.processor.image_token,
            opened.settings.max_new_tokens,
            request.skip_bad,
        )
        return asked.questions, asked.judge, asked.skipped

    _study(request.model, logdir, options, dataclasses.asdict(opened.settings), ask)


def _check(options: Options) -> None:
    for name in options.edits:
        parse_curve(name)


def _study(model: str | Path, logdir: str | Path, options: Options, asked: Mapping[str, Any], ask: Ask) -> None:
    """Runs a study in its folder; SIGTERM and Ctrl-C end it between two units, and the same command goes on."""
    processes.start()
    check_mesh(options.mesh)
    console = Console(quiet=processes.index() > 0)
    settings = {
        **asked,
        "command": "sweep",
        "model": str(model),
        "weights": model_fingerprint(find_checkpoint(model)),
        "edits": list(dict.fromkeys(options.edits)),
        "dtype": options.dtype,
        "plain": options.plain,
    }
    try:
        with running(logdir) as job, open_unit_run(job, settings) as run:
            _run_study(run, console, model, options, ask)
    except (KeyboardInterrupt, processes.Preempted) as stop:
        console.print(f"stopped; what is finished is in {logdir}, and the same command goes on from there")
        processes.leave(0 if isinstance(stop, processes.Preempted) else processes.INTERRUPTED)


def _run_study(run: UnitRun, console: Console, model: str | Path, options: Options, ask: Ask) -> None:
    began, job = time.monotonic(), run.job
    with console.status(f"loading {model}"):
        loaded, group = load_over(model, options.dtype, options.mesh)
        questions, judge, skipped = ask(loaded)
    for record in skipped[:MOST_SKIPPED]:
        console.print(f"skipped {record.where}: {record.problem}", highlight=False, soft_wrap=True, markup=False)
    if len(skipped) > MOST_SKIPPED:
        console.print(f"skipped {len(skipped)} questions in all")

    def prepare(record: Mapping[str, Any] | None) -> Prepared:
        return prepare_study(
            loaded,
            questions,
            options.edits,
            options.batch_size,
            plain=options.plain,
            budget=None if options.budget is None else int(options.budget * 1e9),
            judge=judge,
            cut=None if record is None else Cut.read(record),
        )

    study = prepare(run.read_cut())
    sizes = None if loaded.mesh is None else dict(loaded.mesh.shape)
    settled = run.settle_cut(dataclasses.asdict(study.setup.cut), mesh=sizes, groups=group.count)
    if Cut.read(settled) != study.setup.cut:
        study = prepare(settled)
    if study.setup.plan is not None:
        console.print("\n".join(study.setup.plan.lines()), highlight=False, soft_wrap=True)
    units = range(group.index, len(study.setup.units), group.count)
    with progress(console) as bars:
        own = sum(len(study.setup.units[unit]) for unit in units)
        task = bars.add_task(f"{loaded.num_layers} layers x {', '.join(options.edits)}", total=own)
        answers = None if judge is None else bars.add_task("generated answers", total=own * len(study.branches))
        cost = run_units(
            study,
            run.parts,
            units,
            cache=options.cache,
            cache_limit=int(options.cache_limit * 1e9),
            on_progress=lambda done: bars.update(task, completed=done),
            on_answers=lambda known: None if answers is None else bars.update(answers, completed=known),
            writes=group.leader,
        )
        job.meet("computed")
        if job.is_first:
            results = assemble(study, run.parts, cost)
            curves, pointing = curves_of(results), pointing_table(results)
            task = bars.add_task("writing TensorBoard", total=min(options.examples, len(questions)))
            run.finish(
                lambda folder: write_report(
                    folder, model, options, results, curves, pointing, lambda: bars.advance(task)
                )
            )
        job.meet("reported")
    if not job.is_first:
        return
    print_study(console, results, curves, pointing)
    console.print(results.cost.line(), highlight=False, soft_wrap=True)
    console.print(
        f"{len(questions)} questions in {time.monotonic() - began:.0f} s. "
        "Look at the curves (smoothing 0) and maps with\n"
        f"  tensorboard --logdir {job.place} --samples_per_plugin images=100\n"
        f"and at the numbers in {job.place}/results.parquet."
    )


def write_report(
    folder: Path,
    model: str | Path,
    options: Options,
    results: Study,
    curves: Curves,
    pointing: PointingTable | None,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Writes everything that a finished study is looked at by: TensorBoard's files and the tables.

    Args:
      folder: an existing folder.
      model: as it was named.
      options: how the study ran.
      results: per-question results; ``curves`` and ``pointing`` what follows from them.
      on_progress: called after each question that is drawn.
    """
    settings = {
        "model": Path(model).name, "questions": len(results.questions), "edits": ", ".join(options.edits),
        "dtype": options.dtype, "layers": results.num_layers,
    }  # fmt: skip
    tensorboard.write_study(folder, results, curves, pointing, settings, options.examples, on_progress)
    write_parquet(tables.tidy_rows(results, pointing), folder / "results.parquet")
    write_parquet(tables.question_rows(results), folder / "questions.parquet")
    if curves.fusion is not None:
        found = fusion_record(curves.accuracy["erase"], curves.clean_accuracy)
        write_json(folder / FUSION_FILE, found | {"model": str(model), "questions": len(results.questions)})
    if results.generated is not None:
        write_parquet(tables.answer_rows(results), folder / "answers.parquet")


def print_study(console: Console, results: Study, curves: Curves, pointing: PointingTable | None) -> None:
    """The tables of a study, and the layers its rules name."""
    by_layer = tables.accuracy_table(results, curves)
    console.print(tables.rich_table(by_layer, "Accuracy %, image hidden at each layer"))
    if results.generated is not None:
        title = f"Generated answers, {results.generated.metric} %"
        console.print(tables.rich_table(tables.generated_table(results, curves), title))
        console.print(
            f"{results.generated.tried} of these answers were found by trying known ones, "
            f"{results.generated.generated} were generated"
        )
    console.print(tables.rich_table(tables.log_probability_table(results, curves), "Log-probability of the answer"))
    console.print(tables.rich_table(tables.attention_table(results, curves, pointing), "Attention to the image"))
    if "erase" in curves.accuracy and len(results.categories) > 1:
        console.print(tables.rich_table(tables.category_table(results, "erase"), "Erase: accuracy % by kind and layer"))
    if pointing:
        console.print(
            tables.rich_table(tables.pointing_rows(pointing), f"Pointing game, {pointing.questions} questions")
        )
    if curves.fusion is not None:
        console.print(
            f"fusion layers (at least 10% of the rise of the erase curve): {curves.fusion or 'none'}; "
            f"{FUSION_FILE} holds them for `jaxmllm evaluate --method contrastive --fusion-layers`"
        )
    if curves.review is not None or "blind" in curves.accuracy:
        named = "none" if curves.review is None else str(curves.review)
        console.print(f"review layer (blinding a late layer costs 1 point or more, and more than before): {named}")


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """Progress bars with counts and times."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        yield bars
