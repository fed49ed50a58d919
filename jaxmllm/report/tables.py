"""Results as tidy tables: the same numbers for Parquet, for the console and for TensorBoard's text page."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from jaxmllm.analysis.curves import Curves, curves_of
from jaxmllm.analysis.study import PointingTable, Study

ALL = "all"


def tidy_rows(study: Study, pointing: PointingTable | None) -> list[dict[str, Any]]:
    """One row a number: ``metric, curve, category, layer, value, low, high, questions``.

    Layer -1 is the whole model; ``low`` and ``high`` bound the 95% bootstrap interval, where there is one.
    """
    rows: list[dict[str, Any]] = []

    def add(
        metric: str,
        curve: str,
        category: str,
        layer: int,
        value: float | np.floating,
        questions: int,
        interval: np.ndarray | tuple[None, None] = (None, None),
    ) -> None:
        low, high = (None if bound is None else float(bound) for bound in interval)
        rows.append(
            {"metric": metric, "curve": curve, "category": category, "layer": layer, "value": float(value),
             "low": low, "high": high, "questions": questions}
        )  # fmt: skip

    for category in [None, *study.categories]:
        name = category or ALL
        curves = curves_of(study, category)
        count = curves.questions
        add("accuracy", "clean", name, -1, curves.clean_accuracy, count)
        add("log_probability", "clean", name, -1, curves.clean_log_probability, count)
        if curves.generated:
            add("generated", "clean", name, -1, curves.clean_generated, count)
        for metric, bounds in curves.intervals.items():
            for curve, values in getattr(curves, metric).items():
                for layer, value in enumerate(values):
                    add(metric, curve, name, layer, value, count, bounds[curve][:, layer])
        for layer, value in enumerate(curves.hellinger):
            add("hellinger", "attention", name, layer, value, count)
    if pointing:
        for layer, scores in enumerate(pointing.by_layer):
            add("pointing_hits", "attention", ALL, layer, scores.hits, pointing.questions)
            add("pointing_mass", "attention", ALL, layer, scores.mass, pointing.questions)
        for name, scores in pointing.maps.items():
            add("pointing_hits", name, ALL, -1, scores.hits, pointing.questions)
            add("pointing_mass", name, ALL, -1, scores.mass, pointing.questions)
        add("pointing_hits", "chance by area", ALL, -1, pointing.area_chance, pointing.questions)
        add("pointing_hits", "chance by object", ALL, -1, pointing.object_chance, pointing.questions)
    return rows


def question_rows(study: Study) -> list[dict[str, Any]]:
    """One row a question, curve and layer: log-probability, correctness and rank of the reference answer.

    ``change`` is the log-probability less the clean model's.
    """
    rows = []
    scores = {"clean": study.clean, "early": study.early, **study.edited}
    for number, question in enumerate(study.questions):
        for curve, score in scores.items():
            values = (np.atleast_2d(leaf)[:, number] for leaf in (score.log_probability, score.correct, score.rank))
            for layer, (log_probability, correct, rank) in enumerate(zip(*values, strict=True)):
                rows.append(
                    {
                        "question_id": question.question_id,
                        "category": question.category,
                        "curve": curve,
                        "layer": -1 if curve == "clean" else layer,
                        "log_probability": float(log_probability),
                        "change": float(log_probability) - float(study.clean.log_probability[number]),
                        "correct": bool(correct),
                        "rank": int(rank),
                    }
                )
    return rows


def answer_rows(study: Study) -> list[dict[str, Any]]:
    """One row a question, curve and layer: the answer that was generated; none where none were."""
    found = study.generated
    if found is None:
        return []
    by_curve = {"clean": [found.clean], **found.answers}
    return [
        {
            "question_id": question.question_id,
            "category": question.category,
            "curve": curve,
            "layer": -1 if curve == "clean" else layer,
            "prediction": prediction,
        }
        for curve, layers in by_curve.items()
        for layer, predictions in enumerate(layers)
        for question, prediction in zip(study.questions, predictions, strict=True)
    ]


def percent(value: float) -> str:
    """A share as percent with one decimal."""
    return f"{100 * value:.1f}"


def accuracy_table(study: Study, curves: Curves) -> list[list[str]]:
    """Accuracy in percent, header first: one row a layer, with what the rules call it."""
    rows = [["layer", *curves.accuracy, "named"]]
    for layer in range(study.num_layers):
        row = [str(layer), *[percent(values[layer]) for values in curves.accuracy.values()]]
        rows.append([*row, layer_label(curves, layer)])
    return [*rows, ["clean", *[percent(curves.clean_accuracy)] * len(curves.accuracy), ""]]


def generated_table(study: Study, curves: Curves) -> list[list[str]]:
    """The benchmark's score of generated answers in percent, header first: one row a layer."""
    rows = [["layer", *curves.generated]]
    for layer in range(study.num_layers):
        rows.append([str(layer), *[percent(values[layer]) for values in curves.generated.values()]])
    return [*rows, ["clean", *[percent(curves.clean_generated)] * len(curves.generated)]]


