"""Measures how far the port is from PyTorch in every family, and writes the tables of docs/parity.md.

    python scripts/measure_parity.py               # tiny models, half a minute a row
    python scripts/measure_parity.py --large       # real proportions at about 300M parameters, minutes a row
    python scripts/measure_parity.py --write       # puts the table into docs/parity.md, between its marks

Every figure comes from `jaxmllm validate`: the production run from the pixels on, against transformers in the same
type; in brackets what PyTorch differs from itself by (a wider type, sums in another order). Needs the test extra.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "parity.md"
log = Console(stderr=True)


def main(
    large: Annotated[bool, typer.Option("--large", help="About 300M parameters instead of tiny models.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the table into docs/parity.md.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Families; by default all.")] = None,
) -> None:
    """Prints a Markdown table."""
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "scripts"))
    from made_up_checkpoints import scaled_config
    from made_up_checkpoints import write as write_checkpoint

    from jaxmllm.validation import Settings, validate
    from tests.support import families, parity, tiny

    rows = []
    for family in only or sorted(families.FAMILIES):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / family
            if large:
                log.print(f"{family}: {write_checkpoint(folder, scaled_config(family)):,} parameters", highlight=False)
            else:
                tiny.make_torch(tiny.config_fields(next(iter(families.FAMILIES[family].VARIANTS)))).save_pretrained(
                    folder
                )
            for dtype in parity.DTYPES:
                report = validate(folder, settings=Settings(dtype=dtype, phases=parity.PHASES))
                log.print(f"{family}, {dtype}: {report.verdict}, {len(report.samples)} comparisons", highlight=False)
                rows.append((family, dtype, parity.figures(report)))
    found = parity.table(rows)
    print(found)
    if write:
        mark = "large" if large else "tiny"
        text = DOCUMENT.read_text()
        parts = re.split(rf"(<!-- {mark} -->\n|<!-- end of {mark} -->)", text)
        DOCUMENT.write_text("".join([*parts[:2], found + "\n", *parts[3:]]))


if __name__ == "__main__":
    typer.run(main)
