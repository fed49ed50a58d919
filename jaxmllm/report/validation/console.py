"""A validation on the console: the verdict first, then the phases."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxmllm.report import tables
from jaxmllm.report.validation import words
from jaxmllm.validation.report import Cause, Phase, Report, Verdict

STYLES: dict[Verdict, str] = {"passes": "green", "differs": "bold red", "failed": "bold yellow", "skipped": "dim"}
MOST_CAUSES = 4
MOST_FINDINGS = 3  # of a phase


def summary(report: Report) -> RenderableType:
    """The verdict and what departs first, likely causes, a table of phases, and what the exit code means.

    Args:
      report: of a validation.

    Returns:
      What rich prints; colours add to words and take the place of none.
    """
    title = Text.assemble(
        (words.VERDICT_WORDS[report.verdict], STYLES[report.verdict]), f"  {report.model} against {report.reference}"
    )
    parts: list[RenderableType] = [title, Text(words.headline(report))]
    if report.causes:
        parts += [_likely(report.causes[0]), Text()]
    else:
        parts.append(Text())
    parts.append(_phases(report))
    for phase in report.phases:
        if phase.verdict in ("differs", "failed"):
            parts += _findings(phase)
    if len(report.causes) > 1:
        parts += [Text(), Text("Less likely"), *(_cause(cause) for cause in report.causes[1:MOST_CAUSES])]
    parts += [Text(), Text(f"exit code {report.exit_code} ({words.EXIT_CODES})", style="dim")]
    return Group(*parts)


def _likely(cause: Cause) -> RenderableType:
    lines = [Text.assemble("Most likely: ", (cause.name, "bold"), f" ({words.explained(cause)})")]
    return Group(*lines, *_evidence(cause))


def _cause(cause: Cause) -> RenderableType:
    return Group(Padding(Text(f"{cause.name} ({words.explained(cause)})"), (0, 0, 0, 2)), *_evidence(cause))


def _evidence(cause: Cause) -> list[RenderableType]:
    found = (("evidence: ", cause.evidence), ("look at: ", cause.where))
    return [Padding(Text(name + said), (0, 0, 0, 4)) for name, said in found if said]


def _phases(report: Report) -> Table:
    header, *rows = words.phase_table(report)
    by_name = {phase.name: phase for phase in report.phases}
    shown = [header]
    for name, verdict, *figures in rows:
        style = STYLES[by_name[name].verdict]
        shown.append([escape(name), f"[{style}]{verdict}[/]", *map(escape, figures)])
    return tables.rich_table(shown, "Phases (error, floor: largest differences; ratio above 1 departs; s: seconds)")


def _findings(phase: Phase) -> list[RenderableType]:
    more = len(phase.findings) - MOST_FINDINGS
    lines = [*phase.findings[:MOST_FINDINGS], *([f"and {more} more in the report"] if more > 0 else [])]
    return [Text(), Text(f"{phase.name}: {phase.summary}"), *(Padding(Text(line), (0, 0, 0, 2)) for line in lines)]
