"""An evaluation in TensorBoard: scores, how they settled, breakdowns with intervals, examples as cards, settings.

All scalars are tags of one run, so that several evaluations under one folder share their charts, one curve each.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tensorboardX import SummaryWriter

from jaxmllm.data.benchmarks.base import Row
from jaxmllm.errors import InputError, JaxmllmError
from jaxmllm.evaluation.evaluate import Evaluation
from jaxmllm.evaluation.summary import Score, Summary, by_category
from jaxmllm.processing import open_image
from jaxmllm.report import tables
from jaxmllm.report.cards import CARD_WIDTH, draw_card, references_text, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "tensorboard"
# Points of a curve over questions.
POINTS = 100
# Categories of a breakdown that have a curve and a bar.
MOST_SHOWN = 40
# Settings that are no column of the page of hparams.
NOT_SHOWN = ("data", "family", "files", "limit", "weights")


def write_report(evaluation: Evaluation, examples: int = 24) -> Path:
    """Writes the TensorBoard files of an evaluation into its folder, in place of those that are there.

    Args:
      evaluation: a finished run.
      examples: questions that are drawn with their pictures, spread over categories and over right and wrong answers.

    Returns:
      The folder of the files.

    Raises:
      InputError: they cannot be written.
    """
    destination = evaluation.folder / FOLDER
    try:
        for left in evaluation.folder.glob(f".{FOLDER}-*"):
            shutil.rmtree(left)
        building = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=evaluation.folder))
        try:
            _write(building, evaluation, examples)
            building.chmod(0o755)  # mkdtemp's own is for its owner alone
            shutil.rmtree(destination, ignore_errors=True)
            building.rename(destination)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{destination}: cannot be written ({error})") from error
    return destination


def _write(folder: Path, evaluation: Evaluation, examples: int) -> None:
    summary, rows = evaluation.summary, evaluation.rows
    with SummaryWriter(str(folder)) as writer:
        _add_scores(writer, evaluation)
        writer.add_text("1_summary", tables.markdown(_clean(summary_table(evaluation))))
        for breakdown, scores in summary.categories.items():
            writer.add_text(
                f"2_by_{tables.plain_name(breakdown)}", tables.markdown(_clean(breakdown_table(breakdown, scores)))
            )
            writer.add_figure(
                f"score_by_category/{tables.plain_name(breakdown)}", category_figure(breakdown, scores, summary)
            )
        shown = [rows[place] for place in pick_rows(rows, examples)]
        writer.add_text("3_examples", tables.markdown(_clean(examples_table(shown))))
        for row in shown:
            _add_card(writer, evaluation, row)
        _add_hparams(writer, evaluation)


def _add_scores(writer: SummaryWriter, evaluation: Evaluation) -> None:
    """All metrics, and the headline's mean over the questions so far, overall and by category."""
    summary, rows = evaluation.summary, evaluation.rows
    for name, value in summary.metrics.items():
        writer.add_scalar(f"metrics/{name}", value, summary.questions)
    if summary.score is None:
        return
    places = {row["question_id"]: place for place, row in enumerate(rows, start=1)}
    units = sorted(evaluation.opened.benchmark.units(rows), key=lambda unit: places[unit.key])
    curves = {f"running_score/{summary.metric}": units}
    for breakdown, parts in by_category(units, rows).items():
        for category, part in list(parts.items())[:MOST_SHOWN]:
            curves[f"running_score_by_{tables.plain_name(breakdown)}/{tables.plain_name(category)}"] = part
    for tag, part in curves.items():
        means = np.cumsum([unit.value for unit in part]) / np.arange(1, len(part) + 1)
        for point in np.unique(np.linspace(0, len(part) - 1, POINTS).astype(int)):
            writer.add_scalar(tag, float(means[point]), places[part[point].key])


def _add_hparams(writer: SummaryWriter, evaluation: Evaluation) -> None:
    summary = evaluation.summary
    settings = {
        name: "none" if value is None else value  # the page knows text and numbers
        for name, value in dataclasses.asdict(evaluation.opened.settings).items()
        if name not in NOT_SHOWN
    }
    settings |= {"model": Path(evaluation.opened.settings.model).name, "questions": summary.questions}
    # The headline goes by a name that runs over unlike benchmarks share; metrics of parts would be too many columns.
    names = {name: "score" if name == summary.metric else name for name in summary.metrics if "/" not in name}
    metrics = {f"hparam/{shown}": summary.metrics[name] for name, shown in names.items()}
    metrics |= {"hparam/mean_log_probability": summary.mean_log_probability, "hparam/stopped": summary.stopped}
    writer.add_hparams(settings, metrics, name="hparams")


