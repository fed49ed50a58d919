"""Sheets: one question, and beside each other what every method looked by, what it showed, and what it answered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxmllm.data.questions import Question
from jaxmllm.evaluation.contest import Outcome, Shown
from jaxmllm.models.boxes import TokenBoxes
from jaxmllm.report.cards import RIGHT, WRONG, wrap
from jaxmllm.report.figures import overlay

COLUMNS = 3  # methods beside each other
SIDE = 224  # pixels of a picture's longer side
GAP = 6
STRIP = 22  # pixels of the line above two pictures
TEXT_SIZE = 15
CROP = "cyan"

# Label of a method, its answer, and what can be drawn of it.
Entry = tuple[str, Outcome, Shown]


def draw_sheet(picture: Image.Image, question: Question, entries: Sequence[Entry]) -> UInt8[np.ndarray, "Y X 3"]:
    """The question with its evidence (lime), answers of methods that showed nothing, and the others in pairs of
    pictures: the map over the original with what was cut out (cyan), and that part as the model was shown it. The line
    above a pair is green where the answer is right, red where it is wrong.

    Args:
      picture: the original.
      question: what was asked.
      entries: the methods in order.
    """
    silent = [entry for entry in entries if entry[2] == Shown()]
    cells = [_pair("the original", "black", _marked(picture, question, Shown()), _texts(question, silent))]
    for label, outcome, shown in entries:
        if shown != Shown():
            colour = RIGHT if outcome.correct else WRONG
            beside = _blank() if shown.picture is None else _fit(shown.picture)
            cells.append(_pair(f"{label}: {outcome.prediction}", colour, _marked(picture, question, shown), beside))
    width, height = cells[0].size
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % COLUMNS * (width + GAP), place // COLUMNS * (height + GAP)))
    return np.asarray(sheet)


def _marked(picture: Image.Image, question: Question, shown: Shown) -> Image.Image:
    """The original with a map, the evidence, and the box of what was cut out."""
    drawn = picture.copy()
    if shown.box is not None:
        left, top, right, bottom = shown.box
        line = max(2, round(max(picture.size) / 110))
        ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), outline=CROP, width=line)
    values, tokens = np.zeros(1), TokenBoxes(np.array([[0.0, 0.0, *picture.size]]), (1, 1), picture.size)
    if shown.map is not None:
        values, tokens = shown.map.values, shown.map.tokens
    laid = Image.fromarray(overlay(drawn, values, tokens, question.boxes or ()))
    above = laid.height - round(
        laid.width * picture.height / picture.width
    )  # the line for a caption, which is left out
    return _fit(laid.crop((0, above, laid.width, laid.height)))


def _blank() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), "white")


def _fit(picture: Image.Image) -> Image.Image:
    """A picture as large as its place."""
    place, scale = _blank(), SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    place.paste(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), (0, 0))
    return place


def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(TEXT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's own, where a size is asked for
    return font


def _texts(question: Question, entries: Sequence[Entry]) -> Image.Image:
    """The question, its reference, and the answers of methods that have nothing to be drawn."""
    place = _blank()
    lines = [(line, "black") for line in wrap(question.text, _font(), SIDE - 2 * GAP, 4)]
    lines += [(f"reference: {question.answer}", "black"), ("", "black")]
    lines += [(f"{label}: {outcome.prediction}", RIGHT if outcome.correct else WRONG) for label, outcome, _ in entries]
    draw = ImageDraw.Draw(place)
    for number, (line, colour) in enumerate(lines):
        draw.text((GAP, GAP + number * round(1.4 * TEXT_SIZE)), line, fill=colour, font=_font())
    return place


def _pair(caption: str, colour: str, left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures beside each other, below a line in a colour."""
    pair = Image.new("RGB", (2 * SIDE + GAP, STRIP + SIDE), "white")
    draw = ImageDraw.Draw(pair)
    draw.rectangle((0, 0, pair.width, STRIP - 1), fill=colour)
    draw.text((GAP, 1), caption, fill="white", font=_font())
    pair.paste(left, (0, STRIP))
    pair.paste(right, (SIDE + GAP, STRIP))
    return pair
