"""``jaxmllm evaluate`` and ``jaxmllm compare``: a benchmark's questions answered, and two such runs side by side."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmllm.evaluation import answering
from jaxmllm.evaluation.compare import Changed, Comparison, Difference, compare
from jaxmllm.evaluation.evaluate import TABLE, Evaluation, evaluate
from jaxmllm.evaluation.request import Request
from jaxmllm.evaluation.results import RESULTS, SKIPPED
from jaxmllm.files import write_json
from jaxmllm.parallel import processes
from jaxmllm.parallel.job import Job, running
from jaxmllm.report import tables
from jaxmllm.report.cards import references_text
from jaxmllm.report.evaluation import breakdown_table, interval, summary_table, write_report

# Categories of one breakdown, and skipped records, that the console lists; files have them all.
MOST_CATEGORIES, MOST_SKIPPED = 20, 10


def default_logdir(request: Request) -> Path:
    """Where a run goes whose folder is not named; the same command finds it again."""
    parts = [Path(request.model).resolve().name, request.benchmark, request.split, request.edits, request.method]
    return Path("runs") / "-".join(["evaluate", *(re.sub(r"[^\w.+-]", "_", part) for part in parts if part)])


def evaluate_and_report(
    request: Request,
    logdir: str | Path | None,
    batch_size: int | None,
    budget: float | None,
    examples: int,
    mesh: str | None = None,
) -> None:
    """Runs an evaluation with a progress bar, writes TensorBoard's files and prints the summary.

    Args:
      request: what is asked of whom.
      logdir: folder of the run, a path or a URL; by default one under ``runs``.
      batch_size: questions computed together; by default as many as fit.
      budget: GB of device memory that may be taken; by default what the device grants.
      examples: questions that are drawn with their pictures.
      mesh: sizes of the mesh; by default chosen.

    Raises:
      JaxmllmError: as ``evaluate``.
    """
    processes.start()
    place = default_logdir(request) if logdir is None else logdir
    console = Console(quiet=processes.index() > 0)
    try:
        with running(place) as job:
            evaluation = _evaluate(job, console, request, batch_size, budget, examples, mesh)
    except (KeyboardInterrupt, processes.Preempted) as stop:
        console.print(f"stopped; the answers in {place} are kept, and the same command goes on from there")
        processes.leave(0 if isinstance(stop, processes.Preempted) else processes.INTERRUPTED)
    if evaluation is not None:
        print_evaluation(console, evaluation, str(place))


def _evaluate(
    job: Job,
    console: Console,
    request: Request,
    batch_size: int | None,
    budget: float | None,
    examples: int,
    mesh: str | None,
) -> Evaluation | None:
    """The evaluation with its progress bar."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(f"{request.benchmark}: reading", total=None, speed="")

        def show(progress: answering.Progress) -> None:
            speed = f"{progress.speed:.1f} examples/s"
            bars.update(
                task, description=request.benchmark, completed=progress.done, total=progress.questions, speed=speed
            )
            job.saved()

        def report(evaluation: Evaluation) -> None:
            bars.update(task, description="writing TensorBoard")
            write_report(evaluation, examples)

        return evaluate(
            request,
            job.folder,
            batch_size=batch_size,
            budget=None if budget is None else int(budget * 1e9),
            mesh=mesh,
            on_progress=show,
            on_answered=report,
            meet=job.meet,
        )


