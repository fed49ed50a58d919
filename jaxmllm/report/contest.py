"""A contest of methods as tables and in TensorBoard: a method is a run, so that all share their charts, and the page of
hparams is the table of methods, to be sorted by what one likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from jaxmllm.data.questions import Question
from jaxmllm.evaluation.contest import Contest, Result
from jaxmllm.processing import open_image
from jaxmllm.report import tables
from jaxmllm.report.sheets import draw_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Points of a curve over questions.
POINTS = 100


def write_contest(
    logdir: Path,
    contest: Contest,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Writes a contest.

    Args:
      logdir: an existing folder.
      contest: its results; questions whose maps and crops were kept are drawn.
      settings: what the hparams page shows beside the methods (text, numbers, truth values).
      notes: paragraphs for the page of texts: what was tuned.
      on_progress: called after each picture.
    """
    for result in contest.results:
        with SummaryWriter(str(logdir / tables.plain_name(result.contestant.label))) as writer:
            _add_result(writer, contest, result, settings)
    with SummaryWriter(str(logdir / "summary")) as writer:
        writer.add_figure("summary", contest_figure(contest))
        for group in contest.groups:
            results = contest.of_group(group)
            joined = [[*one, *other[1:]] for one, other in zip(main_table(results), kinds_table(results), strict=True)]
            writer.add_text(f"1_{tables.plain_name(group)}", tables.markdown(joined))
        if pointing_table(contest):
            writer.add_text("2_pointing_game", tables.markdown(pointing_table(contest)))
        if notes:
            writer.add_text("3_tuning", "\n\n".join(notes))
        for place in sorted({place for result in contest.results for place in result.run.shown}):
            question = contest.questions[place]
            tag = tables.plain_name(f"{question.category}_question_{question.question_id}")
            entries = [
                (result.contestant.label, result.run.outcomes[place], result.run.shown[place])
                for result in distinct(contest.results)
            ]
            sheet = draw_sheet(open_image(question.image), question, entries)
            writer.add_image(f"looked_at/{tag}", sheet, 0, dataformats="HWC")
            on_progress()


def distinct(results: Sequence[Result]) -> list[Result]:
    """The results without those of contestants that do what an earlier one does."""
    first = {result.contestant.spec: result for result in reversed(results)}
    return [result for result in results if first[result.contestant.spec] is result]


def _add_result(writer: SummaryWriter, contest: Contest, result: Result, settings: Mapping[str, Any]) -> None:
    """One method: its numbers, its accuracy over the questions so far, and its line of the hparams page."""
    metrics = numbers_of(result)
    for name, value in metrics.items():
        writer.add_scalar(f"metrics/{name}", value, len(contest.questions))
    for kind, score in result.kinds.items():
        writer.add_scalar(f"accuracy_by_kind/{tables.plain_name(kind)}", score.value, len(contest.questions))
    correct = np.array([outcome.correct for outcome in result.run.outcomes], float)
    means = np.cumsum(correct) / np.arange(1, len(correct) + 1)
    for point in np.unique(np.linspace(0, len(correct) - 1, POINTS).astype(int)):
        writer.add_scalar("running_accuracy", float(means[point]), int(point) + 1)
    contestant = result.contestant
    about = {"label": contestant.label, "group": contestant.group, "method": contestant.spec, **settings}
    # Into the method's own run, not one beside it as add_hparams does: TensorBoard shows nothing by default where there
    # are more than 40 runs.
    named = {f"hparam/{name}": value for name, value in metrics.items()}
    for part in hparams(about, named):
        writer.file_writer.add_summary(part)
    for name, value in named.items():
        writer.add_scalar(name, value)