def _add_card(writer: SummaryWriter, evaluation: Evaluation, row: Row) -> None:
    try:
        example = evaluation.opened.source[row["index"]]
        picture = open_image(example.image)
    except JaxmllmError:
        return  # it went since the question was answered; the tables still show the row
    category = next(iter(row["categories"].values()), "")
    tag = f"{verdict(row['score'])}/{tables.plain_name(category + ' ' + row['question_id'])}"
    writer.add_image(tag, draw_card(picture, row, example.options), 0, dataformats="HWC")


def pick_rows(rows: Sequence[Row], count: int) -> list[int]:
    """Places of rows to show: one of every category, right and wrong, in turn; at random else.

    The benchmark's first breakdown counts.
    """
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    seen: Counter[tuple[str, str]] = Counter()
    turn = {}
    for place in order:
        kind = (next(iter(rows[place]["categories"].values()), ""), verdict(rows[place]["score"]))
        turn[place] = seen[kind]
        seen[kind] += 1
    return sorted(sorted(order, key=lambda place: turn[place])[:count])


def summary_table(evaluation: Evaluation) -> list[list[str]]:
    """The numbers of a run, header first."""
    summary = evaluation.summary
    rows = [["", summary.benchmark], ["questions", str(summary.questions)], ["skipped", str(summary.skipped)]]
    if summary.score is None:
        rows.append(["score", "none: the split comes without references"])
    else:
        rows.append([f"{summary.metric} %", interval(summary.score)])
        if summary.score.count != summary.questions:
            rows.append(["items scored", str(summary.score.count)])
    rows += [[f"{name} %", tables.percent(value)] for name, value in list(summary.metrics.items())[1:]]
    rows.append(["answers that ended by themselves %", tables.percent(summary.stopped)])
    rows.append(["tokens an answer", f"{summary.mean_tokens:.1f}"])
    rows.append(["log-probability of an answer", f"{summary.mean_log_probability:.2f}"])
    return rows


def interval(score: Score) -> str:
    """A score in percent with its interval."""
    return f"{tables.percent(score.value)}  [{tables.percent(score.low)}, {tables.percent(score.high)}]"


def breakdown_table(breakdown: str, scores: Mapping[str, Score]) -> list[list[str]]:
    """One breakdown, header first."""
    header = [breakdown, "n", "score %", "95% interval"]
    return [header] + [
        [category, str(score.count), tables.percent(score.value),
         f"{tables.percent(score.low)} - {tables.percent(score.high)}"]
        for category, score in scores.items()
    ]  # fmt: skip


def examples_table(rows: Sequence[Row]) -> list[list[str]]:
    """Questions with their answers, header first."""
    header = ["question_id", "category", "question", "answer", "read as", "references", "score"]
    return [header] + [
        [row["question_id"], ", ".join(row["categories"].values()), row["question"], row["prediction"], row["parsed"],
         references_text(row["answers"]), "" if row["score"] is None else f"{row['score']:.2f}"]
        for row in rows
    ]  # fmt: skip


def category_figure(breakdown: str, scores: Mapping[str, Score], summary: Summary) -> Figure:
    """The most frequent categories of a breakdown as bars with their intervals, beside the whole."""
    from matplotlib.figure import Figure

    shown = list(scores.items())[:MOST_SHOWN]
    # as wide as the cards, for TensorBoard shows all pictures equally wide
    figure = Figure(figsize=(CARD_WIDTH / 100, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    values = np.array([[score.value, score.value - score.low, score.high - score.value] for _, score in shown])
    places = np.arange(len(shown))
    axes.barh(places, 100 * values[:, 0], color="tab:blue", alpha=0.7)
    # an interval by percentiles may leave its mean out where items are few
    axes.errorbar(100 * values[:, 0], places, xerr=100 * values[:, 1:].T.clip(0), fmt="none", ecolor="black", capsize=3)
    axes.set_yticks(places, [f"{_short(category)} ({score.count})" for category, score in shown], fontsize=11)
    axes.invert_yaxis()
    if summary.score is not None:
        axes.axvline(100 * summary.score.value, color="grey", linestyle="--", linewidth=1, label="all")
        axes.legend(fontsize=9)
    more = "" if len(shown) == len(scores) else f", {len(shown)} most frequent of {len(scores)}"
    axes.set(xlabel="%, with 95% intervals", xlim=(0, 100))
    figure.suptitle(f"{summary.metric} by {breakdown}{more}")
    return figure


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:21]}..."


def _clean(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells that cannot break a Markdown table."""
    return [[re.sub(r"\s+", " ", cell).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