def print_evaluation(console: Console, evaluation: Evaluation, place: str) -> None:
    """The summary of a run, and where everything is."""
    benchmark = evaluation.opened.benchmark
    console.print(tables.rich_table(summary_table(evaluation), f"{evaluation.opened.settings.model}"))
    for breakdown, scores in evaluation.summary.categories.items():
        most = dict(list(scores.items())[:MOST_CATEGORIES])
        more = "" if len(most) == len(scores) else f", {len(most)} most frequent of {len(scores)}"
        console.print(tables.rich_table(breakdown_table(breakdown, most), f"By {breakdown}{more}"))
    if evaluation.skipped:
        _say(console, f"{len(evaluation.skipped)} questions were skipped; {place}/{SKIPPED.name} lists them:")
        for record in evaluation.skipped[:MOST_SKIPPED]:
            _say(console, f"  {record.where}: {record.problem}")
    if benchmark.submission is not None:
        _say(console, f"In the official form: {place}/{benchmark.submission(evaluation.rows).filename}")
    if evaluation.answered:
        _say(console, f"{evaluation.answered} questions answered in {evaluation.seconds:.0f} s.")
    else:
        _say(console, "Every question had been answered before.")
    _say(console, f"Answers: {place}/{RESULTS.name}, and as a table {place}/{TABLE}. Look at them with")
    _say(console, f"  tensorboard --logdir {place} --samples_per_plugin images=100")


def compare_and_report(first: Path, second: Path, output: Path | None, questions: int) -> None:
    """Compares two runs and prints what the second gains.

    Args:
      first, second: folders of runs.
      output: a JSON file for the whole comparison, with all questions won and lost.
      questions: how many of them are printed.

    Raises:
      InputError: as ``compare``; or the file cannot be written.
    """
    console = Console()
    comparison = compare(first, second)
    print_comparison(console, comparison, (first, second), questions)
    if output is not None:
        write_json(output, dataclasses.asdict(comparison))
        _say(console, f"Everything, with all questions won and lost: {output}")


def print_comparison(console: Console, comparison: Comparison, folders: tuple[Path, Path], questions: int) -> None:
    """Scores, their difference by category, and the questions won and lost."""
    for name, (one, other) in comparison.settings.items():
        _say(console, f"{name}: {one!r} first, {other!r} second")
    scores = [
        ["", f"{comparison.metric} %", "items"],
        [f"first: {folders[0]}", interval(comparison.first), str(comparison.first.count)],
        [f"second: {folders[1]}", interval(comparison.second), str(comparison.second.count)],
    ]
    console.print(tables.rich_table(scores, f"{comparison.benchmark}, {comparison.questions} questions of both runs"))
    console.print(tables.rich_table(difference_table({"all": comparison.difference}), "Second less first, in points"))
    for breakdown, parts in comparison.categories.items():
        if len(parts) > 1:
            most = dict(list(parts.items())[:MOST_CATEGORIES])
            console.print(tables.rich_table(difference_table(most), f"By {breakdown}"))
    for name, left in (("first", comparison.only_first), ("second", comparison.only_second)):
        if left:
            shown = ", ".join(left[:questions]) + (", ..." if len(left) > questions else "")
            _say(console, f"{len(left)} questions are in the {name} run alone and do not count: {shown}")
    for title, changed in (("won", comparison.won), ("lost", comparison.lost)):
        _say(console, f"{len(changed)} questions {title}{':' if changed and questions else '.'}")
        for one in changed[:questions]:
            _say(console, f"  {_changed_line(one)}")
        if 0 < questions < len(changed):
            _say(console, f"  ... and {len(changed) - questions} more (--questions, --output)")


def difference_table(differences: Mapping[str, Difference]) -> list[list[str]]:
    """Differences by category, header first."""
    header = ["", "difference", "95% interval", "won", "lost", "tied"]
    return [header] + [
        [category, f"{100 * one.value:+.1f}", f"{100 * one.low:+.1f} to {100 * one.high:+.1f}",
         str(one.won), str(one.lost), str(one.tied)]
        for category, one in differences.items()
    ]  # fmt: skip


def _changed_line(one: Changed) -> str:
    before, after = (f"{text!r} ({score:.2f})" for text, score in zip(one.predictions, one.scores, strict=True))
    question = " ".join(one.question.split())
    return f"{one.question_id}: {question} [{references_text(one.references)}]: {before} -> {after}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