def numbers_of(result: Result) -> dict[str, float]:
    """The numbers that a contestant has, by name."""
    count = result.run.count
    found = {
        "accuracy": result.accuracy.value,
        "gain": None if result.gain is None else result.gain.value,
        "gain_low": None if result.gain is None else result.gain.low,
        "gain_high": None if result.gain is None else result.gain.high,
        "seconds_a_question": result.run.seconds,
        "passes_over_prompts": count.prompts,
        "passes_backward": count.backward,
        "passes_over_tokens": count.tokens,
        "pointing_hits": result.hits,
        "mass_on_evidence": result.mass,
        "evidence_in_crop": result.inside,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def main_table(results: Sequence[Result]) -> list[list[str]]:
    """Accuracy in percent, what is gained over the first method in points with the 95% paired interval, questions won
    and lost, and what a question costs; header first."""
    rows = [["method", "accuracy %", "gain", "95% interval", "won", "lost", "s", "prompts", "back", "tokens"]]
    for result in results:
        gain, run = result.gain, result.run
        gained = ["", "", "", ""]
        if gain is not None:
            interval = f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
            gained = [f"{100 * gain.value:+.1f}", interval, str(gain.won), str(gain.lost)]
        cost = ["-" if run.seconds is None else f"{run.seconds:.3f}"]
        cost += [f"{value:.3g}" for value in (run.count.prompts, run.count.backward, run.count.tokens)]
        rows.append([result.contestant.label, tables.percent(result.accuracy.value), *gained, *cost])
    return rows


def kinds_table(results: Sequence[Result]) -> list[list[str]]:
    """Accuracy in percent by kind of question, header first, with the numbers of questions below it."""
    kinds = list(results[0].kinds)
    rows = [["method", *kinds]]
    for result in results:
        rows.append([result.contestant.label, *(tables.percent(result.kinds[kind].value) for kind in kinds)])
    return rows


def pointing_table(contest: Contest) -> list[list[str]]:
    """Where maps point and what crops hold, header first, then the chances; empty where nobody has a map or a crop."""
    found = [result for result in distinct(contest.results) if result.hits is not None or result.inside is not None]
    if not found:
        return []
    rows = [["method", "hit %", "mass on evidence %", "evidence in the crop %"]]
    for result in found:
        values = (result.hits, result.mass, result.inside)
        rows.append([result.contestant.label, *("" if one is None else tables.percent(one) for one in values)])
    rows.append(["chance: random object", tables.percent(contest.object_chance), "", ""])
    return [*rows, ["chance: random patch", *[tables.percent(contest.patch_chance)] * 2, ""]]


def contest_figure(contest: Contest) -> Figure:
    """Accuracy of every method with the paired interval of its gain, and beside it the seconds a question takes."""
    from matplotlib.figure import Figure

    results = distinct(contest.results)
    base = results[0].accuracy.value
    places = np.arange(len(results))
    figure = Figure(figsize=(13, 1.5 + 0.32 * len(results)), layout="constrained")
    bars, costs = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    bars.barh(places, [100 * result.accuracy.value for result in results], color="tab:blue", alpha=0.6)
    bars.axvline(100 * base, color="grey", linestyle="--", linewidth=1)
    for place, result in zip(places, results, strict=True):
        if result.gain is not None:
            value, low, high = result.gain.value, result.gain.low, result.gain.high
            # an interval by percentiles may leave its mean out where scenes are few
            reach = np.maximum([[value - low], [high - value]], 0.0)
            bars.errorbar(100 * (base + value), place, xerr=100 * reach, fmt="none", ecolor="black", capsize=3)
    bars.set_yticks(places, [result.contestant.label for result in results])
    bars.invert_yaxis()
    bars.set(
        title=f"{len(contest.questions)} questions about {contest.scenes} scenes",
        xlabel=f"accuracy, %, with the 95% interval of the gain over {results[0].contestant.label}",
        xlim=(0, 100),
    )
    costs.barh(places, [result.run.seconds or 0.0 for result in results], color="tab:orange", alpha=0.6)
    costs.set(title="What it costs", xlabel="seconds a question")
    return figure


def pick_questions(questions: Sequence[Question], count: int) -> list[int]:
    """Numbers of questions to draw: one of each kind in turn, those with evidence first."""
    located_first = sorted(range(len(questions)), key=lambda place: not questions[place].boxes)
    earlier: Counter[str] = Counter()
    turn = {}
    for place in located_first:
        turn[place] = earlier[questions[place].category]
        earlier[questions[place].category] += 1
    return sorted(sorted(located_first, key=lambda place: turn[place])[:count])
