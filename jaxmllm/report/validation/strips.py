"""The heat strip of a validation as data: a column a layer, a row a site, a cell a comparison."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Mapping

from jaxmllm.validation.components import DECODER_SITES, split
from jaxmllm.validation.report import Comparison, Kind, Report

KINDS: tuple[Kind, ...] = ("own", "run")

# Steps of the colours, about even in log10 of the ratio: a cell has the first step that its ratio does not exceed. The
# steps up to 1 are within what is allowed, the others depart.
STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0, math.inf)
ALLOWED_STEPS = STEPS.index(1.0) + 1

# Rows from the top: in the order in which they are computed; a Q-Former has one more, after self-attention.
_CROSS = DECODER_SITES.index("attn_out") + 1
SITES = (*DECODER_SITES[:_CROSS], "cross_out", *DECODER_SITES[_CROSS:])

Column = tuple[str, int]  # part and layer


def rank(ratio: float | int) -> float | int:
    """A ratio to sort by: one that is undefined counts as infinite."""
    return math.inf if math.isnan(ratio) else ratio


def step(ratio: float | int) -> int:
    """The number of the step, and so the colour, of a ratio."""
    return bisect.bisect_left(STEPS, rank(ratio))


@dataclasses.dataclass(frozen=True)
class Strip:
    """All comparisons of one kind that belong to layers.

    Attributes:
      kind: from which input the port computed them.
      columns: part and layer, in the order of computation.
      sites: rows, from the top.
      cells: column and site -> comparison; not every site is compared in every layer.
    """

    kind: Kind
    columns: tuple[Column, ...]
    sites: tuple[str, ...]
    cells: Mapping[tuple[Column, str], Comparison]

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model, in the order of computation."""
        return tuple(dict.fromkeys(part for part, _ in self.columns))

    def of_part(self, part: str) -> tuple[Column, ...]:
        """The columns of a part."""
        return tuple(column for column in self.columns if column[0] == part)

    def departing(self, column: Column) -> tuple[Comparison, ...]:
        """What departs in a layer."""
        found = (self.cells.get((column, site)) for site in self.sites)
        return tuple(each for each in found if each is not None and each.departs)


def layer_strip(report: Report, kind: Kind) -> Strip:
    """The strip of one kind of comparison; without columns where nothing of the kind was compared."""
    cells: dict[tuple[Column, str], Comparison] = {}
    for each in comparisons(report):
        part, layer, site = split(each.component)
        if each.kind == kind and layer is not None:
            key = ((part, layer), site)
            cells[key] = max(cells.get(key, each), each, key=lambda one: rank(one.ratio))
    found = {site for _, site in cells}
    sites = [site for site in SITES if site in found]
    sites += sorted(found.difference(sites))
    return Strip(kind, tuple(dict.fromkeys(column for column, _ in cells)), tuple(sites), cells)


def singles(report: Report) -> dict[str, dict[Kind, Comparison]]:
    """Comparisons of components that belong to no layer, by component and kind, in the order of computation."""
    found: dict[str, dict[Kind, Comparison]] = {}
    for each in comparisons(report):
        if split(each.component)[1] is None:
            kinds = found.setdefault(each.component, {})
            kinds[each.kind] = max(kinds.get(each.kind, each), each, key=lambda one: rank(one.ratio))
    return found


def comparisons(report: Report) -> Iterator[Comparison]:
    """All comparisons, in the order in which they were made."""
    return (each for phase in report.phases for each in phase.comparisons)
