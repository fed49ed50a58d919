"""A validation as one page that needs no script, no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from jaxmllm.report.validation import svg, words
from jaxmllm.report.validation.strips import ALLOWED_STEPS, KINDS, STEPS, layer_strip, singles, step
from jaxmllm.validation.report import Cause, Comparison, Phase, Report

FEW = 14  # comparisons of a phase, up to which the table of all is open

_LEFT = ("component", "worst component", "kind", "phase", "place", "setting", "name", "package", "verdict", "statistic")
_CODE = ("component", "worst component")
_LONG = ("value",)
_KIND_TITLES = {
    "own": "own: each component from the reference's input",
    "run": "run: the whole port from the prompts on",
}


def page(report: Report) -> str:
    """The report as HTML: light or dark as the reader's system is, and readable on paper.

    Args:
      report: of a validation.

    Returns:
      A document with all numbers of the report; long tables are folded.
    """
    style = resources.files("jaxmllm.report.validation").joinpath("page.css").read_text(encoding="utf-8")
    word = words.VERDICT_WORDS[report.verdict]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{word}: {escape(report.model)}</title>",
            f"<style>\n{style}</style>\n</head>\n<body>",
            _banner(report),
            _why(report),
            "<h2>Phases</h2>",
            _table(words.phase_table(report)),
            _strips(report),
            _curve(report),
            "<h2>How to read this</h2>",
            *(f"<p>{escape(paragraph)}</p>" for paragraph in words.READING),
            "<h2>Every number</h2>",
            *(_phase(report, phase) for phase in report.phases),
            _how_it_was_made(report),
            "</body>\n</html>\n",
        ]
    )


def _banner(report: Report) -> str:
    return (
        f'<header class="banner {report.verdict}">'
        f'<h1><span class="word">{words.VERDICT_WORDS[report.verdict]}</span> {escape(report.model)}</h1>'
        f'<p class="soft">compared with {escape(report.reference)}</p>'
        f'<p class="head">{escape(words.headline(report))}</p>'
        f'<p class="soft">exit code {report.exit_code} ({words.EXIT_CODES})</p></header>'
    )


def _why(report: Report) -> str:
    if report.verdict == "passes":
        return ""
    departing = words.first(report)
    shown = "" if departing is None else f"<p>{escape(words.describe(report, departing))}</p>"
    if report.causes:
        shown += f'<ol class="causes">{"".join(map(_cause, report.causes))}</ol>'
    else:
        shown += "<p>No cause was found; the first component that departs is where to look.</p>"
    return f"<h2>What departs first, and why</h2>{shown}" if report.verdict == "differs" else ""


def _cause(cause: Cause) -> str:
    bar = ""
    if cause.explained is not None:
        share = 100 * min(1.0, max(0.0, cause.explained))
        bar = f'<span class="bar"><i style="width:{share:.0f}%"></i></span>'
    said = (("evidence", cause.evidence), ("look at", cause.where))
    lines = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in said if text)
    return (
        f"<li><strong>{escape(cause.name)}</strong><br>{bar}{words.explained(cause)}"
        + (f"<dl>{lines}</dl>" if lines else "")
        + "</li>"
    )


def _strips(report: Report) -> str:
    found = [strip for strip in (layer_strip(report, kind) for kind in KINDS) if strip.columns]
    alone = singles(report)
    if not found and not alone:
        return ""
    blocks = ["<h2>Ratios, layer by layer</h2>", _legend()]
    for strip in found:
        blocks += [f"<h3>{_KIND_TITLES[strip.kind]}</h3>", svg.heat_strip(report, strip)]
    if alone:
        chips = []
        for name, kinds in alone.items():
            out = " out" if any(each.departs for each in kinds.values()) else ""
            marks = "".join(_mark(report, kinds[kind]) for kind in KINDS if kind in kinds)
            chips.append(f'<span class="chip{out}"><code>{escape(name)}</code>{marks}</span>')
        blocks += ["<h3>Components outside of layers</h3>", f'<div class="chips">{"".join(chips)}</div>']
    return "\n".join(blocks)


def _mark(report: Report, each: Comparison) -> str:
    out = " out" if each.departs else ""
    return (
        f'<span title="{escape(words.describe(report, each))}"><span class="swatch s{step(each.ratio)}{out}"></span>'
        f"{each.kind} {escape(words.times(each.ratio))}</span>"
    )


def _legend() -> str:
    shown = []
    for place, top in enumerate(STEPS):
        out = "" if place < ALLOWED_STEPS else " out"
        label = f"up to {top:g}" if place < len(STEPS) - 1 else f"above {STEPS[-2]:g}"
        shown.append(f'<span class="step"><span class="swatch s{place}{out}"></span>{label}</span>')
    return (
        f'<p class="legend">ratio of the error to what is allowed: {" ".join(shown)}. An outline marks what departs '
        "(above 1); nothing is drawn where a layer has no such site. Point at a cell for its numbers.</p>"
    )


def _curve(report: Report) -> str:
    drawing = svg.depth_curve(report)
    if not drawing:
        return ""
    return (
        "<h2>The run along the depth</h2><p>Largest (line with dots) and mean (dashed) difference of what each layer "
        "hands on, over the reference's scale: the port's against the largest floor. Exact values are drawn at the "
        f"bottom.</p>{drawing}"
    )


def _phase(report: Report, phase: Phase) -> str:
    opened = " open" if phase.verdict in ("differs", "failed") else ""
    blocks = [
        f'<details{opened}><summary><strong>{escape(phase.name)}</strong>: <span class="word {phase.verdict}">'
        f"{phase.verdict}</span>. {escape(phase.summary)} <span class='soft'>({phase.seconds:.1f} s)</span></summary>"
    ]
    if phase.findings:
        blocks.append(f'<ul class="findings">{"".join(_tag("li", escape(line)) for line in phase.findings)}</ul>')
    found = phase.comparisons
    details = words.detail_table(found)
    if details:
        blocks += ["<h3>Further figures</h3>", _table(details)]
    if found:
        departing = phase.departures
        if departing and len(found) > FEW:
            shown = departing[:FEW]
            blocks += [f"<h3>The first {len(shown)} of {len(departing)} that depart</h3>", _errors(report, shown)]
        blocks.append(_folded(f"Errors of all {len(found)} comparisons", _errors(report, found), len(found) <= FEW))
        floors = words.floor_table(found)
        if floors:
            blocks.append(_folded("Floors by way", _table(floors), len(found) <= FEW))
    return "\n".join([*blocks, "</details>"])


def _folded(title: str, inside: str, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{inside}</details>"


def _errors(report: Report, found: Sequence[Comparison]) -> str:
    return _table(words.error_table(report, found), {row for row, each in enumerate(found, start=1) if each.departs})


def _table(rows: words.Rows, departing: set[int] | frozenset[int] = frozenset()) -> str:
    """Rows, header first.

    Args:
      rows: cells of text, which is escaped.
      departing: numbers of rows that are marked; the header is 0.
    """
    header = rows[0]
    lines = [f"<thead><tr>{''.join(_tag('th', escape(name), _css(name)) for name in header)}</tr></thead><tbody>"]
    for number, row in enumerate(rows[1:], start=1):
        cells = "".join(_data_cell(name, cell) for name, cell in zip(header, row, strict=True))
        lines.append(_tag("tr", cells, "departs" if number in departing else ""))
    return f'<div class="wide"><table>{"".join(lines)}</tbody></table></div>'


def _css(column: str) -> str:
    """Classes of a column: text is to the left, and long text may wrap."""
    if column in _LONG:
        return "l long"
    return "l" if column in _LEFT or ":" in column else ""


def _data_cell(column: str, text: str) -> str:
    inside = escape(text)
    if column == "verdict":
        inside = _tag("span", inside, f"word {inside}")
    elif column in _CODE:
        inside = _tag("code", inside)
    return _tag("td", inside, _css(column))


def _tag(tag: str, inside: str, css: str = "") -> str:
    """An element around HTML."""
    return f'<{tag} class="{css}">{inside}</{tag}>' if css else f"<{tag}>{inside}</{tag}>"


def _how_it_was_made(report: Report) -> str:
    blocks = ["<h2>Tolerances</h2>", f"<p>{words.TOLERANCES}</p>", _table(words.tolerance_table())]
    for title, rows in words.setting_tables(report.settings).items():
        blocks += [f"<h2>{escape(title.capitalize())}</h2>", _table(rows)]
    if report.versions:
        blocks += ["<h2>Versions</h2>", _table([["package", "version"], *map(list, report.versions.items())])]
    return "\n".join([*blocks, "<h2>Command</h2>", f"<pre>{escape(report.command)}</pre>"])
