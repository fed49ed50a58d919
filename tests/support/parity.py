"""The figures of docs/parity.md, out of reports of validations."""

import dataclasses
from collections.abc import Iterable

from jaxmllm.validation import Report
from jaxmllm.validation.components import split
from jaxmllm.validation.phases import COMPONENT_PHASES
from jaxmllm.validation.report import Comparison

PHASES = COMPONENT_PHASES
DTYPES = ("float32", "bfloat16")
# Columns: what of the production run (from the pixels on) each takes the largest difference of.
COLUMNS = ("image tokens", "residual stream", "attention", "logits")
SITES = {"image tokens": "image_tokens", "residual stream": "resid_post", "attention": "attn_probs", "logits": "logits"}
HEADER = (
    "family",
    "computed in",
    *(f"{column} (floor)" for column in COLUMNS),
    "KL, nats",
    "same top-1",
    "nearest to its limit",
)


@dataclasses.dataclass(frozen=True)
class Figures:
    """A row of the table.

    Attributes:
      errors, floors: by column, the port's largest difference and the largest of PyTorch from itself.
      kl: largest divergence of an output distribution, nats.
      top1: share of positions with the same most probable token.
      nearest: the largest ratio of a difference to what is allowed, and of which component.
    """

    errors: dict[str, float]
    floors: dict[str, float]
    kl: float
    top1: float
    nearest: tuple[float, str]

    def cells(self) -> list[str]:
        """As text, without family and type."""
        pairs = [f"{self.errors[column]:.1e} ({self.floors[column]:.1e})" for column in COLUMNS]
        ratio, name = self.nearest
        # a type's noise in KL is of the order of its squared step; below this, rounding of the sum is all that is seen
        kl = f"{max(self.kl, 0.0):.0e}" if self.kl > 1e-12 else "< 1e-12"
        return [*pairs, kl, f"{100 * self.top1:.1f}%", f"{ratio:.2f}, `{name}`"]


def figures(report: Report) -> Figures:
    """The figures of one checkpoint."""
    compared = [each for phase in report.phases for each in phase.comparisons]
    runs = {
        column: [each for each in compared if each.kind == "run" and _is(each, SITES[column])] for column in COLUMNS
    }
    logits = runs["logits"][0].details
    worst = max(compared, key=lambda each: each.ratio)
    return Figures(
        errors={column: max(each.errors.max for each in found) for column, found in runs.items()},
        floors={
            column: max(errors.max for each in found for errors in each.floor.of.values())
            for column, found in runs.items()
        },
        kl=float(logits["kl_max"]),
        top1=float(logits["top1"]),
        nearest=(worst.ratio, f"{worst.component} ({worst.kind})"),
    )


def _is(comparison: Comparison, site: str) -> bool:
    part, _, found = split(comparison.component)
    return found == site and part in ("decoder", "logits", "image_tokens")


def table(rows: Iterable[tuple[str, str, Figures]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join((f"`{family}`", dtype, *found.cells())) + " |" for family, dtype, found in rows]
    return "\n".join(lines)


def read_table(text: str) -> dict[tuple[str, str], dict[str, float]]:
    """Largest differences by family, type and column, out of a table that ``table`` wrote."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == len(HEADER) and cells[0].startswith("`"):
            numbers = [float(cell.split()[0]) for cell in cells[2 : 2 + len(COLUMNS)]]
            found[cells[0].strip("`"), cells[1]] = dict(zip(COLUMNS, numbers, strict=True))
    return found
