"""A validation as Markdown, for an issue or a pull request."""

from __future__ import annotations

import re

from jaxmllm.report import tables
from jaxmllm.report.validation import words
from jaxmllm.report.validation.strips import KINDS, Column, Strip, layer_strip, rank, singles
from jaxmllm.validation.report import Comparison, Phase, Report

FEW_LAYERS = 12  # up to so many layers of a part are all shown
DEPARTING_LAYERS = 6  # of a deeper part, so many that depart are
MOST_DEPARTURES = 12  # of a phase, in its table
MOST_PASSING = 4  # likewise, those nearest to their limit
MOST_FINDINGS = 20

_SPECIAL = re.compile(r"([\\`*\[\]|~#]|\b_|_\b)")
_CODE_COLUMNS = ("component", "worst component")


def page(report: Report) -> str:
    """The report as one document; it leaves out layers and comparisons that say nothing new, and says so.

    Args:
      report: of a validation.
    """
    blocks = [
        f"# {words.VERDICT_WORDS[report.verdict]}: {plain(report.model)} against {plain(report.reference)}",
        plain(words.headline(report)),
        *_causes(report),
        "## Phases",
        table(words.phase_table(report)),
        *_strips(report),
        *(block for phase in report.phases for block in _phase(report, phase)),
        "## How to read it",
        "\n\n".join(map(plain, words.READING)),
    ]
    blocks += ["## Tolerances", words.TOLERANCES, table(words.tolerance_table())]
    for title, rows in words.setting_tables(report.settings).items():
        blocks += [f"## {plain(title).capitalize()}", table(rows)]
    if report.versions:
        blocks += ["## Versions", table([["package", "version"], *map(list, report.versions.items())])]
    blocks += ["## Command", _fenced(report.command)]
    return "\n\n".join(blocks) + "\n"


def plain(text: str) -> str:
    """Text that means itself in Markdown."""
    line = " ".join(text.split())
    return _SPECIAL.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def code(text: str) -> str:
    """Text as code, also in a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"


def table(rows: words.Rows) -> str:
    """Rows, header first; components are code."""
    as_code = [name in _CODE_COLUMNS for name in rows[0]]
    shown = [[plain(name) for name in rows[0]]]
    for row in rows[1:]:
        shown.append(
            [code(cell) if coded and cell != "-" else plain(cell) for coded, cell in zip(as_code, row, strict=True)]
        )
    return tables.markdown(shown)


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _causes(report: Report) -> list[str]:
    if not report.causes:
        return []
    lines = []
    for place, cause in enumerate(report.causes, start=1):
        lines.append(f"{place}. **{plain(cause.name)}** ({words.explained(cause)})")
        lines += [f"   - evidence: {plain(cause.evidence)}"] if cause.evidence else []
        lines += [f"   - look at: {code(cause.where)}"] if cause.where else []
    return ["## What departs first, and why", "\n".join(lines)]


def _strips(report: Report) -> list[str]:
    blocks = []
    found = [strip for strip in (layer_strip(report, kind) for kind in KINDS) if strip.columns]
    for strip in found:
        rows = []
        shown = [column for part in strip.parts for column in shown_layers(strip, part)]
        for column in shown:
            cells = (strip.cells.get((column, site)) for site in strip.sites)
            rows.append([f"{column[0]} {column[1]}", *("" if each is None else _ratio(each) for each in cells)])
        left_out = len(strip.columns) - len(shown)
        note = f" {left_out} layers are left out, {_departing(strip, shown)} of which depart." if left_out else ""
        lines = tables.markdown([["layer", *map(code, strip.sites)], *rows])
        blocks += [f"### {strip.kind}, ratios by layer and site", f"Bold departs.{note}", lines]
    alone = singles(report)
    if alone:
        rows = [["component", *KINDS]]
        for name, kinds in alone.items():
            rows.append([code(name), *(_ratio(kinds[kind]) if kind in kinds else "" for kind in KINDS)])
        blocks += ["### Other components, ratios", tables.markdown(rows)]
    return ["## Ratios", *blocks] if blocks else []


def shown_layers(strip: Strip, part: str) -> tuple[Column, ...]:
    """Layers of a part that are worth a row: all of a few; else the first that depart, the one before, and the ends."""
    columns = strip.of_part(part)
    if len(columns) <= FEW_LAYERS:
        return columns
    departing = [place for place, column in enumerate(columns) if strip.departing(column)]
    keep = {0, len(columns) // 2, len(columns) - 1, *departing[:DEPARTING_LAYERS]}
    keep |= {max(0, departing[0] - 1)} if departing else set()
    return tuple(columns[place] for place in sorted(keep))


def _departing(strip: Strip, shown: list[Column]) -> int:
    return sum(bool(strip.departing(column)) for column in strip.columns if column not in shown)


def _ratio(each: Comparison) -> str:
    ratio = plain(words.times(each.ratio))
    return f"**{ratio}**" if each.departs else ratio


def _phase(report: Report, phase: Phase) -> list[str]:
    """A phase: its summary, what was found, and tables of what departs and of what comes nearest to it."""
    blocks = [f"## {plain(phase.name).capitalize()}: {phase.verdict}", plain(phase.summary)]
    if phase.findings:
        more = len(phase.findings) - MOST_FINDINGS
        lines = [f"- {plain(line)}" for line in phase.findings[:MOST_FINDINGS]]
        blocks.append("\n".join([*lines, *([f"- and {more} more"] if more > 0 else [])]))
    passing = [each for each in phase.comparisons if not each.departs]
    nearest = sorted(passing, key=lambda each: -rank(each.ratio))[:MOST_PASSING]
    shown = [*phase.departures[:MOST_DEPARTURES], *nearest]
    if shown:
        total = len(phase.comparisons)
        blocks.append(
            f"{len(phase.departures)} of {total} comparisons depart; {len(shown)} are shown: the first that depart, "
            "then those nearest to it."
        )
        blocks += [table(words.error_table(report, shown))]
        blocks += [table(rows) for rows in (words.floor_table(shown), words.detail_table(phase.comparisons)) if rows]
    return blocks
