"""The command line: thin commands over the library."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmllm.errors import JaxmllmError

if TYPE_CHECKING:
    from jaxmllm.analysis.study import Curves as StudyCurves
    from jaxmllm.analysis.study import PointingTable, Study

app = typer.Typer(
    help="Where does vision meet language? Multimodal LLMs in JAX, for interpretability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO = Path(__file__).parent / "demo"

Logdir = Annotated[Path, typer.Option(help="New folder for TensorBoard's files and the Parquet tables.")]
Curves = Annotated[
    list[str],
    typer.Option(
        "--edits",
        help="What to do at each layer: erase, blind or knockout; add :from, :up_to or an odd window (knockout:9).",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions computed together, at most.")]
Plain = Annotated[bool, typer.Option("--plain", help="Run everything for every layer: slow; the fast way's oracle.")]
Budget = Annotated[
    float | None,
    typer.Option(min=0.0, help="GB of device memory to take, weights included; by default all."),
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder that keeps the erased image's keys for later sweeps of the same model.")
]
CacheLimit = Annotated[float, typer.Option(min=0.0, help="GB the cache may take; what was not used for longest goes.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first so many questions.")]
Dtype = Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")]
Examples = Annotated[int, typer.Option(min=0, help="Questions whose attention is drawn.")]


@app.command()
def demo(
    logdir: Annotated[Path | None, typer.Option(help="New folder for results; by default one under runs/.")] = None,
    limit: Limit = None,
) -> None:
    """Finds the fusion layers of the embedded model on its held-out scenes. Needs no network and no GPU."""
    logdir = logdir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    study_file(
        DEMO / "model", DEMO / "questions" / "questions.jsonl", DEMO / "questions" / "images", logdir, limit=limit
    )


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Orbax store, or org/name on the hub.")],
    questions: Annotated[Path, typer.Option(help="Question file in LLaVA's JSONL form, with an answer field.")],
    images: Annotated[Path, typer.Option(help="Folder of the images it names.")],
    logdir: Logdir,
    edits: Curves = ["erase", "blind", "blind:from", "knockout"],  # noqa: B006  typer copies it
    batch_size: BatchSize = 16,
    limit: Limit = None,
    dtype: Dtype = "float32",
    examples: Examples = 8,
    plain: Plain = False,
    budget: Budget = None,
    cache: Cache = None,
    cache_limit: CacheLimit = 4.0,
) -> None:
    """Hides the image at every layer of a model and reports how the answers suffer."""
    study_file(
        model, questions, images, logdir, edits, batch_size, limit, dtype, examples, plain, budget, cache, cache_limit
    )


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder, or org/name on the hub.")],
    destination: Annotated[Path, typer.Argument(help="New folder for the Orbax store.")],
    param_dtype: Annotated[
        str | None, typer.Option(help="Type of the stored weights; by default the checkpoint's own.")
    ] = None,
) -> None:
    """Converts a Hugging Face checkpoint into an Orbax store."""
    from jaxmllm.model import convert_checkpoint

    convert_checkpoint(source, destination, param_dtype)
    Console().print(f"wrote {destination}")


def study_file(
    model: str | Path,
    questions: Path,
    images: Path,
    logdir: Path,
    edits: list[str] | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    dtype: str = "float32",
    examples: int = 8,
    plain: bool = False,
    budget: float | None = None,
    cache: Path | None = None,
    cache_limit: float = 4.0,
) -> None:
    """Runs a study over a question file, prints its tables and writes its log folder."""
    from jaxmllm.analysis import study as studies
    from jaxmllm.data.questions import read_questions
    from jaxmllm.model import load
    from jaxmllm.report import run_folder, tables, tensorboard

    console, began = Console(), time.monotonic()
    edits = list(edits or studies.DEFAULT_CURVES)
    for name in edits:
        studies.parse_curve(name)
    asked = read_questions(questions, images)[:limit]
    with run_folder.building(logdir) as folder:
        with console.status(f"loading {model}"):
            loaded = load(model, dtype=dtype)
        with progress(console) as bars:
            task = bars.add_task(f"{loaded.num_layers} layers x {', '.join(edits)}", total=len(asked))
            results = studies.run_study(
                loaded,
                asked,
                edits,
                batch_size,
                lambda done: bars.update(task, completed=done),
                plain=plain,
                budget=None if budget is None else int(budget * 1e9),
                cache=cache,
                cache_limit=int(cache_limit * 1e9),
                on_plan=lambda plan: console.print("\n".join(plan.lines()), highlight=False, soft_wrap=True),
            )
            curves, pointing = studies.curves_of(results), studies.pointing_table(results)
            task = bars.add_task("writing TensorBoard", total=min(examples, len(asked)))
            settings = {
                "model": Path(model).name, "questions": len(asked), "edits": ", ".join(edits), "dtype": dtype,
                "layers": loaded.num_layers,
            }  # fmt: skip
            tensorboard.write_study(folder, results, curves, pointing, settings, examples, lambda: bars.advance(task))
        tables.write_parquet(tables.tidy_rows(results, pointing), folder / "results.parquet")
        tables.write_parquet(tables.question_rows(results), folder / "questions.parquet")
    print_study(console, results, curves, pointing)
    console.print(results.cost.line(), highlight=False, soft_wrap=True)
    console.print(
        f"{len(asked)} questions in {time.monotonic() - began:.0f} s. Look at the curves (smoothing 0) and maps with\n"
        f"  tensorboard --logdir {logdir} --samples_per_plugin images=100\n"
        f"and at the numbers in {logdir / 'results.parquet'}."
    )


def print_study(console: Console, results: Study, curves: StudyCurves, pointing: PointingTable | None) -> None:
    """The tables of a study, and the layers its rules name."""
    from jaxmllm.report import tables

    by_layer = tables.accuracy_table(results, curves)
    console.print(tables.rich_table(by_layer, "Accuracy %, image hidden at each layer"))
    console.print(tables.rich_table(tables.log_probability_table(results, curves), "Log-probability of the answer"))
    console.print(tables.rich_table(tables.attention_table(results, curves, pointing), "Attention to the image"))
    if "erase" in curves.accuracy and len(results.categories) > 1:
        console.print(tables.rich_table(tables.category_table(results, "erase"), "Erase: accuracy % by kind and layer"))
    if pointing:
        console.print(
            tables.rich_table(tables.pointing_rows(pointing), f"Pointing game, {pointing.questions} questions")
        )
    if curves.fusion is not None:
        console.print(f"fusion layers (at least 10% of the rise of the erase curve): {curves.fusion or 'none'}")
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


def main() -> None:
    """Entry point: errors that a user can mend become one line and exit code 2."""
    try:
        app()
    except JaxmllmError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        sys.exit(2)
