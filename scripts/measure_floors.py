"""Measures the noise floors that verdicts of `jaxmllm validate` stand on, and how near a sound port is to its limits.

    python scripts/measure_floors.py [--family llava] [--tiny]

One row for every type and every other way of computing: what PyTorch differs from itself by there, by kind of component
(99th percentile over the tensor's scale, the worst layer), and below them what the port differs from PyTorch by. Needs
the test extra; a model of 300M parameters takes a quarter of an hour.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
log = Console(stderr=True)

# What is shown, by kind of comparison and site.
COLUMNS = (
    ("norm", "own", ("attn_in", "mlp_in", "final_norm")),
    ("rotated keys", "own", ("keys",)),
    ("attention", "own", ("attn_probs",)),
    ("attention block", "own", ("attn_out",)),
    ("feed-forward block", "own", ("mlp_out",)),
    ("residual stream, run", "run", ("resid_post",)),
    ("logits, run", "run", ("logits",)),
)


def main(
    family: Annotated[str, typer.Option(help="One of the families.")] = "llava",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model instead of one of 300M parameters.")] = False,
) -> None:
    """Prints a Markdown table."""
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "scripts"))
    from made_up_checkpoints import scaled_config, write

    from jaxmllm.validation import Settings, record, validate
    from tests.support import families
    from tests.support import tiny as tiny_models

    print("| computed in | way | " + " | ".join(name for name, _, _ in COLUMNS) + " | nearest to its limit |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / family
        if tiny:
            fields = tiny_models.config_fields(next(iter(families.FAMILIES[family].VARIANTS)))
            tiny_models.make_torch(fields).save_pretrained(folder)
        else:
            write(folder, scaled_config(family))
        for dtype in ("float32", "bfloat16", "float16"):
            phases = ("embedding", "decoder", "logits")
            settings = Settings(dtype=dtype, phases=phases, accelerators=dtype == "float32")
            recording = record(folder, Path(scratch) / dtype, settings=settings)
            report = validate(folder, reference=recording.folder, settings=settings)
            compared = [each for phase in report.phases for each in phase.comparisons]
            ways = list(dict.fromkeys(way for each in compared for way in each.floor.of))
            for way in ways:
                print(_row(dtype, f"PyTorch: {way}", compared, way, ""), flush=True)
            worst = max(compared, key=lambda each: each.ratio)
            print(_row(dtype, "**the port**", compared, None, f"{worst.ratio:.2f}, `{worst.component}` ({worst.kind})"))
            log.print(f"{dtype}: {report.verdict}", highlight=False)


def _row(dtype: str, label: str, compared: Iterable[Any], way: str | None, last: str) -> str:
    from jaxmllm.validation.components import split

    cells = []
    for _, kind, sites in COLUMNS:
        chosen = [
            each
            for each in compared
            if each.kind == kind and split(each.component)[2] in sites and not each.component.startswith("vision")
        ]
        shown = [(each.errors if way is None else each.floor.of.get(way), each.errors.scale) for each in chosen]
        relative = [errors.p99 / scale for errors, scale in shown if errors is not None and scale]
        cells.append(f"{max(relative):.1e}" if relative else "")
    return "| " + " | ".join((dtype, label, *cells, last)) + " |"


if __name__ == "__main__":
    typer.run(main)
