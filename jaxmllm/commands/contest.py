"""``jaxmllm demo --methods``: all methods answer the same questions about small objects."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from jaxmllm.commands.study import progress
from jaxmllm.data.parquet import write_parquet
from jaxmllm.data.small_scenes import small_scene_questions
from jaxmllm.evaluation.contest import Contest, outcome_rows, result_rows, run_contest
from jaxmllm.evaluation.contestants import read_lineup
from jaxmllm.files import write_json
from jaxmllm.model import load
from jaxmllm.report import contest as reports
from jaxmllm.report import run_folder, tables

QUESTIONS = 240
WIDEST = 110  # characters of the widest table
EXAMPLES = 9  # questions that are drawn: one of each kind


def contest_and_report(demo: Path, logdir: Path, limit: int | None, seed: int) -> None:
    """Runs the contest of ``methods.toml`` on the embedded model, prints its tables and writes its log folder.

    Args:
      demo: folder of the embedded model and its files.
      logdir: new folder for results.
      limit: how many questions; by default 240, about 30 scenes.
      seed: of the scenes.

    Raises:
      JaxmllmError: as ``run_contest``; or the folder holds something already.
    """
    console, began = Console(), time.monotonic()
    with run_folder.building(logdir) as folder:
        lineup = read_lineup(demo / "methods.toml")
        with console.status("loading the embedded model and drawing scenes"):
            model = load(demo / "model")
            questions = small_scene_questions("test", limit or QUESTIONS, seed)
        drawn = reports.pick_questions(questions, EXAMPLES)
        with progress(console) as bars:
            task = bars.add_task("answers", total=None)
            contest = run_contest(
                model,
                questions,
                lineup.contestants,
                on_progress=lambda done, total, label: bars.update(
                    task, completed=done, total=total, description=label
                ),
                drawn=drawn,
            )
            bars.update(task, description="answers")
            task = bars.add_task("writing TensorBoard", total=len(drawn))
            notes = lineup.tuning_lines()
            settings = {"model": (demo / "model").name, "questions": len(questions), "split": "test", "seed": seed}
            reports.write_contest(folder, contest, settings, notes, lambda: bars.advance(task))
        rows = result_rows(contest)
        write_parquet(rows, folder / "results.parquet")
        write_parquet(outcome_rows(contest), folder / "questions.parquet")
        write_json(folder / "results.json", {"settings": settings, "tuning": notes, "results": rows})
    print_contest(contest, notes)
    console.print(
        f"{len(questions)} questions in {time.monotonic() - began:.0f} s. Look at what each method cropped with\n"
        f"  tensorboard --logdir {logdir} --samples_per_plugin images=100\n"
        f"and at the numbers in {logdir / 'results.parquet'} (also results.json; answers in questions.parquet).",
        highlight=False,
        soft_wrap=True,
    )


def print_contest(contest: Contest, notes: list[str]) -> None:
    """The tables of a contest, and what was tuned."""
    console = Console()
    if console.width < WIDEST:  # a narrow terminal, or none, would cut columns off; lines wrap instead
        console = Console(width=WIDEST)
    base = contest.results[0].contestant.label
    about = f"{len(contest.questions)} questions about {contest.scenes} scenes of the test split"
    for group in contest.groups:
        results = contest.of_group(group)
        title = f"{group}: {about}; gain over {base} in points; seconds and passes a question"
        console.print(tables.rich_table(reports.main_table(results), title))
        console.print(tables.rich_table(reports.kinds_table(results), f"{group}: accuracy % by kind of question"))
    pointing = reports.pointing_table(contest)
    if pointing:
        console.print(tables.rich_table(pointing, f"Pointing game, {contest.pointed} questions with evidence"))
    for line in notes:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
