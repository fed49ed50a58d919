"""Results in TensorBoard: a chart is a tag, a curve is a run, a step is a layer.

Related curves are written as runs of their own that share a tag, because TensorBoard draws runs of one tag into one
chart. So ``accuracy/image_hidden_at_layer`` holds erase, blind, knockout and early output side by side,
``accuracy_by_kind/erase`` holds the kinds of questions, and the image slider walks through the layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from jaxmllm.analysis.attention import contrastive_attention, image_distribution
from jaxmllm.analysis.curves import Curves, curves_of
from jaxmllm.analysis.study import PointingTable, Study
from jaxmllm.processing import open_image
from jaxmllm.report import tables
from jaxmllm.report.figures import overlay, summary_figure

GENERATED_CHART = "generated_answers/image_hidden_at_layer"


def write_study(
    logdir: Path,
    study: Study,
    curves: Curves,
    pointing: PointingTable | None,
    settings: dict[str, Any],
    examples: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Writes a study.

    Args:
      logdir: an existing folder.
      study: per-question results.
      curves: its overall curves.
      pointing: its pointing game, if it has evidence boxes.
      settings: what the hparams page shows (text, numbers, truth values).
      examples: questions whose attention is drawn, spread over the kinds.
      on_progress: called after each example.
    """
    for name in curves.accuracy:
        with SummaryWriter(str(logdir / name.replace(":", "_"))) as writer:
            _add_curve(writer, "accuracy/image_hidden_at_layer", curves.accuracy[name])
            _add_curve(writer, "answer_log_probability/image_hidden_at_layer", curves.log_probability[name])
            _add_curve(writer, "answer_log_probability/change_against_clean", curves.change[name])
            if name in curves.generated:
                _add_curve(writer, GENERATED_CHART, curves.generated[name])
    with SummaryWriter(str(logdir / "clean")) as writer:
        # a level line in both charts, to read drops against
        _add_curve(writer, "accuracy/image_hidden_at_layer", np.full(study.num_layers, curves.clean_accuracy))
        _add_curve(
            writer,
            "answer_log_probability/image_hidden_at_layer",
            np.full(study.num_layers, curves.clean_log_probability),
        )
        if curves.generated:
            _add_curve(writer, GENERATED_CHART, np.full(study.num_layers, curves.clean_generated))
    for category in study.categories:
        of_kind = curves_of(study, category)
        with SummaryWriter(str(logdir / f"kind_{tables.plain_name(category)}")) as writer:
            for name, values in of_kind.accuracy.items():
                _add_curve(writer, f"accuracy_by_kind/{name.replace(':', '_')}", values)
            for name, values in of_kind.generated.items():
                _add_curve(writer, f"generated_by_kind/{name.replace(':', '_')}", values)
            _add_curve(writer, "attention_by_kind/hellinger_to_last_layer", of_kind.hellinger)
    with SummaryWriter(str(logdir / "summary")) as writer:
        _add_intervals(writer, curves)
        _add_curve(writer, "attention/hellinger_to_last_layer", curves.hellinger)
        if pointing:
            _add_curve(writer, "attention/pointing_hits", np.array([scores.hits for scores in pointing.by_layer]))
            _add_curve(writer, "attention/mass_on_evidence", np.array([scores.mass for scores in pointing.by_layer]))
        writer.add_figure("summary", summary_figure(study, curves, pointing))
        for title, rows in _tables(study, curves, pointing).items():
            writer.add_text(title, tables.markdown(rows))
        for row in pick_examples(study, examples):
            _add_example(writer, study, row)
            on_progress()
        metrics = {"hparam/clean_accuracy": curves.clean_accuracy}
        if study.generated is not None:
            metrics[f"hparam/clean_generated_{study.generated.metric}"] = curves.clean_generated
        if pointing:
            best = max(pointing.maps.values(), key=lambda scores: scores.hits)
            metrics["hparam/best_pointing_hits"] = best.hits
        writer.add_hparams(settings, metrics, name="hparams")


def _add_curve(writer: SummaryWriter, tag: str, values: np.ndarray) -> None:
    for layer, value in enumerate(values):
        writer.add_scalar(tag, float(value), layer)


def _add_intervals(writer: SummaryWriter, curves: Curves) -> None:
    """Curves with their bootstrap intervals, on the page of custom scalars."""
    titles = {"accuracy": "accuracy", "generated": "generated answers", "change": "log-probability against clean"}
    charts: dict[str, Any] = {}
    for measure, title in titles.items():
        for name, values in getattr(curves, measure).items():
            low, high = curves.intervals[measure][name]
            tags = [f"interval_{measure}/{name.replace(':', '_')}_{part}" for part in ("mean", "low", "high")]
            for tag, numbers in zip(tags, (values, low, high), strict=True):
                _add_curve(writer, tag, numbers)
            charts[f"{name}: {title}"] = ["Margin", tags]
    # TensorBoard shows the last one first
    charts = dict(reversed(charts.items()))
    writer.add_custom_scalars({"image hidden at layer, with 95% bootstrap interval": charts})


def _tables(study: Study, curves: Curves, pointing: PointingTable | None) -> dict[str, list[list[str]]]:
    found = {
        "accuracy_by_layer": tables.accuracy_table(study, curves),
        "answer_log_probability_by_layer": tables.log_probability_table(study, curves),
        "attention_by_layer": tables.attention_table(study, curves, pointing),
    }
    if curves.generated:
        found["generated_answers_by_layer"] = tables.generated_table(study, curves)
    if "erase" in curves.accuracy:
        found["erase_accuracy_by_kind"] = tables.category_table(study, "erase")
    if pointing:
        found["pointing_game"] = tables.pointing_rows(pointing)
    return found


def pick_examples(study: Study, count: int) -> list[int]:
    """Questions to draw: one of each kind in turn, those answered correctly and with evidence first, at random else."""
    correct = np.asarray(study.clean.correct)
    shuffled = np.random.default_rng(0).permutation(len(study.questions)).tolist()
    best_first = sorted(shuffled, key=lambda row: (not correct[row], not study.questions[row].boxes))
    earlier: Counter[str] = Counter()
    turn = {}
    for row in best_first:
        turn[row] = earlier[study.questions[row].category]
        earlier[study.questions[row].category] += 1
    return sorted(best_first, key=lambda row: turn[row])[:count]


def _add_example(writer: SummaryWriter, study: Study, row: int) -> None:
    """The attention of one question at every layer, and its contrastive map."""
    question, tokens = study.questions[row], study.tokens[row]
    image: Image.Image = open_image(question.image)
    boxes: Sequence[Sequence[float]] = question.boxes or ()
    tag = tables.plain_name(f"{question.category}_question_{question.question_id}")
    distribution = study.on_image(row, np.asarray(image_distribution(study.attention[:, row])))
    for layer, values in enumerate(distribution):
        picture = overlay(image, values, tokens, boxes, f"layer {layer}   {question.text}  ({question.answer})")
        writer.add_image(f"attention_map/{tag}", picture, layer, dataformats="HWC")
    contrast = study.on_image(row, np.asarray(contrastive_attention(study.attention[:, row : row + 1], pre=0))[0])
    picture = overlay(image, contrast, tokens, boxes, f"last - layer 0   {question.text}  ({question.answer})")
    writer.add_image(f"contrast_map/{tag}", picture, 0, dataformats="HWC")
