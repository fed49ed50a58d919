"""Cards: a picture with its question, the answer given, the references and the score below it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

CARD_WIDTH = 560  # pixels
PICTURE_HEIGHT = 420  # pixels, at most
MARGIN = 16
TEXT_SIZE = 20
RIGHT, PARTLY, WRONG, UNKNOWN = "#1a7f37", "#9a6700", "#cf222e", "#57606a"
# Lines of one field, at most.
MOST_LINES = 6


def verdict(score: float | None) -> str:
    """``right``, ``wrong``, ``partly`` or, where there are no references, ``unscored``."""
    if score is None:
        return "unscored"
    return "right" if score >= 1 else "wrong" if score <= 0 else "partly"


COLOURS = {"right": RIGHT, "partly": PARTLY, "wrong": WRONG, "unscored": UNKNOWN}


def references_text(answers: Sequence[Any] | None) -> str:
    """References in one line, each once with how often it is given, the most frequent first."""
    texts = [str(answer["answer"] if isinstance(answer, Mapping) else answer) for answer in answers or ()]
    counted = Counter(texts).most_common()
    return ", ".join(text if times == 1 else f"{text} ({times}x)" for text, times in counted) or "none"


def draw_card(
    image: Image.Image, row: Mapping[str, Any], options: Mapping[str, str] = MappingProxyType({})
) -> UInt8[np.ndarray, "Y X 3"]:
    """A card of one row of results.

    Args:
      image: the picture.
      row: a line of results; see ``jaxmllm.data.benchmarks.base.Row``.
      options: texts by their letters, of multiple choice.
    """
    colour = COLOURS[verdict(row["score"])]
    score = "no references" if row["score"] is None else f"score {row['score']:.2f}".removesuffix(".00")
    ending = "" if row["stopped"] else " ... (cut off)"
    read = "" if row["parsed"] == row["prediction"] else f"  (read as {row['parsed'] or 'nothing'})"
    fields = [
        (row["question"], "black", True),
        *[(f"{letter}. {text}", "black", False) for letter, text in options.items()],
        (f"answer: {row['prediction'] or '(empty)'}{ending}{read}", colour, True),
        (f"references: {references_text(row['answers'])}", "black", False),
        (f"{score}   {', '.join(row['categories'].values())}", colour, False),
    ]
    lines = [
        (line, fill, bold)
        for text, fill, bold in fields
        for line in wrap(text, _font(bold), CARD_WIDTH - 2 * MARGIN, MOST_LINES)
    ]
    picture = _fit(image)
    step = round(TEXT_SIZE * 1.35)
    height = picture.height + 2 * MARGIN + len(lines) * step
    card = Image.new("RGB", (CARD_WIDTH, height), "white")
    card.paste(picture, ((CARD_WIDTH - picture.width) // 2, 0))
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, picture.height, CARD_WIDTH, picture.height + 5), fill=colour)
    for number, (line, fill, bold) in enumerate(lines):
        draw.text((MARGIN, picture.height + MARGIN + number * step), line, fill=fill, font=_font(bold))
    return np.asarray(card)


def _fit(image: Image.Image) -> Image.Image:
    """An image as large as a card has room for; small ones are enlarged."""
    scale = min(CARD_WIDTH / image.width, PICTURE_HEIGHT / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines of at most ``width`` pixels; longer words are cut, and lines past ``most`` are left out with a sign."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            *full, line = _cut(word, font, width)
            lines += full
        lines.append(line)
    return lines if len(lines) <= most else [*lines[: most - 1], "..."]


def _cut(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word in pieces of at most ``width`` pixels, one at least."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


@functools.cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows more letters than Pillow's own font."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), TEXT_SIZE)
