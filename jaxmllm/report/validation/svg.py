"""Drawings of a validation's page: the heat strip, and the error along the depth. Their colours are in ``page.css``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from jaxmllm.report.validation import words
from jaxmllm.report.validation.strips import Strip, comparisons, step
from jaxmllm.validation.components import split
from jaxmllm.validation.report import Comparison, Report

WIDTH = 1140  # pixels of a page's column
LABELS = 110  # pixels left of a strip, for the sites
CELL = (8.0, 22.0)  # pixels of a cell's width, at least and at most
ROW = 16  # pixels of a cell's height
GAP = 12  # pixels between parts of the model
HEAD = 34  # pixels above the cells, for parts and layers

CURVE_HEIGHT = 310
MARGIN = 56  # pixels left of a curve
FOOT = 92  # pixels below it, for names
LABEL_HEIGHT = 12
_WAY = ("vision.embed", "vision.features", "qformer.embed", "connector", "embedding", "final_norm", "logits")
LEAST = 1e-12  # differences below it, and exact ones, are drawn as this


def heat_strip(report: Report, strip: Strip) -> str:
    """A strip: a column a layer, a row a site, coloured by the ratio; what departs has an outline."""
    gaps = GAP * (len(strip.parts) - 1)
    width = min(CELL[1], max(CELL[0], (WIDTH - LABELS - gaps) / len(strip.columns)))
    height = HEAD + ROW * len(strip.sites) + 4
    lines, left = [], float(LABELS)
    for row, site in enumerate(strip.sites):
        lines.append(f'<text class="site" x="{LABELS - 6}" y="{HEAD + ROW * row + 12}">{escape(site)}</text>')
    for part in strip.parts:
        columns = strip.of_part(part)
        lines.append(f'<text class="part" x="{left:.1f}" y="12">{escape(part)}</text>')
        every = next(stride for stride in (1, 2, 5, 10, 20, 50, 100) if width * stride >= 18 or stride == 100)
        for place, column in enumerate(columns):
            x = left + width * place
            if column[1] % every == 0:
                lines.append(f'<text x="{x + 1:.1f}" y="28">{column[1]}</text>')
            for row, site in enumerate(strip.sites):
                lines.append(_cell(report, strip.cells.get((column, site)), x, HEAD + ROW * row, width - 1))
        left += width * len(columns) + GAP
    total = math.ceil(left)
    return (
        f'<div class="wide"><svg viewBox="0 0 {total} {height}" style="width:{total}px;min-width:{total}px" '
        f'role="img" aria-label="Ratios of {strip.kind} errors by layer and site">{"".join(lines)}</svg></div>'
    )


def _cell(report: Report, each: Comparison | None, x: float | int, y: float | int, width: float | int) -> str:
    box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 1}"'
    if each is None:
        return ""
    out = " out" if each.departs else ""
    return f'<rect class="s{step(each.ratio)}{out}" {box}><title>{escape(words.describe(report, each))}</title></rect>'


def depth_curve(report: Report) -> str:
    """The run's error and its floor, both over the scale of the reference, along the depth; empty without a run."""
    points = [each for each in comparisons(report) if each.kind == "run" and _on_the_way(each.component)]
    if len(points) < 2:
        return ""
    series = [(name, css, [value(report, each) for each in points]) for name, css, value in _SERIES]
    known = [_log(value) for _, _, values in series for value in values if value is not None and value > 0]
    low, high = math.floor(min(known, default=-8)), math.ceil(max(known, default=0))
    high = max(high, low + 1)
    right, bottom = WIDTH - 90, CURVE_HEIGHT - FOOT

    def x_of(place: int) -> float | int:
        return MARGIN + (right - MARGIN) * place / (len(points) - 1)

    def y_of(value: float | int) -> float | int:
        share = (min(max(_log(value), low), high) - low) / (high - low)
        return bottom - (bottom - 12) * share

    lines = []
    for decade in range(low, high + 1, max(1, (high - low) // 6)):
        y = y_of(10.0**decade)
        lines.append(f'<path class="grid" d="M{MARGIN} {y:.1f}H{right}"/><text x="8" y="{y + 4:.1f}">1e{decade}</text>')
    lines += _depth_labels(points, x_of, bottom)
    ends = []
    for name, css, values in series:
        lines += _line(values, css, x_of, y_of)
        end = next((value for value in reversed(values) if value is not None), None)
        if end is not None:
            ends.append((y_of(end) + 4, name))
    lines += _names_at_ends(ends, right + 6)
    for place, each in enumerate(points):
        for name, css, value in _SERIES[:2]:
            if (height := value(report, each)) is not None:
                title = f"{name}: {words.number(height)} of the scale. {words.describe(report, each)}"
                at = f'cx="{x_of(place):.1f}" cy="{y_of(height):.1f}" r="2.6"'
                lines.append(f'<circle class="dot {css.split()[0]}" {at}><title>{escape(title)}</title></circle>')
    return (
        f'<div class="wide"><svg viewBox="0 0 {WIDTH} {CURVE_HEIGHT}" style="width:{WIDTH}px;min-width:{WIDTH}px" '
        f'role="img" aria-label="Error of the run along the depth">{"".join(lines)}</svg></div>'
    )


def _on_the_way(component: str) -> bool:
    """Whether a component is a state on the way from the pictures to the logits."""
    _, layer, site = split(component)
    return site == "resid_post" if layer is not None else component in _WAY


def _relative(value: float | int, each: Comparison) -> float | int:
    return value / each.errors.scale if each.errors.scale else value


def _port_max(report: Report, each: Comparison) -> float | int | None:
    return _relative(each.errors.max, each)


def _port_mean(report: Report, each: Comparison) -> float | int | None:
    return _relative(each.errors.mean, each)


def _floor_max(report: Report, each: Comparison) -> float | int | None:
    floor = words.floor_of(report, each)
    return None if floor is None else _relative(floor.max, each)


def _floor_mean(report: Report, each: Comparison) -> float | int | None:
    floor = words.floor_of(report, each)
    return None if floor is None else _relative(floor.mean, each)


_SERIES: tuple[tuple[str, str, Callable[[Report, Comparison], float | int | None]], ...] = (
    ("floor max", "floor", _floor_max),
    ("port max", "port", _port_max),
    ("floor mean", "floor mean", _floor_mean),
    ("port mean", "port mean", _port_mean),
)


def _log(value: float | int) -> float:
    return math.log10(min(max(value, LEAST), 1e12)) if value == value else 12.0


def _line(
    values: Sequence[float | int | None],
    css: str,
    x_of: Callable[[int], float | int],
    y_of: Callable[[float | int], float | int],
) -> list[str]:
    """A line through what is known."""
    found = [f"{x_of(place):.1f} {y_of(value):.1f}" for place, value in enumerate(values) if value is not None]
    return [f'<path class="curve {css}" d="M{"L".join(found)}"/>'] if len(found) > 1 else []


def _names_at_ends(ends: Sequence[tuple[float | int, str]], x: float | int) -> list[str]:
    """Names of curves beside where they end ``(y, name)``, each below the one before by a line at least."""
    lines, lowest = [], -math.inf
    for y, name in sorted(ends):
        lowest = max(y, lowest + LABEL_HEIGHT)
        lines.append(f'<text x="{x}" y="{lowest:.1f}">{escape(name)}</text>')
    return lines


def _depth_labels(points: Sequence[Comparison], x_of: Callable[[int], float | int], bottom: float | int) -> list[str]:
    """Names below the curve: every fifth layer by number, the first of a part and other components by name."""
    lines, before, taken = [], "", -math.inf
    for place, each in enumerate(points):
        part, layer, _ = split(each.component)
        x = x_of(place)
        if layer is None:
            label = each.component
        elif part != before:
            label = f"{part} {layer}"
        else:
            label = str(layer) if layer % 5 == 0 else ""
        before = part if layer is not None else ""
        if label and x - taken >= 13:
            taken = x
            lines.append(f'<path class="grid" d="M{x:.1f} {bottom}v5"/>')
            turn = "" if label.isdigit() else f' transform="rotate(50 {x:.1f} {bottom + 10})"'
            lines.append(f'<text x="{x - 3:.1f}" y="{bottom + 17}"{turn}>{escape(label)}</text>')
    return lines
