"""What all pages of a validation say alike: numbers, the verdict in a sentence, tables with their header first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmllm.report.validation.strips import comparisons, rank
from jaxmllm.validation import floors
from jaxmllm.validation.distributions import Errors
from jaxmllm.validation.report import Cause, Comparison, Phase, Report, Verdict

Rows = list[list[str]]

VERDICT_WORDS: Mapping[Verdict, str] = {
    "passes": "PASSES",
    "differs": "DIFFERS",
    "failed": "COULD NOT RUN",
    "skipped": "SKIPPED",
}
EXIT_CODES = "0 passes, 1 differs, 2 could not run"

TOLERANCES = (
    "A statistic of the differences may be so many times the floor's, which is the largest of the ways that count."
)

# How to read a report, a paragraph each.
READING = (
    "A component is compared in two ways. own: the port computes it from the reference's input, so the error is its "
    "own. run: the port runs from the prompts on, so the error holds what comes before, too. A component with a large "
    "run error and a small own error passes on what an earlier one did.",
    "The floor is what PyTorch differs from itself by when it computes the same thing in another way (a wider type, "
    "sums in another order, rounded products). The ratio is the port's differences over what is allowed of the floor, "
    "the worst of mean, 99th percentile and maximum. Up to 1, nothing can be told from noise; above 1, the component "
    "departs. Only ways count that the port's backend may be like; the settings name them.",
    "A fault shows in own as the one site, or the few, that depart; in run, all that comes after it follows. Read own "
    "from the left: the first component that departs is the place to look at.",
    "A ulp is the unit in the last place of the reference's number (of the tensor's scale, where the number is "
    "smaller), in the type that was computed in. The scale is the reference's root mean square.",
)


def number(value: float | int) -> str:
    """A number with three significant digits; counts in full."""
    if isinstance(value, int):
        return str(value)
    if 1e3 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def times(ratio: float | int) -> str:
    """A ratio, never rounded to 1 where it is above."""
    if 0.995 < ratio < 1.005:
        return ">1" if ratio > 1 else "1"
    return f"{ratio:.0f}" if 100 <= ratio < 1e5 else f"{ratio:.2g}"


def ways(report: Report) -> tuple[str, ...]:
    """The ways of the floor that count, on the backend that the port ran on."""
    return tuple(report.settings.get("ways", floors.ALWAYS))


def floor_of(report: Report, comparison: Comparison) -> Errors | None:
    """The largest floor that counts for a comparison; ``None`` where none was measured."""
    counted = (errors for way, errors in comparison.floor.of.items() if way in ways(report))
    return max(counted, key=lambda errors: errors.max, default=None)


def floor_max(report: Report, comparison: Comparison) -> str:
    """The largest difference of PyTorch from itself, or a dash."""
    errors = floor_of(report, comparison)
    return "-" if errors is None else number(errors.max)


def allowed(report: Report, comparison: Comparison) -> Mapping[str, float]:
    """What mean, 99th percentile and maximum of a comparison may be."""
    dtype = str(report.settings.get("dtype", "float32"))
    return floors.tolerance(comparison.floor, comparison.errors.scale, dtype, ways(report))


def describe(report: Report, each: Comparison) -> str:
    """A comparison in one line, to be shown where one points at a cell."""
    errors = each.errors
    place = f"; {each.place}" if each.place else ""
    return (
        f"{each.component} ({each.kind}): ratio {times(each.ratio)}{', departs' if each.departs else ''}; "
        f"mean {number(errors.mean)}, p99 {number(errors.p99)}, max {number(errors.max)} "
        f"({number(errors.ulp_max)} ulps), floor max {floor_max(report, each)}, allowed max "
        f"{number(allowed(report, each)['max'])}, scale {number(errors.scale)}{place}"
    )


def worst(phase: Phase) -> Comparison | None:
    """The comparison with the largest ratio, among those whose own error departs where there are such.

    In the run, the largest ratio may be far behind the fault. ``None`` where nothing was compared.
    """
    own = [each for each in phase.departures if each.kind == "own"]
    return max(own or phase.comparisons, key=lambda each: rank(each.ratio), default=None)


def first(report: Report) -> Comparison | None:
    """The comparison that departs first, its own error before that of the run; ``None`` where no comparison does."""
    found = [each for each in comparisons(report) if each.component == report.first and each.departs]
    return min(found, key=lambda each: each.kind != "own", default=None)


def headline(report: Report) -> str:
    """The verdict in a sentence: what departs first, and by how much."""
    if report.verdict == "passes":
        return _passed(report)
    phase = next((each for each in report.phases if each.verdict == report.verdict), None)
    if phase is None:
        return "Nothing was compared."
    departing = first(report)
    if report.verdict == "failed":
        return f"The phase {phase.name} could not run: {phase.summary}"
    if departing is None:
        return f"{report.first or phase.name} differs first: {phase.summary}"
    whose = "its own error" if departing.kind == "own" else "its error from the prompts on"
    floor = floor_of(report, departing)
    against = "no floor was measured" if floor is None else f"PyTorch differs from itself by up to {number(floor.max)}"
    return (
        f"{departing.component} departs first: {whose} is {times(departing.ratio)} times what is allowed; it is "
        f"up to {number(departing.errors.max)}, and {against}."
    )


def _passed(report: Report) -> str:
    compared = list(comparisons(report))
    skipped = [phase.name for phase in report.phases if phase.verdict == "skipped"]
    left_out = f" Skipped: {', '.join(skipped)}." if skipped else ""
    if not compared:
        return f"All phases that ran agree.{left_out}"
    top = max(compared, key=lambda each: rank(each.ratio))
    return (
        f"All {len(compared)} comparisons are within PyTorch's own noise; the nearest to its limit is {top.component} "
        f"({top.kind}), ratio {times(top.ratio)}.{left_out}"
    )


def explained(cause: Cause) -> str:
    """How much of the difference a cause explains."""
    if cause.explained is None:
        return "seen" if cause.evidence else "not tried"
    return f"explains {100 * cause.explained:.1f}% of the difference"


def phase_table(report: Report) -> Rows:
    """One row a phase: its verdict and its worst component."""
    rows = [["phase", "verdict", "worst component", "kind", "error", "floor", "ratio", "depart", "s"]]
    for phase in report.phases:
        top = worst(phase)
        figures = ["-"] * 6
        if top is not None:
            figures = [top.component, top.kind, number(top.errors.max), floor_max(report, top), times(top.ratio)]
            figures.append(f"{len(phase.departures)}/{len(phase.comparisons)}")
        rows.append([phase.name, phase.verdict, *figures, f"{phase.seconds:.1f}"])
    return rows


def error_table(report: Report, found: Sequence[Comparison]) -> Rows:
    """One row a comparison: the distribution of its differences, what it may be, and the same in ulps."""
    rows = [["component", "kind", "ratio", "mean", "p99", "max", "allowed: mean, p99, max", "ulps: mean, p99, max"]]
    rows[0] += ["place", "max/scale", "1-cosine", "gain", "scale", "count"]
    for each in found:
        errors, limits = each.errors, allowed(report, each)
        where = f"[{', '.join(map(str, errors.worst))}]" if errors.worst else ""
        row = [each.component, each.kind, times(each.ratio) + (" departs" if each.departs else "")]
        row += map(number, (errors.mean, errors.p99, errors.max))
        row.append(", ".join(number(limits[name]) for name in ("mean", "p99", "max")))
        row.append(", ".join(map(number, (errors.ulp_mean, errors.ulp_p99, errors.ulp_max))))
        row.append(" ".join(filter(None, (each.place, where))))
        rows.append([*row, *map(number, (errors.relative, 1 - errors.cosine, errors.gain, errors.scale, errors.count))])
    return rows


def tolerance_table() -> Rows:
    """What a difference may be: a factor of the floor, which counts as some part of a ulp of the scale at least."""
    rows = [["statistic", "times the floor", "floor at least, ulps of the scale"]]
    rows += [[name, number(factor), number(floors.STEP[name])] for name, factor in floors.ALLOWED.items()]
    return [*rows, ["gain, in halves", number(floors.ALLOWED_GAIN), f"{number(floors.STEP_GAIN)} of a step at 1"]]


def floor_table(found: Sequence[Comparison]) -> Rows:
    """One row a comparison, a column a way of the floor: mean, 99th percentile and maximum, and the maximum in ulps."""
    ways = list(dict.fromkeys(way for each in found for way in each.floor.of))
    rows = [["component", "kind", *(f"{way}: mean, p99, max (ulps)" for way in ways)]]
    for each in found:
        cells = []
        for way in ways:
            errors = each.floor.of.get(way)
            cells.append("-" if errors is None else _distribution(errors))
        rows.append([each.component, each.kind, *cells])
    return rows if ways else []


def _distribution(errors: Errors) -> str:
    return f"{number(errors.mean)}, {number(errors.p99)}, {number(errors.max)} ({number(errors.ulp_max)})"


def detail_table(found: Sequence[Comparison]) -> Rows:
    """One row a comparison with further figures; empty where there are none."""
    names = list(dict.fromkeys(name for each in found for name in each.details))
    rows = [["component", "kind", *names]]
    for each in found:
        if each.details:
            values = (each.details.get(name) for name in names)
            rows.append([each.component, each.kind, *("-" if value is None else number(value) for value in values)])
    return rows if names else []


def setting_tables(settings: Mapping[str, Any]) -> dict[str, Rows]:
    """Settings as tables by title; a setting that is a mapping has a table of its own."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    found = {"settings": [["setting", "value"], *([name, text(value)] for name, value in plain.items())]}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found[name] = _mapping_table(value)
    return {title: rows for title, rows in found.items() if len(rows) > 1}


def _mapping_table(values: Mapping[str, Any]) -> Rows:
    """One row a name; where all values are mappings, one column a name of theirs."""
    if not all(isinstance(value, Mapping) for value in values.values()):
        return [["name", "value"], *([str(name), text(value)] for name, value in values.items())]
    columns = list(dict.fromkeys(column for value in values.values() for column in value))
    rows = [["name", *map(str, columns)]]
    for name, value in values.items():
        rows.append([str(name), *(text(value[column]) if column in value else "-" for column in columns)])
    return rows


def text(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value)) or "none"
    return "none" if value is None else str(value)
