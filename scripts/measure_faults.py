"""Plants every bug of the catalogue in the port, one at a time, validates it, and prints what the validation says.

    python scripts/measure_faults.py [WORD ...]

Words choose bugs by their names. Each line says where a bug is planted and on which tiny checkpoint, the component that
is named, its differences over what is allowed, and the first cause with the share of the difference that it explains.
Needs the test extra; all bugs take about ten minutes on one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("bug", "planted in", "on", "dtype", "named", "times what is allowed", "first cause", "explains")


def main() -> None:
    """Prints a Markdown table, and how many bugs were caught."""
    sys.path.insert(0, str(ROOT))
    jax.config.update("jax_default_matmul_precision", "highest")
    from tests.validation.faults.catalogue import FAULTS
    from tests.validation.faults.catching import Bench

    words = sys.argv[1:]
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    caught = at = because = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for fault in chosen:
            catch = bench.catch(fault)
            caught, at, because = caught + catch.caught, at + catch.at(fault), because + catch.because(fault)
            print("| " + " | ".join(cells(fault, catch)) + " |", flush=True)
    print(f"\nCaught {caught} of {len(chosen)}; {at} named rightly, {because} with the right cause among the first.")


def cells(fault: Any, catch: Any) -> tuple[str, ...]:
    """A line of the table.

    Args:
      fault: of the catalogue.
      catch: what the validation says of it.
    """
    if not catch.caught:
        return (fault.name, f"`{fault.where}`", fault.on, fault.dtype, "nothing", "", "", "")
    named = catch.named if catch.at(fault) else f"{catch.named} (should be {fault.first})"
    ratio = f"{catch.first.ratio:.2g}" if catch.first else ""
    first = catch.causes[0] if catch.causes else None
    words = first.name if first else "none"
    words = words if catch.because(fault) else f"{words} (should say {fault.cause})"
    explained = "" if first is None or first.explained is None else f"{100 * first.explained:.0f}%"
    return (fault.name, f"`{fault.where}`", fault.on, fault.dtype, named, ratio, words.replace("|", "\\|"), explained)


if __name__ == "__main__":
    main()
