"""``jaxmllm demo`` and ``jaxmllm sweep``: a masking study of a question file or a benchmark."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmllm.analysis import study as studies
from jaxmllm.analysis.curves import Curves
from jaxmllm.analysis.fusion import FUSION_FILE, fusion_record
from jaxmllm.analysis.generated import Judge
from jaxmllm.analysis.study import PointingTable, Study
from jaxmllm.data.benchmarks.base import Skipped
from jaxmllm.data.parquet import write_parquet
from jaxmllm.data.questions import Question, read_questions
from jaxmllm.evaluation.masking import questions_of
from jaxmllm.evaluation.request import Request, open_benchmark
from jaxmllm.evaluation.settings import write_json
from jaxmllm.model import Model, load
from jaxmllm.report import run_folder, tables, tensorboard

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
    """

    edits: Sequence[str] = studies.DEFAULT_CURVES
    batch_size: int = 16
    dtype: str = "float32"
    examples: int = 8
    plain: bool = False
    budget: float | None = None
    cache: Path | None = None
    cache_limit: float = 4.0


# A loaded model -> its questions, what judges generated answers (if any are wanted), and what was skipped.
Ask = Callable[[Model], tuple[list[Question], Judge | None, tuple[Skipped, ...]]]


def study_file(
    model: str | Path, questions: Path, images: Path, logdir: Path, options: Options, limit: int | None = None
) -> None:
    """Studies a question file, prints its tables and writes its log folder.

    Raises:
      JaxmllmError: as ``read_questions``, ``load`` and ``run_study``; or the folder holds something already.
    """
    _check(options)
    asked = read_questions(questions, images)[:limit]
    _study(model, logdir, options, lambda loaded: (asked, None, ()))


def study_benchmark(request: Request, logdir: Path, options: Options) -> None:
    """Studies a benchmark's questions; answers are generated under every edit and scored as the benchmark does.

    Raises:
      JaxmllmError: as ``open_benchmark``, ``load`` and ``run_study``; or the folder holds something already.
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

    _study(request.model, logdir, options, ask)


def _check(options: Options) -> None:
    for name in options.edits:
        studies.parse_curve(name)


def _study(model: str | Path, logdir: Path, options: Options, ask: Ask) -> None:
    console, began = Console(), time.monotonic()
    with run_folder.building(logdir) as folder:
        with console.status(f"loading {model}"):
            loaded = load(model, dtype=options.dtype)
            asked, judge, skipped = ask(loaded)
        for record in skipped[:MOST_SKIPPED]:
            console.print(f"skipped {record.where}: {record.problem}", highlight=False, soft_wrap=True, markup=False)
        if len(skipped) > MOST_SKIPPED:
            console.print(f"skipped {len(skipped)} questions in all")
        with progress(console) as bars:
            task = bars.add_task(f"{loaded.num_layers} layers x {', '.join(options.edits)}", total=len(asked))
            answers = None
            if judge is not None:
                many = len(dict.fromkeys(options.edits)) * loaded.num_layers * len(asked)
                answers = bars.add_task("generated answers", total=many)
            results = studies.run_study(
                loaded,
                asked,
                options.edits,
                options.batch_size,
                lambda done: bars.update(task, completed=done),
                plain=options.plain,
                budget=None if options.budget is None else int(options.budget * 1e9),
                cache=options.cache,
                cache_limit=int(options.cache_limit * 1e9),
                on_plan=lambda plan: console.print("\n".join(plan.lines()), highlight=False, soft_wrap=True),
                judge=judge,
                on_answers=lambda known: None if answers is None else bars.update(answers, completed=known),
            )
            curves, pointing = studies.curves_of(results), studies.pointing_table(results)
            task = bars.add_task("writing TensorBoard", total=min(options.examples, len(asked)))
            settings = {
                "model": Path(model).name, "questions": len(asked), "edits": ", ".join(options.edits),
                "dtype": options.dtype, "layers": loaded.num_layers,
            }  # fmt: skip
            tensorboard.write_study(
                folder, results, curves, pointing, settings, options.examples, lambda: bars.advance(task)
            )
        write_parquet(tables.tidy_rows(results, pointing), folder / "results.parquet")
        write_parquet(tables.question_rows(results), folder / "questions.parquet")
        if curves.fusion is not None:
            found = fusion_record(curves.accuracy["erase"], curves.clean_accuracy)
            write_json(folder / FUSION_FILE, found | {"model": str(model), "questions": len(asked)})
        if results.generated is not None:
            write_parquet(tables.answer_rows(results), folder / "answers.parquet")
    print_study(console, results, curves, pointing)
    console.print(results.cost.line(), highlight=False, soft_wrap=True)
    console.print(
        f"{len(asked)} questions in {time.monotonic() - began:.0f} s. Look at the curves (smoothing 0) and maps with\n"
        f"  tensorboard --logdir {logdir} --samples_per_plugin images=100\n"
        f"and at the numbers in {logdir / 'results.parquet'}."
    )


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