def attention_table(study: Study, curves: Curves, pointing: PointingTable | None) -> list[list[str]]:
    """Attention of the last prompt token to the image, header first: one row a layer."""
    rows = [["layer", "Hellinger to last", *(["pointing hits %", "mass on evidence %"] if pointing else [])]]
    for layer in range(study.num_layers):
        row = [str(layer), f"{curves.hellinger[layer]:.3f}"]
        if pointing:
            row += [percent(pointing.by_layer[layer].hits), percent(pointing.by_layer[layer].mass)]
        rows.append(row)
    return rows


def log_probability_table(study: Study, curves: Curves) -> list[list[str]]:
    """Mean log-probability of the reference answer, header first: one row a layer."""
    rows = [["layer", *curves.log_probability]]
    for layer in range(study.num_layers):
        rows.append([str(layer), *[f"{values[layer]:.2f}" for values in curves.log_probability.values()]])
    return [*rows, ["clean", *[f"{curves.clean_log_probability:.2f}"] * len(curves.log_probability)]]


def layer_label(curves: Curves, layer: int) -> str:
    """What the rules of ``jaxmllm.analysis.fusion`` call a layer."""
    labels = ["fusion"] if layer in (curves.fusion or []) else []
    return ", ".join(labels + (["review"] if layer == curves.review else []))


def category_table(study: Study, curve: str) -> list[list[str]]:
    """Accuracy in percent under one curve by kind of question, header first, with each kind's fusion layers."""
    header = ["kind", "n", *[str(layer) for layer in range(study.num_layers)], "clean", "fusion"]
    rows = [header]
    for category in [*study.categories, None]:
        curves = curves_of(study, category)
        fusion = " ".join(map(str, curves.fusion or [])) or "-"
        values = [f"{100 * value:.0f}" for value in (*curves.accuracy[curve], curves.clean_accuracy)]
        rows.append([category or ALL, str(curves.questions), *values, fusion])
    return rows


def pointing_rows(pointing: PointingTable) -> list[list[str]]:
    """The pointing game, header first, best mass last to first."""
    rows = [["map", "hit %", "mass on evidence %"]]
    ordered = sorted(pointing.maps.items(), key=lambda item: -item[1].mass)
    for name, scores in ordered:
        label = f"{name} (layer {pointing.single_layer})" if name == "best single layer" else name
        rows.append([label, percent(scores.hits), percent(scores.mass)])
    rows.append(["chance: random object", percent(pointing.object_chance), ""])
    rows.append(["chance: random pixel", percent(pointing.area_chance), percent(pointing.area_chance)])
    return rows


def rich_table(rows: list[list[str]], title: str) -> Table:
    """Rows, header first, for the console."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if column == 0 else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown(rows: list[list[str]]) -> str:
    """Rows, header first, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plain_name(text: str) -> str:
    """Text as a part of a TensorBoard tag, or of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", text).strip("_")[:80] or "unnamed"
